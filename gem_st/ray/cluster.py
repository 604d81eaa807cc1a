"""Ray for a run: started on this machine or joined, with room for the actors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPARE_CPUS = 3
"""Logical CPUs beside those of the actors: Ray Data reads the plan, filters it and writes in tasks of one each."""
STORE_BYTES = 2**28
"""Object store of a local run, and as much again for each actor: parts that wait to be written."""
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""What a run sets unless it is set: nothing is reported, and actors have the priority of the command;
Ray's own 15 would have them give way to all else on the machine."""


@contextmanager
def running_ray(
    address: str | None, num_actors: int | None, gpus_per_actor: float | None
) -> Iterator[tuple[int, float]]:
    """Ray, started here or joined, and how many actors there will be, with how many GPUs each.

    Raises:
        ValueError: If the cluster has no room for them, so that they would wait for ever.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    import ray.data

    keep_quiet()
    is_ours = not ray.is_initialized()
    if is_ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            wanted = num_actors or count_actors(gpus_per_actor)
            options |= {"num_cpus": wanted + SPARE_CPUS, "include_dashboard": False}
            options["object_store_memory"] = STORE_BYTES * (1 + wanted)
        ray.init(address=address or "local", **options)
    try:
        yield find_room(ray.cluster_resources(), num_actors, gpus_per_actor, is_local=address is None)
    finally:
        if is_ours:
            ray.shutdown()


def count_actors(gpus_per_actor: float | None) -> int:
    """Actors of this machine, if nothing else is asked for."""
    import torch  # which the command does without, if it is told how many

    gpus = torch.cuda.device_count()
    return default_actors(gpus, share_of(gpus, gpus_per_actor), (os.cpu_count() or 1) // 4)


def keep_quiet() -> None:
    """Have Ray Data log to its files alone: what a user is to know is in a bar, a result or an error."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; others are the user's
            handler.setLevel(logging.CRITICAL)


def share_of(gpus: float, gpus_per_actor: float | None) -> float:
    """GPUs of an actor: what was asked for, or one where there are any."""
    return float(bool(gpus)) if gpus_per_actor is None else gpus_per_actor


def default_actors(gpus: float, share: float, others: int) -> int:
    """Actors that have their GPUs, or else so many others; one at least."""
    return max(1, int(gpus / share) if share else others)


def find_room(
    resources: dict[str, float], num_actors: int | None, gpus_per_actor: float | None, *, is_local: bool
) -> tuple[int, float]:
    """Number of actors, and GPUs of each.

    Args:
        resources: Of the cluster.
        num_actors: As asked for.
        gpus_per_actor: As asked for.
        is_local: True for this machine alone.

    Raises:
        ValueError: If there is no room for them and for the tasks beside them.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    share = share_of(gpus, gpus_per_actor)
    others = (os.cpu_count() or 1) // 4 if is_local else int(cpus - SPARE_CPUS)
    wanted = num_actors or default_actors(gpus, share, others)
    if wanted + SPARE_CPUS > cpus or wanted * share > gpus:
        raise ValueError(
            f"{wanted} actors of 1 CPU and {share:g} GPUs, and {SPARE_CPUS} CPUs for reading and writing, do not fit "
            f"into {cpus:g} CPUs and {gpus:g} GPUs, and would wait for ever. Ask for fewer (--num-actors, "
            "--gpus-per-actor), or start Ray with more: its CPUs are a number, `ray start --num-cpus 8`."
        )
    return wanted, share


def num_threads(num_actors: int, address: str | None) -> int | None:
    """Threads of an actor: its share of this machine; on a cluster what Ray gives it."""
    return None if address else max(1, (os.cpu_count() or 1) // num_actors)
