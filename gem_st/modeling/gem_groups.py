"""Which rows go through the backbone together, and which share one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.util import get_world_size
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .gem_mask import Rows

GROUP_COST = {"cpu": 128}
"""Padding tokens worth one more pass through the backbone, by device type; 2,048 on accelerators."""

STAGE_TOKENS = 8192
"""Places of keys and values, padding included, behind which GEM tokens are put in one go."""


def run_groups(run: Callable[[Rows], Tensor], rows: Rows, groups: list[Tensor]) -> Tensor:
    """Run some of the rows at a time, each group cut to its longest row, which comes first.

    Args:
        run: Rows to hidden states. Shapes: ``(B', T')`` -> ``(B', T', D)``
        rows: All of them.
        groups: Indices of each group's rows. Shapes: ``(B',)``

    Returns:
        Hidden states, zeros where a group has no place. Shape: ``(B, T, D)``
    """
    if len(groups) <= 1:
        return run(rows)
    lengths = rows.lengths
    states: Tensor | None = None
    for index in groups:
        width = int(lengths[index[0]])
        part = run(rows.take(index, width))
        if states is None:
            states = part.new_zeros((*rows.input_ids.shape, part.shape[-1]))
        states[index, :width] = part
    assert states is not None  # there are two groups or more
    return states


def length_groups(lengths: Tensor) -> list[Tensor]:
    """Rows that go through the backbone together.

    Sharded training (FSDP, DeepSpeed) needs as many passes on every process, hence one group there.
    Shapes: ``(B,)`` -> ``(B_i,)``
    """
    if get_world_size() > 1:
        return []
    return length_buckets(lengths, GROUP_COST.get(lengths.device.type, 2048))


def stage_groups(lengths: Tensor) -> list[Tensor]:
    """Rows behind which GEM tokens are put together: as many as STAGE_TOKENS has places for, longest rows first.

    Shapes: ``(B,)`` -> ``(B_i,)``
    """
    if get_world_size() > 1:
        return []
    order = lengths.argsort(descending=True, stable=True)
    starts: list[int] = []
    longest = int(lengths.max())
    for index, length in enumerate(lengths[order].tolist()):
        num_rows = index - (starts[-1] if starts else 0)
        if num_rows and (num_rows + 1) * longest > STAGE_TOKENS:
            starts.append(index)
            longest = length
    return list(order.tensor_split(starts))


def length_buckets(lengths: Tensor, cost: int) -> list[Tensor]:
    """Group rows of like length, so that each group is padded to its own longest row.

    Args:
        lengths: Tokens in each row. Shape: ``(B,)``
        cost: Padding tokens that one more group is worth; a row starts a new group where it would exceed them.

    Returns:
        Row indices of each group, longest rows first. Shapes: ``(B_i,)``
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered = lengths[order].tolist()
    starts, longest, padding = [], ordered[0], 0
    for index, length in enumerate(ordered):
        padding += longest - length
        if padding > cost:
            starts.append(index)
            longest, padding = length, 0
    return list(order.tensor_split(starts))


def pack_texts(lengths: Tensor, width: int) -> Tensor:
    """Put short texts into one row each of no more than ``width`` tokens, the longest first, where they fit first.

    Args:
        lengths: Tokens in each text, which is a right-padded row of ``width`` places. Shape: ``(B,)``
        width: T.

    Returns:
        For each place of a packed row the index of its token among all ``B * T``, or -1. Shape: ``(rows, at most T)``
    """
    rows: list[list[Tensor]] = []
    room: list[int] = []
    sizes = lengths.tolist()
    for text in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        length = sizes[text]
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(sizes))
        rows[row].append(torch.arange(text * width, text * width + length))
        room[row] -= length
    return pad_sequence([torch.cat(row) for row in rows], batch_first=True, padding_value=-1).to(lengths.device)
