"""How rows are made of a batch where options are not given: by the mode and the names of the columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .rows import PAIR_TASKS, TASKS, VIEWS
from .schedules import AlphaSchedule

DEFAULT_TASKS, WHOLE_TASKS = ("reconstruction", "continuation"), ("reconstruction",)


class RowPlan(NamedTuple):
    """How rows are made of a batch, and their parts weighted; see :class:`gem_st.GemLoss`."""

    tasks: tuple[str, ...]
    plain_ratio: float
    alpha: float | Callable[[int, int], float]


def plan_rows(
    freeze_base: bool,
    columns: Sequence[str] = (),
    *,
    tasks: Sequence[str] | None = None,
    plain_ratio: float | None = None,
    alpha: float | Callable[[int, int], float] | None = None,
    has_labels: bool = False,
) -> RowPlan:
    """Fill in what is not given, by the mode and the names of the columns.

    Args:
        freeze_base: Whether the base is frozen.
        columns: Names of the columns, by which tasks are recognised.
        tasks: As :class:`gem_st.GemLoss` takes them.
        plain_ratio: Likewise.
        alpha: Likewise.
        has_labels: Whether labels belong to the texts, which are then not cut.
    """
    chosen = tasks or [task for task, names in PAIR_TASKS.items() if names == tuple(columns)]
    if plain_ratio is None:
        plain_ratio = 0.8 if not freeze_base else 0.5 if chosen else 1.0
    if alpha is None:
        alpha = AlphaSchedule() if not freeze_base else 1.0 if plain_ratio == 1 else 0.7
    return RowPlan(tuple(chosen or (WHOLE_TASKS if has_labels else DEFAULT_TASKS)), plain_ratio, alpha)


def default_token_dropout(freeze_base: bool) -> float:
    """Share of tokens deleted for the second view, if not given."""
    return 0.85 if freeze_base else 0.7


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise if one of them is not known."""
    known = sorted({*TASKS, *PAIR_TASKS})
    if isinstance(tasks, str) or not tasks or any(task not in known for task in tasks):
        raise ValueError(f"tasks must be some of {known}, got {tasks!r}.")


def check_views(views: str | Sequence[str]) -> tuple[str, ...]:
    """The names of views, of which one may stand alone.

    Raises:
        ValueError: If one of them is not known.
    """
    names = (views,) if isinstance(views, str) else tuple(views)
    if not names or not {*names} <= {*VIEWS}:
        raise ValueError(f"views must be some of {list(VIEWS)}, got {views!r}.")
    return names
