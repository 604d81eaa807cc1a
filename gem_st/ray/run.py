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
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import read_json, write_json
from ..training.measures import describe_versions
from .cluster import num_threads, plain_errors, running_ray
from .encoder import BATCH_TOKENS, EMPTY, NULL, EncodeError, Encoder, check_options
from .fingerprint import describe_model, refuse_other
from .parts import (
    PART,
    Columns,
    Part,
    Source,
    extend_plan,
    find_files,
    find_repeated,
    make_parts,
    read_ids,
    read_part,
    read_plan,
    spread,
    types_of,
    write_plan,
)

ROWS_PER_PART = 2048
FILTER_BYTES = 2**28
SAMPLE_PARTS, SAMPLE_TEXTS = 8, 256
VECTORS, LANCE, REPORT, FINGERPRINT = "vectors", "vectors.lance", "report.jsonl", "fingerprint.json"


@dataclass
class EncodeConfig:
    """Settings of a run.

    Attributes:
        checkpoint: Folder or Hub id of a model.
        data: A parquet, jsonl or csv file, a folder of such files, or the Hub id of a data set.
        output: Folder of the vectors, which every machine must see.
        subset: Configuration of a data set of the Hub that has several.
        split: Split of a data set.
        columns: Columns to keep beside id and vector.
        format: ``"parquet"``, or ``"lance"`` for a Lance data set beside it.
        rows_per_part: Texts that are read, embedded and written as one.
        limit: Texts to embed, from the first.
        num_actors: Copies of the model; by default one for each GPU; without any, one for four CPUs of this machine,
            or for each CPU of a cluster but three.
        gpus_per_actor: By default 1 where there are GPUs.
        address: Of a cluster; by default Ray is started here, and ends with the run.
        token: Hub token.

    The others are those of :class:`gem_st.ray.Encoder`.
    """

    checkpoint: str
    data: str
    output: Path
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    id_column: str = "id"
    columns: tuple[str, ...] = ()
    prompt_name: str | None = None
    precision: str = "float32"
    truncate_dim: int | None = None
    batch_tokens: int = BATCH_TOKENS
    format: str = "parquet"
    rows_per_part: int = ROWS_PER_PART
    limit: int | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None
    address: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise ValueError or ImportError if something is out of range or not installed."""
        check_options(self.precision, self.batch_tokens, self.truncate_dim)
        if self.format not in ("parquet", "lance"):
            raise ValueError(f"format must be 'parquet' or 'lance', got {self.format!r}.")
        for name in ("rows_per_part", "limit", "num_actors"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if find_spec("ray") is None:
            raise ImportError("ray is not installed: pip install 'gem-st[ray]'")
        if self.has_lance and find_spec("lance") is None:
            raise ImportError("A Lance data set needs the package pylance: pip install 'gem-st[lance]'")
        if named := [name for name in self.output.resolve().parts if "=" in name]:
            raise ValueError(
                f"Readers of parquet take a folder {named[0]!r} for a column and its value. Choose another --output."
            )

    @property
    def has_lance(self) -> bool:
        """True if there is to be a Lance data set, or is one, which would be without the new rows."""
        return self.format == "lance" or (self.output / LANCE).exists()

    @property
    def place(self) -> str:
        """The checkpoint, under the name that other machines and folders know it by."""
        return str(Path(self.checkpoint).resolve()) if Path(self.checkpoint).is_dir() else str(self.checkpoint)

    @property
    def names(self) -> Columns:
        """The columns that are read."""
        return Columns(self.text_column, self.id_column, self.columns)

    @property
    def work(self) -> Path:
        """Folder of what a run needs to go on: the plan, Ray's checkpoint, copies of data."""
        return self.output / "work"

    def encoder_options(self) -> dict[str, Any]:
        """Arguments of :class:`Encoder`."""
        same = ["text_column", "id_column", "columns", "prompt_name", "precision", "truncate_dim", "batch_tokens"]
        same += ["dtype", "revision", "token", "trust_remote_code"]
        return {"checkpoint": self.place, **{name: getattr(self, name) for name in same}}


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


class PartEncoder:
    """An Encoder of parts, loaded with the first one, so that what is wrong with it is an error of that task."""

    def __init__(self, names: list[str], **options: Any) -> None:
        self.names, self.options = names, options
        self.encoder: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and embed a part, given as a table of one row."""
        if self.encoder is None:
            self.encoder = Encoder(**self.options)
        part = Part(**batch.to_pylist()[0])
        try:
            result = self.encoder(read_part(part, self.names), f"{part.part}.jsonl")
        except EncodeError as error:
            raise EncodeError(f"Part {part.part}: {error}") from error
        return result.append_column(PART, pa.array([part.part] * len(result), pa.int64()))


def look_at(options: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Load a checkpoint where the actors will; its fingerprint, ranges for int8, and what a sample costs."""
    import resource

    encoder = Encoder(**{**options, "precision": "float32"})
    names = ("prompt_name", "precision", "truncate_dim")
    facts: dict[str, Any] = {"fingerprint": describe_model(encoder.model, **{name: options[name] for name in names})}
    if texts:
        lengths = encoder.count_tokens(texts)
        encoder.embed(texts[:8])
        start = time.perf_counter()
        vectors = encoder.embed(texts, lengths)
        if not np.isfinite(vectors).all():
            raise EncodeError(f"Vectors of a sample of {len(texts)} texts are not all finite. Choose another dtype.")
        facts |= {"seconds": time.perf_counter() - start, "tokens": sum(lengths), "texts": len(texts)}
        facts["ranges"] = [vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]
        facts["width"] = vectors.shape[1]
    weights = sum(value.numel() * value.element_size() for value in encoder.model.state_dict().values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**facts, "weights_bytes": weights, "peak_bytes": peak}


def look(config: EncodeConfig, share: float, threads: int | None, texts: list[str]) -> dict[str, Any]:
    """:func:`look_at`; in a worker where there are GPUs or other machines."""
    import ray

    options = {**config.encoder_options(), "num_threads": threads}
    if not share and config.address is None:
        return look_at(options, texts)
    with plain_errors():
        return ray.get(ray.remote(look_at).options(num_gpus=share, max_retries=0).remote(options, texts))


# --------------------------------------------------------------------------------------------------------------------
# The run


def make_plan(config: EncodeConfig, say: Callable[[str], object]) -> tuple[list[Part], list[Part]]:
    """Parts that the output is planned with already, and those with what there is now."""
    known, vectors = read_plan(config.work / "plan.parquet"), config.output / VECTORS
    if not known and vectors.is_dir() and any(vectors.iterdir()):
        raise ValueError(
            f"{vectors} has files, but nothing says of which texts: {config.work / 'plan.parquet'} is gone. Choose "
            "another --output."
        )
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
    with only_run(config):
        known, plan = make_plan(config, say)
        with running_ray(config.address, config.num_actors, config.gpus_per_actor) as (num_actors, share):
            threads = num_threads(num_actors, config.address)
            ranges = _settle(config, plan, share, threads)
            if len(plan) > len(known):
                write_plan(config.work / "plan.parquet", plan)
            options = {**config.encoder_options(), "ranges": ranges, "num_threads": threads}
            options["expected"] = read_json(config.output / FINGERPRINT)["fingerprint"]
            options["report"] = str((config.work / "reports").resolve())
            start, before = time.monotonic(), count_done(config.work / "done", plan)
            left = len(plan) - len(done_parts(config.work / "done"))
            with plain_errors(), progress_of(config, plan, shows_progress):
                if left:
                    write_parts(config, options, min(num_actors, left), share)
        return _finish(config, plan, before, time.monotonic() - start)


def _settle(config: EncodeConfig, plan: list[Part], share: float, threads: int | None) -> Any:
    """Compare with the fingerprint beside the vectors, or write it; returns ranges for int8."""
    path = config.output / FINGERPRINT
    noted = read_json(path) if path.exists() else None
    vectors = config.output / VECTORS
    if noted is None and vectors.is_dir() and any(vectors.iterdir()):
        raise ValueError(f"{vectors} has files, but no {FINGERPRINT} says what they are. Choose another --output.")
    calibrates = config.precision == "int8" and noted is None
    facts = look(config, share, threads, sample_texts(plan, config.text_column, 1024) if calibrates else [])
    columns: dict[str, Any] = {"text": config.text_column, "id": config.id_column, "others": list(config.columns)}
    columns["types"] = types_of(Path(plan[-1].file), config.names)
    settings = {**facts["fingerprint"], "columns": columns}
    if noted is not None:
        refuse_other(
            config.checkpoint, str(config.output), {**noted["fingerprint"], "columns": noted["columns"]}, settings
        )
        return noted["ranges"]
    source = {"checkpoint": config.place, "revision": config.revision, "dtype": config.dtype}
    options = {"prompt_name": config.prompt_name, "truncate_dim": config.truncate_dim}
    ranges = facts["ranges"] if calibrates else None
    found = {"fingerprint": facts["fingerprint"], "columns": columns, **source, **options, "ranges": ranges}
    write_json(path, {**found, "versions": describe_versions("ray", "pyarrow")})
    return ranges


def write_parts(config: EncodeConfig, options: dict[str, Any], num_actors: int, share: float) -> None:
    """The pipeline: plan, checkpoint, actors, files."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    from .unique import UniquePartManager

    checkpoint = CheckpointConfig(
        id_column=PART,
        checkpoint_path=str((config.work / "done").resolve()),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=UniquePartManager,
    )
    checkpoint.checkpoint_actor_memory_bytes = FILTER_BYTES
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a part is one block: cut in two, one half could be taken for the whole
    context.checkpoint_config = checkpoint
    context.issue_detectors_config.detectors = []  # which tell of memory that is not short
    with ray.data.DataContext.current(context):
        rows = ray.data.read_parquet(str((config.work / "plan.parquet").resolve()))
        rows.repartition(target_num_rows_per_block=1).map_batches(
            PartEncoder,
            fn_constructor_kwargs={"names": config.names.all, **options},
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
def progress_of(config: EncodeConfig, plan: list[Part], is_shown: bool) -> Iterator[None]:
    """A bar that follows the checkpoint, which is what a restart would find."""
    done, over, seen = config.work / "done", Event(), dict[str, set[int]]()
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
    reasons = join_reports(config.work / "reports", config.output / REPORT)
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
        _, plan = make_plan(config, say)
        done = count_done(config.work / "done", plan)
        with running_ray(config.address, config.num_actors, config.gpus_per_actor) as (num_actors, share):
            threads = num_threads(num_actors, config.address)
            facts = look(config, share, threads, sample_texts(plan, config.text_column))
    texts = sum(part.num_rows for part in plan)
    rate = facts["texts"] / facts["seconds"]
    sizes = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}
    seconds = (texts - done) / (rate * num_actors)
    mib = 2**20
    return {
        "texts": texts,
        "of which are done": done,
        "parts": len(plan),
        "actors": f"{num_actors}, {share:g} GPUs and {threads or 'as Ray gives'} threads each",
        "fingerprint": facts["fingerprint"],
        "sample": f"{facts['texts']} texts of {facts['tokens'] / facts['texts']:.0f} tokens on average",
        "texts/s, one actor": round(rate, 1),
        "tokens/s, one actor": round(facts["tokens"] / facts["seconds"]),
        "hours": round(seconds / 3600, 3),
        "MiB of weights, each actor": round(facts["weights_bytes"] / mib),
        "MiB of memory, each actor": round(facts["peak_bytes"] / mib),
        "MiB of vectors": round(texts * facts["width"] * sizes[config.precision] / mib),
    }
