"""Embeddings: texts of many requests in batches of so many tokens, and the answers to `/v1/embeddings`."""

from __future__ import annotations

import base64
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .bodies import EmbeddingBody
from .errors import RequestError


class Kind(NamedTuple):
    """What texts must have in common to be embedded together.

    Attributes:
        form: ``"text"``, ``"ids"`` or ``"conversation"``; of the last each is a batch of its own.
        prompt: Put before every text.
        task: ``"query"``, ``"document"`` or None, as Sentence Transformers hands it to modules.
    """

    form: str
    prompt: str | None = None
    task: str | None = None


@dataclass
class Job:
    """The rows of one request.

    Attributes:
        rows: Texts or token ids.
        lengths: Tokens of each.
        deliver: Called once, in the inference thread, with this job when all vectors are there or it failed.
        vectors: One for each row. Shape: ``(D,)`` each
        num_reused: Tokens that were not read again; None where nothing was looked up.
    """

    kind: Kind
    rows: Sequence[Any]
    lengths: list[int]
    deliver: Callable[[Job], None]
    vectors: list[Any] = field(default_factory=list)
    num_reused: int | None = None
    error: Exception | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.vectors = [None] * len(self.rows)
        self.num_missing = len(self.rows)


class Batch(NamedTuple):
    """Rows that are embedded together, as ``(job, index of the row)``."""

    kind: Kind
    items: list[tuple[Job, int]]


class Pace:
    """How long batches take, by how many tokens they have: a line through what was seen, recent batches above all."""

    def __init__(self) -> None:
        self._seen = np.zeros(5)

    def note(self, num_tokens: int, seconds: float) -> None:
        """Note a batch."""
        self._seen = 0.9 * self._seen + (1, num_tokens, seconds, num_tokens**2, num_tokens * seconds)

    def line(self) -> tuple[float, float]:
        """Seconds that any batch takes, and those of a token; both 0 while nothing is known."""
        count, tokens, seconds, squares, products = self._seen
        if not tokens:
            return 0.0, 0.0
        tokens, seconds = tokens / count, seconds / count
        spread = squares / count - tokens**2
        # Batches of one size do not tell the two apart.
        slope = (products / count - tokens * seconds) / spread if spread > 0.01 * tokens**2 else math.inf
        slope = float(np.clip(slope, 1e-3 * seconds / tokens, seconds / tokens))
        return seconds - slope * tokens, slope

    def fitting(self, seconds: float, first: int) -> float:
        """Tokens that fit into the time, or into twice that of the first row, which is let in anyway."""
        fixed, slope = self.line()
        return (max(seconds, 2 * (fixed + slope * first)) - fixed) / slope if slope else FIRST_TOKENS


FIRST_TOKENS = 256.0
"""Tokens of a batch that is awaited, before any was seen."""


class EmbeddingQueue:
    """Rows that wait, and the work of the inference thread on them.

    Any thread may put jobs in. Kinds take turns, so that none waits for another to be empty.

    Args:
        embed: Gives the vectors of a batch of rows. Shape: ``(B, D)``
        batch_tokens: Tokens of a batch; a longer row is a batch of its own.
    """

    def __init__(self, embed: Callable[[Kind, list[Any], list[Job]], Any], batch_tokens: int) -> None:
        self.embed = embed
        self.batch_tokens = batch_tokens
        self.pace = Pace()
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Kind, deque[tuple[Job, int]]] = OrderedDict()

    def put(self, job: Job) -> None:
        """Have a job wait for its turn."""
        with self._lock:
            self._waiting.setdefault(job.kind, deque()).extend((job, index) for index in range(len(job.rows)))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, seconds: float | None = None) -> Batch | None:
        """The rows that are next, as many as fit into the time, if there is one; None if there are none."""
        with self._lock:
            while self._waiting:
                kind = next(iter(self._waiting))
                items = self._take_of(self._waiting[kind], seconds, is_alone=kind.form == "conversation")
                self._waiting.move_to_end(kind)
                if not self._waiting[kind]:
                    del self._waiting[kind]
                if items:
                    return Batch(kind, items)
        return None

    def _take_of(self, rows: deque[tuple[Job, int]], seconds: float | None, is_alone: bool) -> list[tuple[Job, int]]:
        items: list[tuple[Job, int]] = []
        num_tokens, most = 0, float(self.batch_tokens)
        while rows:
            job, index = rows[0]
            if not (job.is_cancelled or job.error):
                num_tokens += job.lengths[index]
                if items and (is_alone or num_tokens > most):
                    break
                if not items and seconds is not None:
                    most = min(most, self.pace.fitting(seconds, num_tokens))
                items.append((job, index))
            rows.popleft()
        return items

    def run(self, seconds: float, *, is_awaited: bool = False) -> None:
        """Embed batches until none waits or the time is over; one at least.

        Args:
            seconds: The time.
            is_awaited: True where something else waits for the end of it: batches are then as large as will fit into
                what is left of the time, by how long those before took, see :meth:`Pace.fitting`.
        """
        end = time.monotonic() + seconds
        left = seconds
        while (batch := self.take(left if is_awaited else None)) is not None:
            start = time.monotonic()
            self._run(batch)
            now = time.monotonic()
            self.pace.note(sum(job.lengths[index] for job, index in batch.items), now - start)
            left = end - now
            if left <= 0:
                break

    def _run(self, batch: Batch) -> None:
        """Embed one batch; where that fails, the rows of each job alone, so that no request fails for another's."""
        try:
            self._fill(batch)
        except Exception as error:
            jobs = {id(job): job for job, _ in batch.items}
            if len(jobs) == 1:
                job = batch.items[0][0]
                job.error = error
                job.deliver(job)
                return
            for job in jobs.values():
                self._run(Batch(batch.kind, [item for item in batch.items if item[0] is job]))

    def _fill(self, batch: Batch) -> None:
        """Put vectors where they belong, and deliver jobs that have all of theirs."""
        vectors = self.embed(
            batch.kind, [job.rows[index] for job, index in batch.items], [job for job, _ in batch.items]
        )
        for (job, index), vector in zip(batch.items, vectors, strict=True):
            job.vectors[index] = vector
            job.num_missing -= 1
            if not job.num_missing:
                job.deliver(job)


def check_dimensions(dimensions: int | None, width: int, *, allow_truncate: bool) -> None:
    """Refuse vectors of another width than the model's.

    Raises:
        RequestError: 400, if they are wider, or truncating was not allowed when the server was started.
    """
    if dimensions is None or dimensions == width:
        return
    if dimensions > width:
        raise RequestError(400, f"dimensions is {dimensions}, but the vectors have {width}.", param="dimensions")
    if not allow_truncate:
        raise RequestError(
            400,
            f"The model was not trained to have its vectors of {width} dimensions truncated to {dimensions}. Leave "
            "dimensions out, or start the server with --allow-truncate if it was.",
            param="dimensions",
        )


def truncate(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first elements of each vector, of length 1 again. Shapes: ``(B, D)`` -> ``(B, dimensions)``"""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    short = vectors[:, :dimensions]
    return short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)


def render(body: EmbeddingBody, name: str, vectors: np.ndarray, num_tokens: int) -> dict[str, Any]:
    """The answer, as OpenAI has it; base64 is of 32-bit floats, the least significant byte first."""
    rows = truncate(vectors, body.dimensions).astype("<f4")
    is_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if is_text else row.tolist(),
        }
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}
