"""What can be said about training data before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from transformers.utils import logging

from ..modeling.gem_text import NOT_UNICODE, find_surrogate

logger = logging.get_logger(__name__)

LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""Names by which Sentence Transformers knows labels."""

NUM_SAMPLED = 1000
"""Rows that are looked at, from the start of a data set."""


def check_dataset(
    dataset: Any, kind: str, takes_labels: bool = False, needs_others: bool = True, reads_streams: bool = False
) -> list[dict[str, Any]]:
    """Raise if a training or evaluation set cannot be used, before the first step.

    Columns are checked where there is one data set; of several, another loss may use some. Rows of a stream are not
    read, as there may be no reading them again; :class:`StreamCheck` sees them when they are trained on.

    Args:
        dataset: A ``Dataset`` or ``IterableDataset``, a dict of them, or None.
        kind: ``"training"`` or ``"evaluation"``.
        takes_labels: Whether the loss takes a column of labels.
        needs_others: Whether a text is to be told from others, those of its own row apart.
        reads_streams: Whether a stream can be read from its start again.

    Returns:
        The rows looked at, none of a stream or a dict of data sets.

    Raises:
        ValueError: If it is empty, a column does not hold text, or there is nothing in it to be told apart.
    """
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if any(hasattr(part, "__len__") and len(part) == 0 for part in parts):
        raise ValueError(f"The {kind} set has no rows. Check how it was loaded, filtered or split.")
    if dataset is None or isinstance(dataset, dict):
        return []
    for column, feature in (getattr(dataset, "features", None) or {}).items():
        if not (takes_labels and column in LABEL_COLUMNS):
            _check_type(column, getattr(feature, "dtype", type(feature).__name__), kind)
    rows = sample_rows(dataset) if reads_streams or not is_stream(dataset) else []
    texts = {name: [row[name] for row in rows] for name in rows[0] if name not in LABEL_COLUMNS} if rows else {}
    for column, values in texts.items():
        check_values(column, values, kind)
    if not needs_others or kind != "training" or not texts or len(texts) > 2:
        return rows
    if len(rows) == 1:
        raise ValueError("The training set has one row, and nothing to tell it from. GemLoss needs two or more.")
    if all(len(set(values)) == 1 for values in texts.values()):
        raise ValueError(
            f"The first {len(rows)} rows of the training set are all the same, {next(iter(texts.values()))[0]!r:.60}: "
            "there is nothing to tell apart. Check how it was loaded."
        )
    return rows


def is_stream(dataset: Any) -> bool:
    """True for rows that come one after another, perhaps once only."""
    return not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


class StreamCheck:
    """What :func:`check_dataset` and :func:`warn_of_truncation` say, of the first rows of a stream as it is trained on.

    Args:
        gem: The module.
        needs_others: As :func:`check_dataset` takes it.
    """

    def __init__(self, gem: Any, needs_others: bool) -> None:
        self.gem = gem
        self.needs_others = needs_others
        self.num_rows = self.num_texts = self.num_full = 0
        self.rows: set[tuple[tuple[int, ...], ...]] = set()

    def see(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Count a batch, and judge once there are enough rows.

        Args:
            columns: Token ids of the texts of each column. Shape: ``(T_i,)`` each

        Raises:
            ValueError: If all rows are the same.
        """
        num_places = self.gem.max_seq_length - self.gem.num_gem_tokens
        texts = [text for column in columns for text in column]
        self.num_rows += len(columns[0])
        self.num_texts += len(texts)
        self.num_full += sum(len(text) >= num_places for text in texts)
        self.rows |= {tuple(tuple(text.tolist()) for text in row) for row in zip(*columns, strict=True)}
        if not self.is_over:
            return
        if self.num_full:
            logger.warning(
                f"{self.num_full / self.num_texts:.0%} of the first {self.num_texts} texts fill max_seq_length="
                f"{self.gem.max_seq_length} tokens, and were truncated if they are longer. Split them, or raise "
                "model.max_seq_length."
            )
        if self.needs_others and len(columns) <= 2 and len(self.rows) == 1:
            raise ValueError(
                f"The first {self.num_rows} rows of the stream are all the same, "
                f"{self.gem.tokenizer.decode(columns[0][0])!r:.60}: there is nothing to tell apart. Check how it was "
                "made."
            )

    @property
    def is_over(self) -> bool:
        """Whether enough rows were seen."""
        return self.num_rows >= NUM_SAMPLED // 10


def sample_rows(dataset: Any, num_rows: int = NUM_SAMPLED) -> list[dict[str, Any]]:
    """The first rows of a data set, streaming or not; of a streaming one a tenth as many."""
    if not is_stream(dataset):
        return [dataset[index] for index in range(min(num_rows, len(dataset)))]
    rows: Iterator[dict[str, Any]] = iter(dataset)
    return list(islice(rows, num_rows // 10))


def warn_of_truncation(gem: Any, rows: list[dict[str, Any]]) -> None:
    """Say how many texts are longer than a row, of those looked at."""
    texts = [value for row in rows for name, value in row.items() if name not in LABEL_COLUMNS]
    share = share_truncated(gem, texts)
    if share > 0:
        logger.warning(
            f"{share:.0%} of the first {len(texts)} texts are longer than max_seq_length={gem.max_seq_length} tokens, "
            "GEM tokens included, and are truncated. Split them, or raise model.max_seq_length."
        )


def share_truncated(gem: Any, texts: list[str]) -> float:
    """Share of texts that have more tokens than a row has places, in [0, 1]."""
    ids = gem.base.text.encode(texts)
    return sum(len(row) > gem.max_seq_length - gem.num_gem_tokens for row in ids) / max(1, len(ids))


def _check_type(column: str, dtype: str, kind: str) -> None:
    if dtype in ("string", "large_string"):
        return
    if column == "messages":
        raise ValueError(
            f"Column 'messages' of the {kind} set holds chat messages. Make columns `prompt` and `answer` of it: "
            'dataset.map(gem_st.losses.rows.split_messages, fn_kwargs={"tokenizer": model.tokenizer}, '
            "remove_columns=dataset.column_names)."
        )
    raise ValueError(
        f"Column {column!r} of the {kind} set holds {dtype}, but GemLoss trains on columns of text. Drop it "
        f"with dataset.remove_columns({column!r}); filter pairs by a label or score first, if you have one, or give "
        "GemLoss a loss that takes it as `loss`."
    )


def check_values(column: str, values: list[Any], kind: str) -> None:
    """Raise if one of the values of a column is no text, or none of them has any."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"Row {index} of column {column!r} of the {kind} set is {value!r:.60} ({type(value).__name__}), not "
                "text. Drop such rows with dataset.filter(...)."
            )
        if (place := find_surrogate(value)) is not None:
            raise ValueError(
                f"Row {index} of column {column!r} of the {kind} set has {value[place]!r} at {place}, {NOT_UNICODE}"
            )
    if not any(value.strip() for value in values):
        raise ValueError(f"Column {column!r} of the {kind} set is empty in its first {len(values)} rows. Drop it.")
