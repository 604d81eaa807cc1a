"""`gem-st train --dry-run`: what a training would read, mask and need, without loading the base's weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..cards.card_data import draw_mask
from ..losses.dataset_checks import sample_rows
from ..losses.next_token import LOGITS_BUDGET
from ..losses.rows import draw_crops, drop_tokens, split_text, takes_pairs
from ..modeling.gem_mask import GEM, PREFIX, SUFFIX
from ..modeling.gem_text import count_around
from .config import TrainConfig
from .data import share_rows
from .run import load_data, read_context

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""Training arguments by which activations are computed once more instead of kept; the second one's before 5.24."""

COLORS = {PREFIX: typer.colors.CYAN, GEM: typer.colors.MAGENTA, SUFFIX: typer.colors.GREEN}
NUM_SHOWN = 3
MAX_SHOWN_TOKENS = 60
"""Tokens shown of a segment."""

NUM_DRY_TEXTS = 16
"""Texts that a dry run has the base write, where it is to write its own."""

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}

Segments = list[tuple[int, list[str]]]
"""Tokens of a row as text, by segment."""


@dataclass
class Preview:
    """What a training would do.

    Attributes:
        settings: All of them, by name.
        columns: Columns of text that are read.
        num_rows: Rows to train on; None for a stream.
        rows: Three rows: what each is, and its segments.
        mask: The GEM mask of a short row, drawn.
        truncated: Share of sampled texts longer than a row.
        mean_length: Mean tokens of sampled texts, as far as they are read.
        memory: GiB by what needs them, for a batch of rows of mean length.
        longest: GiB in all, for a batch of rows of full length.
    """

    settings: dict[str, Any]
    columns: list[str]
    num_rows: int | None
    rows: list[tuple[str, Segments]]
    mask: str
    truncated: float
    mean_length: float
    memory: dict[str, float]
    longest: float


def preview(config: TrainConfig) -> Preview:
    """Look at a training without starting it; nothing is written.

    Args:
        config: The settings.

    Raises:
        ImportError: If a package is missing.
        ValueError: If settings and data do not fit each other.
    """
    config.check()
    data = load_data(config, num_texts=NUM_DRY_TEXTS)
    num_rows = data.num_rows
    if config.self_generate:
        num_rows, _ = share_rows(config.self_generate, None, config.held_out)
    config = config.resolve(num_rows, data.columns, read_context(config))
    tokenizer = AutoTokenizer.from_pretrained(**config.pretrained)
    sampled = sample_rows(data.train)
    lengths = [len(row) for row in tokenizer([text for row in sampled for text in row.values()])["input_ids"]]
    limit = (config.max_length or 0) - config.num_gem_tokens
    kept = [min(length, limit) for length in lengths]
    mean = sum(kept) / len(kept)
    memory = estimate_memory(config, len(data.columns), mean)
    longest = estimate_memory(config, len(data.columns), limit)
    return Preview(
        settings=config.describe(),
        columns=data.columns,
        num_rows=num_rows,
        rows=build_examples(config, tokenizer, sampled[:NUM_SHOWN], data.columns),
        mask=draw_mask(min(config.num_gem_tokens, 4))[1],
        truncated=sum(length > limit for length in lengths) / len(lengths),
        mean_length=mean,
        memory=memory,
        longest=sum(longest.values()),
    )


# --------------------------------------------------------------------------------------------------------------------
# Rows


def build_examples(
    config: TrainConfig, tokenizer: Any, rows: Sequence[dict[str, str]], columns: Sequence[str]
) -> list[tuple[str, Segments]]:
    """One row of each kind that the training has, as :class:`gem_st.GemLoss` makes them, with its second view.

    Args:
        config: Resolved settings.
        tokenizer: Of the base.
        rows: Rows of the data.
        columns: Their columns.

    Returns:
        What each row is, and its segments.
    """
    tasks = config.tasks or []
    kinds = (["plain"] if config.plain_ratio else []) + (tasks if config.plain_ratio != 1 else [])
    has_pairs = takes_pairs(tasks)
    generator = torch.Generator().manual_seed(config.seed)
    limit = (config.max_length or 0) - config.num_gem_tokens
    special = count_around(tokenizer)[0]
    gem = [f"[GEM {index + 1}]" for index in range(config.num_gem_tokens)]
    shown: list[tuple[str, Segments]] = []
    views = itertools.cycle(config.views or ["deletion"])
    for row, kind, way in zip(rows, itertools.cycle(kinds), views):
        texts = [torch.tensor(tokenizer(row[name], truncation=True, max_length=limit)["input_ids"]) for name in columns]
        given = texts.pop()[special:] if has_pairs else None
        spans = (
            draw_crops(texts[0], special, generator) if way == "crops" and len(texts) == 1 and not has_pairs else None
        )
        if spans:
            texts[0] = spans[0]
        prefix, suffix = split_text(kind, texts[0], given, limit, special, generator)
        shown.append((kind, _segments(tokenizer, prefix, gem, suffix)))
        if len(texts) == 1 and config.teacher is None:
            view = spans[1] if spans else drop_tokens(prefix, config.token_dropout or 0.0, special, generator)
            shown.append(("  second view", _segments(tokenizer, view, gem)))
        elif kind == "plain":
            names = zip(columns[1:], texts[1:], strict=True)
            shown += [(f"  {name}", _segments(tokenizer, text, gem)) for name, text in names]
    return shown


def _segments(tokenizer: Any, prefix: Tensor, gem: list[str], suffix: Tensor | None = None) -> Segments:
    segments = [(PREFIX, _spell(tokenizer, prefix)), (GEM, gem)]
    return segments if suffix is None or not len(suffix) else [*segments, (SUFFIX, _spell(tokenizer, suffix))]


def _spell(tokenizer: Any, ids: Tensor) -> list[str]:
    names = [tokenizer.decode([token_id]).replace("\n", "\\n") for token_id in ids[:MAX_SHOWN_TOKENS].tolist()]
    return [*names, f" ... {len(ids) - MAX_SHOWN_TOKENS} more"] if len(ids) > MAX_SHOWN_TOKENS else names


def render(preview: Preview, *, color: bool = False) -> str:
    """A preview as text.

    Args:
        preview: The preview.
        color: Colour segments by ANSI codes; bars part them in any case.
    """
    lines = [f"{name:<22}{_show(value)}" for name, value in preview.settings.items()]
    rows = "a stream" if preview.num_rows is None else f"{preview.num_rows:,}"
    lines += ["", f"rows {rows}; columns {', '.join(preview.columns)}; {preview.mean_length:.1f} tokens on average"]
    lines += [f"texts longer than max_length, to be cut: {preview.truncated:.1%}", ""]
    lines += [f"{kind:<16}{_render_segments(segments, color)}" for kind, segments in preview.rows]
    legend = " | ".join(_paint(name, segment, color) for segment, name in ((0, "prefix"), (1, "GEM"), (2, "suffix")))
    lines += ["", f"{legend}; who reads whom (rows are queries, x is seen):", preview.mask, "", "memory, GiB"]
    lines += [f"  {name:<20}{value:>9.3f}" for name, value in preview.memory.items()]
    lines += [f"  {'in all':<20}{sum(preview.memory.values()):>9.3f}, {preview.longest:.3f} if all rows are full"]
    if (available := available_memory(preview.settings)) is not None:
        lines.append(f"  {'this device has':<20}{available:>9.3f}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _render_segments(segments: Segments, color: bool) -> str:
    return " | ".join(_paint("".join(tokens), segment, color) for segment, tokens in segments)


def _paint(text: str, segment: int, color: bool) -> str:
    return typer.style(text, fg=COLORS[segment], bold=segment == GEM) if color else text


# --------------------------------------------------------------------------------------------------------------------
# Memory


def estimate_memory(config: TrainConfig, num_columns: int, length: float) -> dict[str, float]:
    """Memory that a training needs at its peak, to about a factor of 1.5, for a dense decoder with sdpa attention.

    With P parameters of which Q are trained, L layers of width D, N tokens that gradients flow through, M tokens that
    a frozen base only reads, and S the outputs of all linear layers for one token:

    - weights: P times the bytes of their data type, 4-bit ones 0.56 bytes, and 2 more for the copies that float32
      weights have in bf16
    - gradients: 4 Q bytes
    - optimizer: 8 Q bytes (AdamW)
    - activations: N (2 S a + 16 L D), a being 4 bytes in float32 and 2 otherwise: inputs and outputs of linear layers,
      and two norms a layer in float32. With gradient checkpointing N 4 L D, and one layer. A frozen base adds M a times
      its keys and values, twice and once more as wide as the queries.
    - logits: 12 bytes times targets times the vocabulary, up to the budget above which they are made in pieces

    Args:
        config: Resolved settings.
        num_columns: Columns of text.
        length: Tokens in a text.

    Returns:
        GiB by what needs them. What Python and the device's libraries need themselves is not counted.
    """
    base = AutoConfig.from_pretrained(**config.pretrained)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base, **config.hub_kwargs)
    text_config, head = base.get_text_config(), model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    shapes = [tuple(m.weight.shape) for m in linears]
    num_layers, width = text_config.num_hidden_layers, text_config.hidden_size
    num_parameters = model.num_parameters()
    trained = num_parameters
    if config.mode != "full":
        trained = sum((config.lora_rank or 0) * sum(shape) for shape in shapes)
        trained += 0 if config.gem_tokens not in (None, ["trained"]) else config.num_gem_tokens * width

    flowing, read, targets = count_tokens(config, num_columns, length)
    size = 4 if config.precision == "float32" else 2
    outputs = sum(m.nf if isinstance(m, Conv1D) else m.out_features for m in linears)
    if config.mode != "frozen" and any(config.training_arguments.get(name) for name in CHECKPOINTING):
        activations = flowing * (4 * num_layers * width + (2 * outputs * size) / num_layers + 16 * width)
    else:
        activations = flowing * (2 * outputs * size + 16 * num_layers * width)
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or width // heads
    key_width = head_width * (getattr(text_config, "num_key_value_heads", None) or heads)
    activations += read * num_layers * size * (4 * key_width + 2 * head_width * heads)
    logits = min(targets * text_config.vocab_size, LOGITS_BUDGET) * 12
    parts = {
        "weights": _weight_bytes(config, num_parameters, sum(rows * columns for rows, columns in shapes)),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": activations,
        "logits": logits,
    }
    return {name: value / GIB for name, value in parts.items()}


def _weight_bytes(config: TrainConfig, num_parameters: int, num_linear: int) -> float:
    if config.mode == "qlora":
        return 0.56 * num_linear + 2 * (num_parameters - num_linear)
    size = BYTES[config.dtype or "float32"]
    return num_parameters * size + (2 * num_linear if size == 4 and config.precision != "float32" else 0)


def count_tokens(config: TrainConfig, num_columns: int, length: float) -> tuple[float, float, float]:
    """Tokens of a batch on one device: gradients flow through, a frozen base reads, and next-token targets.

    A row that repeats its text has twice its length, and a text of one column has a second view.
    """
    plain, tasks = config.plain_ratio or 0.0, config.tasks or ["none"]
    has_pairs = takes_pairs(tasks)
    num_rows = config.batch_size * (1 if has_pairs else num_columns)
    has_views = has_pairs or num_columns == 1
    num_gems = config.num_gem_tokens * num_rows * (2 if has_views else 1)
    cut = tasks.count("continuation") / len(tasks)  # their prefix and suffix are one text; all others have two
    prefixes = num_rows * length * (plain * (2 if has_pairs else 1) + (1 - plain) * (1 - cut / 2))
    suffixes = num_rows * length * (1 - plain) * (1 - cut / 2)
    views = prefixes * (1 - (config.token_dropout or 0.0)) if has_views else 0.0
    if config.mini_batch_size and config.mini_batch_size < num_rows:  # the one with the longest rows
        num_gems, views = config.num_gem_tokens * config.mini_batch_size, 0.0
        prefixes = config.mini_batch_size * length
        suffixes = prefixes if (plain < 1 and cut < 1) or has_pairs else 0.0
    if config.mode == "frozen":
        return num_gems + suffixes, prefixes + views, suffixes
    return prefixes + suffixes + views + num_gems, 0.0, prefixes + suffixes


def available_memory(settings: dict[str, Any]) -> float | None:
    """Memory of the device that would train, in GiB; None if it cannot be told."""
    if torch.cuda.is_available() and not settings.get("training_arguments", {}).get("use_cpu"):
        return torch.cuda.get_device_properties(0).total_memory / GIB
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, OSError, ValueError):
        return None
