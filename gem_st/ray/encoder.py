"""Encoder: a class for `map_batches` of Ray Data, which loads a checkpoint once and embeds tables."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from ..files import read_json, write_text
from ..finding import find_gem
from ..hub.layout import REFERENCE_FILES
from ..hub.loading import fetch, load_any
from .config import BATCH_TOKENS, EMPTY, NULL, TOO_LONG, check_options
from .errors import EncodeError
from .fingerprint import describe_dtypes, describe_model, document_prompt
from .parts import VECTOR, is_text

logger = logging.getLogger(__name__)

OTHER_DTYPE = 0.25
"""Relative error allowed of reference vectors in another data type than theirs; those of another model have 1."""


class Encoder:
    """Embeds the texts of a table; made to be given to `map_batches` as a class, so that each actor loads it once.

    ``dataset.map_batches(Encoder, fn_constructor_kwargs={"checkpoint": "org/gem"}, batch_format="pyarrow",
    batch_size=4096, compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1)``

    Vectors are those of ``model.encode_document``, or of ``model.encode(prompt_name=...)``. Texts of like length go
    through the model together, as many as have ``batch_tokens`` tokens, padding included; equal texts of a table go
    once. In their last bits vectors depend on what they are batched with, which is the table alone.

    Args:
        checkpoint: Folder or Hub id, of a GEM model or any other SentenceTransformer.
        text_column: Column of the texts.
        id_column: Column that says which text is which.
        columns: Others to be kept.
        prompt_name: Name of a prompt of the model; by default that of documents, if there is one.
        precision: ``"float32"``, ``"float16"``, ``"int8"`` or ``"binary"`` (bits, packed by eight).
        truncate_dim: Keep so many elements of each vector.
        ranges: Least and largest value of each element, which int8 needs. Shape: ``(2, D)``
        batch_tokens: Tokens of a batch; a longer text is a batch of its own.
        report: Folder for what is to be known of texts: which have no vector, and which were cut.
        num_threads: Threads of torch; by default those that it has.
        dtype: Data type to load in.
        device: Where to run; by default an accelerator if there is one.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        trust_remote_code: Run code of the checkpoint that is not this gem_st's.

    Raises:
        EncodeError: If the checkpoint does not give its reference vectors.
        ValueError: If an option is none of these, or the checkpoint's code is not trusted.
        OSError: If the checkpoint cannot be reached.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        text_column: str = "text",
        id_column: str = "id",
        columns: Sequence[str] = (),
        prompt_name: str | None = None,
        precision: str = "float32",
        truncate_dim: int | None = None,
        ranges: Any = None,
        batch_tokens: int = BATCH_TOKENS,
        report: str | None = None,
        num_threads: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_options(precision, batch_tokens, truncate_dim)
        if precision == "int8" and ranges is None:
            raise ValueError("precision='int8' needs ranges=, the least and largest value of each element.")
        self.text_column, self.id_column = text_column, id_column
        self.columns = [name for name in dict.fromkeys(columns) if name != id_column]
        self.prompt_name, self.precision, self.truncate_dim = prompt_name, precision, truncate_dim
        self.ranges = None if ranges is None else np.asarray(ranges, dtype=np.float32)
        self.batch_tokens, self.report = batch_tokens, report
        if num_threads:
            torch.set_num_threads(num_threads)
        hub_kwargs: dict[str, Any] = {"revision": revision, "token": token}
        options: dict[str, Any] = {"device": device, "model_kwargs": {"dtype": dtype}, **hub_kwargs}
        self.model = load_any(checkpoint, trust_remote_code=trust_remote_code, **options)
        self.prompt = document_prompt(self.model, prompt_name)
        check_reference(self.model, checkpoint, **hub_kwargs)
        self.fingerprint = describe_model(
            self.model, prompt_name=prompt_name, precision=precision, truncate_dim=truncate_dim
        )

    def __call__(self, batch: Any, report_name: str | None = None) -> pa.Table:
        """Embed the texts of a table.

        Args:
            batch: A table, or arrays by column.
            report_name: File of the report, which is written anew; by default one that its content names.

        Returns:
            Ids, columns that were asked for, and ``vector``, a fixed-size list; without texts that are null or blank.

        Raises:
            EncodeError: If a column is missing, holds no text, or a vector is not finite.
        """
        table = batch if isinstance(batch, pa.Table) else pa.table(dict(batch))
        texts: list[Any] = self._texts_of(table)
        kept = [row for row, text in enumerate(texts) if text and text.strip()]
        unique: list[str] = list(dict.fromkeys(texts[row] for row in kept))
        lengths = self.count_tokens(unique)
        whole, place = self._embed(unique, lengths), {text: row for row, text in enumerate(unique)}
        vectors = convert(whole, self.precision, self.ranges)
        rows = [place[texts[row]] for row in kept]
        ids = table[self.id_column]
        # Of both: in 8 bits and in one nothing shows, and in 16 what is large becomes infinite.
        is_finite = np.isfinite(whole).all(axis=1) & np.isfinite(vectors).all(axis=1)
        if not is_finite.all():
            bad = [ids[row].as_py() for row, found in zip(kept, rows, strict=True) if not is_finite[found]]
            raise EncodeError(f"Vectors of {len(bad)} texts are not finite in {self.precision}, ids {bad[:5]}.")
        self._write_report(ids, texts, dict(zip(kept, (lengths[row] for row in rows), strict=True)), report_name)
        result = table.select([self.id_column, *self.columns]).take(pa.array(kept, pa.int64()))
        return result.append_column(VECTOR, as_lists(vectors[rows]))

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens that each text would have if nothing was cut, with prompt, special and GEM tokens."""
        gem = find_gem(self.model)
        if not texts:
            return []
        if gem is not None:
            return [len(row) + gem.num_gem_tokens for row in gem.base.text.encode(texts, self.prompt)]
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        if not callable(tokenizer):  # of a model of words, which has no length
            return [1 + len(text) // 4 for text in texts]
        return [len(row) for row in tokenizer([self.prompt + text for text in texts], verbose=False)["input_ids"]]

    def embed(self, texts: list[str], lengths: list[int] | None = None) -> np.ndarray:
        """Vectors of texts in the precision asked for. Shape: ``(N, D)``, or ``(N, D / 8)`` for bits"""
        lengths = self.count_tokens(texts) if lengths is None else lengths
        return convert(self._embed(texts, lengths), self.precision, self.ranges)

    @property
    def num_places(self) -> float:
        """Tokens that are read of a text."""
        own = getattr(self.model[0], "document_length", None) if self.prompt_name is None else None
        return own or self.model.max_seq_length or float("inf")

    def _embed(self, texts: list[str], lengths: list[int]) -> np.ndarray:
        """Vectors of texts as the model gives them. Shape: ``(N, D)``"""
        parts, order, most = [], [], self.num_places
        for batch in token_batches([int(min(length, most)) for length in lengths], self.batch_tokens):
            parts.append(self._encode([texts[row] for row in batch]))
            order += batch
        if not parts:
            return np.zeros((0, self.fingerprint["dimension"]), np.float32)
        vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(parts)
        return vectors

    def _encode(self, texts: list[str]) -> np.ndarray:
        options: dict[str, Any] = {"batch_size": len(texts), "show_progress_bar": False}
        options["truncate_dim"] = self.truncate_dim
        if self.prompt_name is None:
            return self.model.encode_document(texts, **options)
        return self.model.encode(texts, prompt_name=self.prompt_name, **options)

    def _texts_of(self, table: pa.Table) -> list[str | None]:
        wanted = [self.id_column, self.text_column, *self.columns]
        if missing := [name for name in wanted if name not in table.column_names]:
            raise EncodeError(f"There is no column {missing[0]!r}. There are: {table.column_names}.")
        column = table[self.text_column]
        if not is_text(column.type):
            raise EncodeError(f"Column {self.text_column!r} holds {column.type}, and not text.")
        return column.to_pylist()

    def _write_report(self, ids: Any, texts: list[str | None], lengths: dict[int, int], name: str | None) -> None:
        """Write a line for each text that is not embedded as it is; the same table gives the same file."""
        if self.report is None:
            return
        most, lines = self.num_places, []
        for row, text in enumerate(texts):
            if row not in lengths:
                lines.append({"id": ids[row].as_py(), "reason": NULL if text is None else EMPTY})
            elif lengths[row] > most:
                found = {"tokens": lengths[row], "read": most}
                lines.append({"id": ids[row].as_py(), "reason": TOO_LONG, **found})
        content = "".join(f"{json.dumps(line, ensure_ascii=False, default=str)}\n" for line in lines)
        path = Path(self.report) / (name or f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.jsonl")
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, content)
        else:
            path.unlink(missing_ok=True)


@torch.inference_mode()
def check_reference(model: SentenceTransformer, checkpoint: str, **hub_kwargs: Any) -> None:
    """Compare with the vectors that `gem-st export` and `push` store in a checkpoint; a checkpoint may have none.

    Raises:
        EncodeError: If they are not given.
    """
    paths = [fetch(checkpoint, name, hub_kwargs["revision"], hub_kwargs["token"]) for name in REFERENCE_FILES]
    if paths[0] is None or paths[1] is None:
        logger.warning("%s has no reference vectors, so that a wrong one would not be noticed here.", checkpoint)
        return
    reference, expected = read_json(paths[0]), load_file(str(paths[1]))["embeddings"]
    found: Any = model.encode(reference["texts"], convert_to_tensor=True, show_progress_bar=False, truncate_dim=None)
    found, kind = found.float().cpu(), describe_dtypes(model)
    error = float("inf")
    if found.shape == expected.shape:
        error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)).max())
    allowed = OTHER_DTYPE
    if set(kind.split(", ")) - {reference["dtype"]} <= {"float32"} and reference["dtype"] in kind:
        allowed = 1e-3 if kind == "float32" else 0.05
    if not error <= allowed:
        raise EncodeError(
            f"{checkpoint} does not give its reference vectors in {kind}: relative error {error:.1e}, {allowed:g} "
            f"allowed. See `gem-st verify {checkpoint}`."
        )


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows that are run together, the longest first: rows times their longest are at most ``batch_tokens``.

    Args:
        lengths: Tokens of each row.
        batch_tokens: The most tokens of a batch, padding included; a longer row is a batch of its own.

    Returns:
        Indices of each batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches


def convert(vectors: np.ndarray, precision: str, ranges: np.ndarray | None) -> np.ndarray:
    """Vectors in another precision. Shapes: ``(N, D)`` -> ``(N, D)``, or ``(N, D / 8)`` for bits"""
    if precision == "float32":
        return vectors
    if precision == "float16":
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return vectors.astype(np.float16)
    if not len(vectors):
        return np.zeros((0, -(-vectors.shape[1] // 8) if precision == "binary" else vectors.shape[1]), np.int8)
    kind: Any = precision
    with np.errstate(invalid="ignore"):  # what is not finite is refused
        quantized = quantize_embeddings(inside(vectors, ranges), precision=kind, ranges=ranges)
        return np.asarray(quantized, dtype=np.int8)


def inside(vectors: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
    """Vectors brought into ranges, since what is outside would come out at the other end of int8."""
    return vectors if ranges is None else np.clip(vectors, ranges[0], ranges[1])


def as_lists(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """A column of fixed-size lists. Shape: ``(N, D)``"""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
