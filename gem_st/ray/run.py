"""The run of `gem-st encode`: parts through Ray Data, and back into files, each exactly once.

Ray Data reads the plan, a row for each part; drops the parts that its checkpoint has; gives the others to actors, which
read, embed and return one part at a time; and writes each in two phases. Restarts and retries are Ray's.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import read_json
from .cluster import num_threads, running_ray
from .config import (
    DONE,
    EMPTY,
    FINGERPRINT,
    LANCE,
    NULL,
    PLAN,
    REPORT,
    REPORTS,
    VECTORS,
    WARNINGS,
    EncodeConfig,
)
from .errors import EncodeError, plain_errors
from .parts import (
    PART,
    Part,
    Source,
    extend_plan,
    find_files,
    find_repeated,
    look_into,
    make_parts,
    read_ids,
    read_part,
    read_plan,
    spread,
    write_plan,
)
from .settling import settle
from .workers import PartEncoder, look_at

FILTER_BYTES = 2**28
SAMPLE_PARTS, SAMPLE_TEXTS, CALIBRATION_TEXTS = 8, 256, 1024


@dataclass(frozen=True)
class EncodeResult:
    """What a run did.

    Attributes:
        texts: All that were asked for.
        vectors: Those that have one.
        without_vector: Number of others, by why.
        cut: Texts of which only the beginning was read.
        new: Texts of this run, as another had done the rest.
        seconds: Time of this run.
    """

    output: str
    texts: int
    vectors: int
    without_vector: dict[str, int]
    cut: int
    new: int
    seconds: float

    def __str__(self) -> str:
        left_out = "".join(f", {num:,} {reason}" for reason, num in self.without_vector.items() if num)
        return (
            f"{self.vectors:,} vectors of {self.texts:,} texts in {self.output}{left_out}; {self.cut:,} texts cut. "
            f"{self.new:,} in {self.seconds:.0f} s, {self.new / max(self.seconds, 1e-9):.0f} texts/s."
        )


def look(
    config: EncodeConfig, num_actors: int, share: float, texts: list[str], say: Callable[[str], object]
) -> dict[str, Any]:
    """:func:`gem_st.ray.workers.look_at`, in a worker."""
    import ray

    options = {**config.encoder_options(), "num_threads": num_threads(num_actors, config.address)}
    with plain_errors():
        found = ray.get(ray.remote(look_at).options(num_gpus=share, max_retries=0).remote(options, texts))
    for line in found["warnings"].splitlines():
        say(line)
    return found


# --------------------------------------------------------------------------------------------------------------------
# The run


def read_known(config: EncodeConfig) -> list[Part]:
    """Parts that an output is planned with; none as long as it has no vectors."""
    vectors = config.output / VECTORS
    if not (vectors.is_dir() and any(vectors.iterdir())):
        return []
    for path in (config.work / PLAN, config.output / FINGERPRINT):
        if not path.exists():
            raise ValueError(f"{vectors} has files, but nothing says of what: {path} is gone. Choose another --output.")
    return read_plan(config.work / PLAN)


def start_over(config: EncodeConfig) -> None:
    """Forget what was planned and settled for vectors that are not there, and was of another corpus or model, say."""
    for folder in (DONE, REPORTS):
        shutil.rmtree(config.work / folder, ignore_errors=True)
    for path in (config.work / PLAN, config.output / FINGERPRINT):
        path.unlink(missing_ok=True)


def make_plan(config: EncodeConfig, say: Callable[[str], object]) -> tuple[list[Part], list[Part]]:
    """Parts that the output is planned with already, and those with what there is now."""
    known = read_known(config)
    source = Source(config.data, config.subset, config.split, config.token)
    files = find_files(source, config.names, config.rows_per_part, config.work / "input", say)
    plan = extend_plan(known, make_parts(files, config.rows_per_part, config.limit))
    if not plan:
        raise ValueError(f"{config.data} has no rows.")
    if len(plan) > len(known) and (repeated := find_repeated(lambda: read_ids(plan, config.id_column))):
        raise ValueError(
            f"Column {config.id_column!r} has ids that come more than once, {len(repeated)} at least: "
            f"{repeated[:5]}. Each text needs its own."
        )
    return known, plan


def sample_texts(plan: list[Part], column: str, num: int = SAMPLE_TEXTS) -> list[str]:
    """Texts from parts spread over the corpus; the same plan gives the same."""
    chosen = spread(plan, SAMPLE_PARTS)
    each = -(-num // len(chosen))
    texts: list[str] = []
    for part in chosen:
        values = [text for text in read_part(part, [column])[column].to_pylist() if text and text.strip()]
        texts += spread(values, each)
    if not texts:
        raise EncodeError(
            f"There is nothing but null and blank texts in {len(chosen)} parts, from the first to the last."
        )
    return texts


def encode(config: EncodeConfig, *, say: Callable[[str], object] = print, shows_progress: bool = True) -> EncodeResult:
    """Embed a corpus, or what is left of it.

    Args:
        config: The settings.
        say: Told of what takes long.
        shows_progress: Draw a bar of texts/s and time left.

    Raises:
        EncodeError: If a text, a file or the checkpoint stopped the run; what was written stays.
        ValueError: If settings, data or output do not fit each other.
        OSError: If the disk is full, or something cannot be read or written.
        ImportError: If a package is missing.
    """
    config.check()
    with only_run(config), told_warnings(config.work / WARNINGS, say):
        known, plan = make_plan(config, say)
        if not known:
            start_over(config)
        note, seen = make_note(config, plan), dict[str, set[int]]()
        before = count_done(config.work / DONE, plan, seen)
        left = len(plan) - len(done_parts(config.work / DONE, seen))
        with running_ray(config.address, config.num_actors, config.gpus_per_actor) as (num_actors, share):
            calibrates = config.precision == "int8" and note["ranges"] is None
            is_longer = 0 < len(known) < len(plan)
            if calibrates or is_longer or not left:  # otherwise each actor settles it before its first part
                texts = sample_texts(plan, config.text_column, CALIBRATION_TEXTS) if calibrates else []
                found = look(config, num_actors, share, texts, say)
                note["ranges"] = found["ranges"] if calibrates else note["ranges"]
                settle(config.output, note, found["facts"])
            if len(plan) > len(known):
                write_plan(config.work / PLAN, plan)
            start = time.monotonic()
            with plain_errors(), progress_of(config, plan, seen, shows_progress):
                if left:
                    write_parts(config, note, min(num_actors, left), num_threads(num_actors, config.address), share)
        return _finish(config, plan, before, time.monotonic() - start)


def make_note(config: EncodeConfig, plan: list[Part]) -> dict[str, Any]:
    """How a run is asked for, with the ranges that an output has already."""
    columns: dict[str, Any] = {"text": config.text_column, "id": config.id_column, "others": list(config.columns)}
    columns["types"] = look_into(Path(plan[-1].file), config.names).types
    path = config.output / FINGERPRINT
    ranges = read_json(path)["ranges"] if path.exists() else None
    same = {name: getattr(config, name) for name in ("revision", "dtype", "prompt_name", "truncate_dim")}
    return {"columns": columns, "checkpoint": config.place, **same, "ranges": ranges}


def write_parts(config: EncodeConfig, note: dict[str, Any], num_actors: int, threads: int | None, share: float) -> None:
    """The pipeline: plan, checkpoint, actors, files."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    from .unique import UniquePartManager

    options: dict[str, Any] = {"names": config.names.all, "output": str(config.output.resolve()), "note": note}
    options |= {**config.encoder_options(), "num_threads": threads}
    options["report"] = str((config.work / REPORTS).resolve())
    checkpoint = CheckpointConfig(
        id_column=PART,
        checkpoint_path=str((config.work / DONE).resolve()),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=UniquePartManager,
    )
    checkpoint.checkpoint_actor_memory_bytes = FILTER_BYTES
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a part is one block: cut in two, one half could be taken for the whole
    context.use_datasource_v2 = False  # which reads the footer of the plan in actors of their own
    context.checkpoint_config = checkpoint
    context.issue_detectors_config.detectors = []  # which tell of memory that is not short
    with ray.data.DataContext.current(context):
        rows = ray.data.read_parquet(str((config.work / PLAN).resolve()))
        rows.repartition(target_num_rows_per_block=1).map_batches(
            PartEncoder,
            fn_constructor_kwargs=options,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=1,
            num_gpus=share,
        ).write_parquet(str((config.output / VECTORS).resolve()))


@contextmanager
def only_run(config: EncodeConfig) -> Iterator[None]:
    """Keep a second run out of the output; on a shared disk as far as that knows locks."""
    config.work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(config.work / "lock"), timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another run writes to {config.output}. Wait for it, or end it.") from error


@contextmanager
def told_warnings(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Say at the end what actors were warned of, each line once."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        lines = [line for file in folder.glob("*.txt") for line in file.read_text(encoding="utf-8").splitlines()]
        for line in dict.fromkeys(lines):
            say(line)


def done_parts(folder: Path, seen: dict[str, set[int]] | None = None) -> set[int]:
    """Parts that Ray's checkpoint has.

    Args:
        folder: Of the checkpoint.
        seen: Parts by file that were read before, to which new ones are added.
    """
    seen = {} if seen is None else seen
    for file in folder.glob("*.parquet") if folder.is_dir() else ():
        if file.name not in seen and not file.name.endswith(".pending.parquet"):
            seen[file.name] = set(pq.read_table(file, columns=[PART])[PART].unique().to_pylist())
    return set().union(*seen.values())


def count_done(folder: Path, plan: list[Part], seen: dict[str, set[int]] | None = None) -> int:
    """Texts of the parts that are written."""
    return sum(plan[part].num_rows for part in done_parts(folder, seen))


@contextmanager
def progress_of(config: EncodeConfig, plan: list[Part], seen: dict[str, set[int]], is_shown: bool) -> Iterator[None]:
    """A bar that follows the checkpoint, which is what a restart would find."""
    done, over = config.work / DONE, Event()
    total, initial = sum(part.num_rows for part in plan), count_done(done, plan, seen)
    with tqdm(total=total, initial=initial, unit="text", disable=not is_shown, smoothing=0.05) as bar:

        def follow() -> None:
            while not over.wait(1):
                bar.update(count_done(done, plan, seen) - bar.n)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(count_done(done, plan, seen) - bar.n)


def _finish(config: EncodeConfig, plan: list[Part], before: int, seconds: float) -> EncodeResult:
    """Join the reports, count, and write Lance where it was asked for."""
    reasons = join_reports(config.work / REPORTS, config.output / REPORT)
    texts, vectors = sum(part.num_rows for part in plan), count_vectors(config.output / VECTORS)
    without = {reason: reasons.get(reason, 0) for reason in (NULL, EMPTY)}
    if vectors + sum(without.values()) != texts:
        raise EncodeError(
            f"{config.output} has {vectors} vectors of {texts} texts, and {sum(without.values())} are known to have "
            f"none. See what is missing: gem-st encode --verify {config.output}."
        )
    if config.has_lance:
        write_lance(config.output)
    cut = sum(reasons.values()) - sum(without.values())
    return EncodeResult(str(config.output), texts, vectors, without, cut, texts - before, seconds)


def join_reports(folder: Path, path: Path) -> dict[str, int]:
    """Write the lines of all files of a folder into one; number of lines by reason."""
    reasons: dict[str, int] = {}
    writing = path.with_suffix(".writing")
    with writing.open("w", encoding="utf-8") as joined:
        for file in sorted(folder.glob("*.jsonl")):
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    reason = json.loads(line)["reason"]
                    reasons[reason] = reasons.get(reason, 0) + 1
                    joined.write(line)
    writing.replace(path)
    return reasons


def count_vectors(folder: Path) -> int:
    """Rows of the parquet files of a folder."""
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def write_lance(output: Path) -> None:
    """Write the vectors as a Lance data set, as a whole; the parquet files stay, since runs go on from them."""
    import lance
    import pyarrow.dataset

    whole, writing = output / LANCE, output / f".{LANCE}"
    shutil.rmtree(writing, ignore_errors=True)
    vectors = pyarrow.dataset.dataset(output / VECTORS, format="parquet")
    lance.write_dataset(vectors.to_batches(), str(writing), schema=vectors.schema)
    shutil.rmtree(whole, ignore_errors=True)
    writing.rename(whole)


# --------------------------------------------------------------------------------------------------------------------
# Before the run


def preview(config: EncodeConfig, *, say: Callable[[str], object] = print) -> dict[str, Any]:
    """What a run would do: the plan, memory, and the time that a measured sample lets expect.

    Args:
        config: The settings.
        say: Told of what takes long.

    Raises:
        ValueError: As :func:`encode` does.
        EncodeError: As :func:`encode` does.
        OSError: As :func:`encode` does.
    """
    config.check()
    with only_run(config):
        known, plan = make_plan(config, say)
        done = count_done(config.work / DONE, plan) if known else 0
        with running_ray(config.address, config.num_actors, config.gpus_per_actor) as (num_actors, share):
            found = look(config, num_actors, share, sample_texts(plan, config.text_column), say)
    threads = num_threads(num_actors, config.address)
    texts = sum(part.num_rows for part in plan)
    rate = found["texts"] / found["seconds"]
    sizes = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}
    seconds = (texts - done) / (rate * num_actors)
    mib = 2**20
    return {
        "texts": texts,
        "of which are done": done,
        "parts": len(plan),
        "actors": f"{num_actors}, {share:g} GPUs and {threads or 'as Ray gives'} threads each",
        "fingerprint": found["facts"]["fingerprint"],
        "sample": f"{found['texts']} texts of {found['tokens'] / found['texts']:.0f} tokens on average",
        "texts/s, one actor": round(rate, 1),
        "tokens/s, one actor": round(found["tokens"] / found["seconds"]),
        "hours": round(seconds / 3600, 3),
        "MiB of weights, each actor": round(found["weights_bytes"] / mib),
        "MiB of memory, each actor": round(found["peak_bytes"] / mib),
        "MiB of vectors": round(texts * found["width"] * sizes[config.precision] / mib),
    }
