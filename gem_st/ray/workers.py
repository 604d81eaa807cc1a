"""What runs in Ray's workers. Torch is imported there, and not by the command, which needs none."""

from __future__ import annotations

import io
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from ..files import write_text
from .config import WARNINGS
from .errors import EncodeError
from .parts import PART, Part, read_part
from .settling import settle

if TYPE_CHECKING:
    from .encoder import Encoder


class PartEncoder:
    """An Encoder of parts, loaded with the first one, so that what is wrong with it is an error of that task.

    Args:
        names: Columns to read.
        output: Folder of the run.
        note: See :func:`gem_st.ray.settling.settle`.
        **options: Of :class:`gem_st.ray.Encoder`, but for the ranges, which the note has.
    """

    def __init__(self, names: list[str], output: str, note: dict[str, Any], **options: Any) -> None:
        from . import encoder  # noqa: F401  # torch and the others, while Ray Data gets ready

        self.names, self.output, self.note, self.options = names, output, note, options
        self.encoder: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and embed a part, given as a table of one row."""
        if self.encoder is None:
            self.encoder = self._load()
        part = Part(**batch.to_pylist()[0])
        try:
            result = self.encoder(read_part(part, self.names), f"{part.part}.jsonl")
        except EncodeError as error:
            raise EncodeError(f"Part {part.part}: {error}") from error
        return result.append_column(PART, pa.array([part.part] * len(result), pa.int64()))

    def _load(self) -> Encoder:
        if not Path(self.output).is_dir():
            raise EncodeError(f"{self.output} is not there on {platform.node()}: all machines must see --output.")
        try:
            encoder, facts, warnings = load({**self.options, "ranges": self.note["ranges"]})
        except (ValueError, OSError, ImportError) as error:
            raise EncodeError(" ".join(str(error).split())) from error
        if warnings:
            folder = Path(self.output) / "work" / WARNINGS
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{uuid4().hex}.txt", warnings)
        settle(self.output, self.note, facts)
        return encoder


def load(options: dict[str, Any]) -> tuple[Encoder, dict[str, Any], str]:
    """An Encoder, what is to be noted of it, and what loading warned of."""
    from ..training.measures import describe_versions
    from .encoder import Encoder

    with collected_warnings() as warnings:
        encoder = Encoder(**options)
    facts = {"fingerprint": encoder.fingerprint, "versions": describe_versions("ray", "pyarrow")}
    return encoder, facts, warnings.getvalue()


@contextmanager
def collected_warnings() -> Iterator[io.StringIO]:
    """What is logged as a warning or worse, by us, Sentence Transformers or transformers: workers are not heard."""
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    handler.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("gem_st", "sentence_transformers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield told
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def look_at(options: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Load a checkpoint where the actors will; what is noted of it, ranges for int8, and what a sample costs."""
    import resource

    encoder, facts, warnings = load({**options, "precision": "float32"})
    facts["fingerprint"]["precision"] = options["precision"]
    found: dict[str, Any] = {"facts": facts, "warnings": warnings}
    if texts:
        lengths = encoder.count_tokens(texts)
        encoder.embed(texts[:8])
        start = time.perf_counter()
        vectors = encoder.embed(texts, lengths)
        if not np.isfinite(vectors).all():
            raise EncodeError(f"Vectors of a sample of {len(texts)} texts are not all finite. Choose another dtype.")
        found |= {"seconds": time.perf_counter() - start, "tokens": sum(lengths), "texts": len(texts)}
        found["ranges"] = [vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]
        found["width"] = vectors.shape[1]
    weights = sum(value.numel() * value.element_size() for value in encoder.model.state_dict().values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "weights_bytes": weights, "peak_bytes": peak}
