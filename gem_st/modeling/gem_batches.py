"""Which rows are continued together, and what is told of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

BATCH_SIZE = 32
"""Rows that are run together, unless asked otherwise."""


def check_batch_size(batch_size: int) -> None:
    """Raise if it is no number of rows."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of 1 or more, got {batch_size!r}.")


def slices(num_rows: int, batch_size: int) -> Iterator[slice]:
    """Rows in their order, so many at a time."""
    check_batch_size(batch_size)
    return (slice(start, start + batch_size) for start in range(0, num_rows, batch_size))


def split_rows(lengths: Sequence[int], batch_size: int, stopped: Collection[int] = ()) -> list[list[int]]:
    """Indices of rows that are continued together: in their order if all are, otherwise those of like length.

    Args:
        lengths: Tokens in each row.
        batch_size: Rows in a batch, at most.
        stopped: Lengths from which the model's positions run out. Such rows are only with those of the same length,
            so that all stop at once.
    """
    groups: dict[int | None, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length if length in stopped else None, []).append(row)
    batches = []
    for rows in groups.values():
        if len(rows) > batch_size:
            rows.sort(key=lengths.__getitem__, reverse=True)
        batches += [sorted(rows[part]) for part in slices(len(rows), batch_size)]
    return batches


def options_of_rows(generate_kwargs: dict[str, Any], rows: list[int], num_rows: int) -> dict[str, Any]:
    """Options of `generate` for some of the rows: those that hold something for each, or are told a row's number."""
    options = dict(generate_kwargs)
    for name, value in generate_kwargs.items():
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == num_rows:
            options[name] = value[rows]
    if allowed := generate_kwargs.get("prefix_allowed_tokens_fn"):
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return options


def order_of(batches: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Where the results of each row are, if batches gave so many one after another; in the order of the rows."""
    places = []
    for batch, size in zip(batches, sizes, strict=True):
        num_each = size // max(1, len(batch))
        places += [(row, number) for row in batch for number in range(num_each)]
    return sorted(range(len(places)), key=places.__getitem__)
