"""GEM: one decoder-only language model that embeds text and keeps generating (arXiv 2506.04344).

This file is the whole method at inference time, in the order in which data flows: text -> token ids with GEM
tokens -> attention mask -> backbone -> embedding, then generation, then saving and loading. A copy of it travels in
every checkpoint, so it imports only the standard library, torch, transformers and sentence_transformers.

Notation used for tensor shapes:

- ``B``: batch size
- ``T``: tokens in a row, padding included
- ``K``: GEM tokens in a row
- ``D``: width of the hidden states
- ``V``: vocabulary size, i.e. rows of the embedding matrix
- ``N``: next-token targets in a batch
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file, logging
from typing_extensions import Self

REQUIREMENTS = {"sentence-transformers": ">=6.0", "transformers": ">=5.4", "torch": ">=2.7"}
"""What Sentence Transformers checks before it loads a checkpoint; older versions than that stop at the next lines."""

try:
    from sentence_transformers.base.modules import InputModule
    from transformers.masking_utils import create_masks_for_generate
except ImportError as error:
    wanted = " ".join(f"'{package}{versions}'" for package, versions in REQUIREMENTS.items())
    raise ImportError(f"GEM needs newer packages: pip install -U {wanted} ({error})") from error

logger = logging.get_logger(__name__)

PREFIX, GEM, SUFFIX = 0, 1, 2
"""The three segments of a row (paper, section 3): ``prefix (m tokens) | K GEM tokens | suffix (n tokens)``."""

POOLING_MODES = ("mean", "concat")
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers builds a mask from an index rule."""

LOGITS_BUDGET = 2**26
"""Logits above this many elements (256 MiB in float32) are not built at once by :func:`next_token_loss`."""

BUCKET_COST = {"cpu": 128}
"""Padding tokens worth one more pass through the backbone, by device type; 2,048 on accelerators."""

ASSISTED_GENERATION = ("assistant_model", "prompt_lookup_num_tokens")
HUB_KWARGS = ("subfolder", "token", "cache_dir", "revision", "local_files_only")

SHARED_PREFIX_LENGTH, SHARED_PREFIX_SHARE = 8, 1 / 8
"""Tokens that rows share at their start are computed once if they are as many, and as large a share of the batch."""

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Data types of so few digits that the small steps of an optimizer are lost to rounding."""

CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
"""Names of the folders that a trainer resumes from."""

WRAPPERS = re.compile(r"\b_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\.")
"""What activation checkpointing, FSDP and torch.compile add to the names of weights."""

Prompts = str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]]
"""A text, texts, the messages of a conversation, or conversations."""

TESTED_TOGETHER = {"transformers": "5.24.0", "peft": "0.21.2"}
"""Releases that passed all tests together, for whoever has others that do not fit each other."""

RESERVED_TOKEN = re.compile(r"^[<\[>{]\W*(reserved|unused|place.?holder).*\d\W*$", re.IGNORECASE)
"""Names of vocabulary entries set aside by a model's authors, such as ``<|reserved_special_token_9|>``."""


# --------------------------------------------------------------------------------------------------------------------
# Token ids -> segments, positions and attention mask


def gem_segments(input_ids: Tensor, attention_mask: Tensor, gem_token_ids: Sequence[int]) -> Tensor:
    """Label every token as ``PREFIX`` (0), ``GEM`` (1) or ``SUFFIX`` (2).

    Args:
        input_ids: Token ids. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, False (or 0) for padding, on either side. Shape: ``(B, T)``
        gem_token_ids: The K ids of the GEM tokens.

    Returns:
        Segment of each token; a row without GEM tokens is all prefix, padding counts as prefix. Shape: ``(B, T)``
    """
    real = attention_mask.bool()
    is_gem = torch.isin(input_ids, torch.as_tensor(gem_token_ids, device=input_ids.device)) & real
    is_suffix = (is_gem.cumsum(dim=1) > 0) & ~is_gem & real
    return is_gem.long() * GEM + is_suffix.long() * SUFFIX


def gem_position_ids(segments: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions in which all GEM tokens of a row share one place, and the suffix starts one further.

    The GEM tokens are then interchangeable slots: K tokens in one row equal K rows of one token each.

    Args:
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, on either side. Shape: ``(B, T)``

    Returns:
        Position of each token, 0 for padding before the first token. Shape: ``(B, T)``
    """
    is_gem = segments == GEM
    follows_gem = F.pad(is_gem[:, :-1], (1, 0)) & is_gem
    return ((attention_mask.bool() & ~follows_gem).cumsum(dim=1) - 1).clamp(min=0)


def gem_mask_function(
    segments: Tensor, text_ids: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of the GEM mask, to be combined with causality: may query ``q`` attend to key ``k``?

    A token sees itself; the prefix is seen by prefix and GEM tokens; GEM and suffix tokens are seen by the suffix
    (and the prefix, were it not causal, would see nothing else).

    Args:
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        text_ids: Of rows packed with several texts, which text a token belongs to; it sees that one only.
            Shape: ``(B, T)``

    Returns:
        A function of (batch, head, query, key) indices, as transformers' ``and_mask_function`` takes it.
    """

    def may_attend(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key_in_prefix = segments[batch_idx, kv_idx] == PREFIX
        query_in_suffix = segments[batch_idx, q_idx] == SUFFIX
        rule = (q_idx == kv_idx) | (key_in_prefix != query_in_suffix)
        return rule if text_ids is None else rule & (text_ids[batch_idx, q_idx] == text_ids[batch_idx, kv_idx])

    return may_attend


def gem_attention_mask(
    config: Any,
    segments: Tensor,
    attention_mask: Tensor,
    dtype: torch.dtype,
    past_key_values: Cache | None = None,
    text_ids: Tensor | None = None,
) -> Any:
    """The attention mask of the paper (section 3, figure 1), built by transformers for the model's attention.

    For a row ``a b | G H | c d`` (rows are queries, ``x`` marks a key that is attended to)::

            a b G H c d
          a x . . . . .
          b x x . . . .
          G x x x . . .
          H x x . x . .
          c . . x x x .
          d . . x x x x

    The suffix reads the prefix only through the GEM tokens, GEM tokens do not see each other, and everything stays
    causal. Rows with a suffix, with GEM tokens at the end and without any may stand in one batch.

    Args:
        config: The model's transformers config; it decides the format (eager, sdpa or flex_attention) and whether
            there is one mask or one for each layer type.
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, on either side. Shape: ``(B, T)``
        dtype: Data type of the hidden states, used by the additive masks of eager attention.
        past_key_values: A cache that holds the first ``P`` of the T tokens, which are then keys only.
        text_ids: As :func:`gem_mask_function` takes it. Shape: ``(B, T)``

    Returns:
        What the backbone takes as ``attention_mask``: a mask of shape ``(B, 1, T - P, T)`` (sdpa: True means
        attended to; eager: 0 means attended to), a flex ``BlockMask``, or a dict of these by layer type.

    Raises:
        ValueError: If the attention implementation takes no such mask, e.g. FlashAttention-2.
    """
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} takes no custom mask. Use one of {MASKED_ATTENTION}: "
            'model.set_attn_implementation("sdpa"). Only K = 1 without a suffix runs without a mask.'
        )
    num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
    num_rows, num_keys = segments.shape
    inputs = {
        "config": config,
        "inputs_embeds": segments.new_empty((num_rows, num_keys - num_past, 0), dtype=dtype),  # for its shape only
        "attention_mask": attention_mask.bool(),
        cache_name(create_masks_for_generate): past_key_values,
    }
    may_attend = gem_mask_function(segments, text_ids)
    if config._attn_implementation == "flex_attention":
        return create_masks_for_generate(**inputs, and_mask_function=may_attend)
    # The same for masks that are tensors, but many times faster: given a function, transformers maps it over indices.
    row, key = (torch.arange(size, device=segments.device) for size in segments.shape)
    rule = may_attend(row[:, None, None, None], row[:0], key[num_past:, None], key)
    combine = partial(_combine_masks, rule=rule, is_causal=key[num_past:, None] >= key)
    masks = create_masks_for_generate(**inputs)
    return {name: combine(mask) for name, mask in masks.items()} if isinstance(masks, dict) else combine(masks)


def _combine_masks(mask: Tensor | None, rule: Tensor, is_causal: Tensor) -> Tensor:
    """Forbid in a mask of transformers what the rule forbids; None is its shorthand for causality.

    Shapes: ``(B, 1, Q, T)``, ``(B, 1, Q, T)``, ``(Q, T)`` -> ``(B, 1, Q, T)``
    """
    if mask is None:
        return rule & is_causal
    if mask.dtype == torch.bool:
        return rule & mask
    return mask.masked_fill(~rule, torch.finfo(mask.dtype).min)


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


# --------------------------------------------------------------------------------------------------------------------
# Hidden states -> embedding and next-token loss


def pool_gem_tokens(hidden_states: Tensor, segments: Tensor, num_gem_tokens: int, pooling: str) -> Tensor:
    """The embedding of each row: its hidden states at the GEM tokens, averaged or concatenated (paper, section 3).

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        num_gem_tokens: K.
        pooling: ``"mean"`` or ``"concat"``.

    Returns:
        Shape: ``(B, D)`` for mean, ``(B, K * D)`` for concat

    Raises:
        ValueError: If a row does not hold exactly K GEM tokens.
    """
    is_gem = segments == GEM
    counts = is_gem.sum(dim=1)
    if not bool((counts == num_gem_tokens).all()):
        raise ValueError(
            f"Every row needs exactly {num_gem_tokens} GEM token(s) to be embedded, but the rows of this batch hold "
            f"{counts.tolist()}. Build the batch with `preprocess`, and do not truncate it afterwards."
        )
    gem_states = hidden_states[is_gem].view(len(hidden_states), num_gem_tokens, -1)
    return gem_states.mean(dim=1) if pooling == "mean" else gem_states.flatten(1)


def next_token_loss(hidden_states: Tensor, labels: Tensor, lm_head: nn.Module, config: Any = None) -> Tensor:
    """Mean next-token cross-entropy in nats, without building logits for positions that have no target.

    Logits are built at once only while they fit comfortably (``LOGITS_BUDGET``); above that
    ``torch.nn.functional.linear_cross_entropy`` computes them in pieces, or, where torch or the head does not allow
    it, and in lower precision, in which it adds up losses with an error of several percent, a chunked loop that
    recomputes them in the backward pass. The value is the same to 1e-5.

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        labels: Token ids, not shifted; -100 is no target. Shape: ``(B, T)``
        lm_head: The output projection, D to V.
        config: The model's config, read for ``final_logit_softcapping``, ``logit_scale`` and ``logits_scaling``.

    Returns:
        Scalar; 0 (with a gradient of 0) if there is no target. Shape: ``()``
    """
    targets = labels[:, 1:]
    is_target = targets != -100
    states, targets = hidden_states[:, :-1][is_target], targets[is_target]
    if len(targets) == 0:
        return hidden_states.sum() * 0.0
    weight: Any = lm_head.weight
    num_logits = len(targets) * weight.shape[0]
    if num_logits <= LOGITS_BUDGET:
        return _token_losses(states, targets, lm_head, config).mean()
    is_exact = states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(states.device.type)
    if is_exact and hasattr(F, "linear_cross_entropy") and type(lm_head) is nn.Linear and _plain_logits(config):
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(states, weight, targets, linear_bias=lm_head.bias, options=options)
    num_chunks = math.ceil(num_logits / LOGITS_BUDGET)
    losses = [
        checkpoint(_token_losses, *chunk, lm_head, config, use_reentrant=False)
        for chunk in zip(states.chunk(num_chunks), targets.chunk(num_chunks), strict=True)
    ]
    return torch.cat(losses).mean()


def count_targets(labels: Tensor) -> Tensor:
    """Number of next-token targets, N. Shapes: ``(B, T)`` -> ``()``"""
    return (labels[:, 1:] != -100).sum()


def _token_losses(states: Tensor, targets: Tensor, lm_head: nn.Module, config: Any) -> Tensor:
    """Cross-entropy of each target. Shapes: ``(N, D)``, ``(N,)`` -> ``(N,)``"""
    return F.cross_entropy(output_logits(states, lm_head, config), targets, reduction="none")


def output_logits(states: Tensor, lm_head: nn.Module, config: Any) -> Tensor:
    """The language model's logits, with the factors and the cap of its config. Shapes: ``(N, D)`` -> ``(N, V)``"""
    logits = lm_head(states).float() * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _plain_logits(config: Any) -> bool:
    """True if the logits are the output of the head, with nothing applied to them."""
    return not any(getattr(config, key, None) for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"))


# --------------------------------------------------------------------------------------------------------------------
# Vocabulary rows for the GEM tokens


def choose_gem_token_ids(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, num_gem_tokens: int, used_ids: Collection[int] = ()
) -> tuple[list[int], str]:
    """Find vocabulary rows for the GEM tokens, preferring rows that nothing else uses.

    Args:
        tokenizer: The base model's tokenizer.
        num_rows: V, rows of the embedding matrix.
        num_gem_tokens: K.
        used_ids: Rows that the model's configuration gives a meaning, e.g. for padding.

    Returns:
        The K ids and where they come from: ``"padding"`` (rows beyond the tokenizer's last id), ``"reserved"`` (the
        last tokens named reserved, unused or placeholder) or ``"grown"`` (rows to be added after the last).
    """
    vocabulary = tokenizer.get_vocab()
    padding = [row for row in range(max(vocabulary.values()) + 1, num_rows) if row not in used_ids]
    if len(padding) >= num_gem_tokens:
        return padding[:num_gem_tokens], "padding"
    used_ids = {*used_ids, *tokenizer.all_special_ids}
    reserved = sorted(row for token, row in vocabulary.items() if RESERVED_TOKEN.match(token) and row not in used_ids)
    if len(reserved) >= num_gem_tokens:
        return reserved[-num_gem_tokens:], "reserved"
    return list(range(num_rows, num_rows + num_gem_tokens)), "grown"


@torch.no_grad()
def draw_gem_rows(vectors: Tensor, num_gem_tokens: int, noise: float = 0.1) -> Tensor:
    """Draw new embeddings near the mean of existing ones, from torch's global generator.

    Args:
        vectors: Embeddings of tokens in use. Shape: ``(at most V, D)``
        num_gem_tokens: K.
        noise: Standard deviation around the mean, in units of that of the vectors in each dimension.

    Returns:
        Shape: ``(K, D)``, in float32 on the CPU
    """
    mean, std = vectors.mean(dim=0, dtype=torch.float32), vectors.std(dim=0).float()
    return mean.cpu() + noise * std.cpu() * torch.randn(num_gem_tokens, vectors.shape[1])


# --------------------------------------------------------------------------------------------------------------------
# Keys and values


@lru_cache
def cache_name(function: Callable[..., Any]) -> str:
    """What a function of transformers, or a model's ``forward``, calls its cache: ``cache``, before 5.24 otherwise."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def tensors_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a transformers cache. Shape: ``(B, heads, T, head width)`` each"""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(layers: Iterable[Iterable[Tensor]]) -> DynamicCache:
    """A transformers cache of keys and values, in which every layer holds every token, sliding windows too."""
    return DynamicCache([tuple(layer) for layer in layers])


class _CachedRows:
    """Keys and values of a batch of rows, with further tensors whose first dimension is the rows'.

    Nothing that reads one changes it: methods return new ones, which may share memory with it.
    """

    fields: tuple[str, ...]

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]], **fields: Tensor) -> None:
        self.layers = list(layers)
        for name in self.fields:
            setattr(self, name, fields[name])

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"keys.{index}": keys for index, (keys, _) in enumerate(self.layers)}
        named |= {f"values.{index}": values for index, (_, values) in enumerate(self.layers)}
        return named | {name: getattr(self, name) for name in self.fields}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._of({name: function(tensor) for name, tensor in self._tensors().items()})

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor]) -> Self:
        num_layers = sum(name.startswith("keys.") for name in tensors)
        layers = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(num_layers)]
        return cls(layers, **{name: tensors[name] for name in cls.fields})

    def __len__(self) -> int:
        """Number of rows, B."""
        return len(getattr(self, self.fields[0]))

    def __repr__(self) -> str:
        keys = self.layers[0][0] if self.layers else None
        shape = "empty" if keys is None else f"{keys.shape[2]} tokens, {len(self.layers)} layers, {keys.dtype}"
        return f"{type(self).__name__}({len(self)} rows, {shape})"

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        """Some of the rows, by index, slice or list of indices.

        Raises:
            IndexError: If there is no such row.
        """
        if isinstance(rows, slice):
            return self._map(lambda tensor: tensor[rows])
        index = torch.as_tensor(rows).reshape(-1)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        if len(index) and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"Rows {index.tolist()} were asked for, but there are {len(self)}.")
        return self._map(lambda tensor: tensor[index.to(tensor.device)])

    def split(self) -> list[Self]:
        """One for each row."""
        return [self[row] for row in range(len(self))]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Put rows of several together.

        Raises:
            ValueError: If there is nothing to join, or the parts are not of one model.
        """
        if len({tuple((k.shape[1], k.shape[-1], v.shape[-1], k.dtype) for k, v in part.layers) for part in parts}) != 1:
            raise ValueError("Join needs one part or more, all made by the same model.")
        tensors = [part._tensors() for part in parts]
        return cls._of({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to a device, cast keys, values and states, or both."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        save_file(self._map(Tensor.contiguous)._tensors(), path, metadata={"format": "pt", "kind": type(self).__name__})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what :meth:`save` wrote. Keys and values only mean something to the weights that made them.

        Raises:
            ValueError: If the file holds something else.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            kind = (file.metadata() or {}).get("kind")
            if kind != cls.__name__:
                raise ValueError(f"{path} holds {kind or 'other tensors'}, not a {cls.__name__}.")
            return cls._of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict


class GemCache(_CachedRows):
    """Keys and values of texts, from which they can be embedded, continued and extended.

    :meth:`GemTransformer.prefill` makes one. GEM tokens are never part of it, and layers with a sliding window keep
    all keys, so that it can be cropped anywhere.

    Attributes:
        layers: Keys and values of each layer. Shape: ``(B, heads, T, head width)`` each
        input_ids: Token ids, padded on the left. Shape: ``(B, T)``
        attention_mask: True for real tokens. Shape: ``(B, T)``
        weights_tag: Tells the weights that made it. Shape: ``(B,)``
    """

    fields = ("input_ids", "attention_mask", "weights_tag")
    input_ids: Tensor
    attention_mask: Tensor
    weights_tag: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens in each row. Shape: ``(B,)``"""
        return self.attention_mask.sum(dim=1)

    def past_key_values(self) -> DynamicCache:
        """A transformers cache to be written to; this one stays as it is."""
        return cache_of(self.layers)

    def crop(self, num_tokens: int | Sequence[int]) -> GemCache:
        """Keep the first tokens of each row; with a negative number, drop as many of the last ones.

        Args:
            num_tokens: One number, or one for each row.

        Raises:
            ValueError: If there is not one number, or one for each row.
        """
        wanted = torch.as_tensor(num_tokens, device=self.input_ids.device).reshape(-1, 1)
        if len(wanted) not in (1, len(self)):
            raise ValueError(f"crop takes one number or one for each of {len(self)} rows, got {len(wanted)}.")
        kept = torch.where(wanted < 0, self.lengths[:, None] + wanted, wanted)
        return self._keep(self.attention_mask & (self.attention_mask.cumsum(dim=1) <= kept))

    @classmethod
    def join(cls, parts: Sequence[GemCache]) -> GemCache:
        """Put rows of several caches together, padded to the longest.

        Raises:
            ValueError: If there is nothing to join, or the caches are not of one model.
        """
        width = max((part.input_ids.shape[1] for part in parts), default=0)
        return super().join([part._pad(width - part.input_ids.shape[1]) for part in parts])

    def _pad(self, num_tokens: int) -> GemCache:
        layers = [(F.pad(k, (0, 0, num_tokens, 0)), F.pad(v, (0, 0, num_tokens, 0))) for k, v in self.layers]
        ids, mask = (F.pad(tensor, (num_tokens, 0)) for tensor in (self.input_ids, self.attention_mask))
        return GemCache(layers, input_ids=ids, attention_mask=mask, weights_tag=self.weights_tag)

    def _keep(self, keep: Tensor) -> GemCache:
        """The tokens for which ``keep`` is True, in order, padded on the left. Shape: ``(B, T)``"""
        width = int(keep.sum(dim=1).max()) if len(keep) else 0
        order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
        return GemCache(
            [tuple(take_tokens(tensor, order) for tensor in layer) for layer in self.layers],  # type: ignore[misc]
            input_ids=self.input_ids.gather(1, order),
            attention_mask=keep.gather(1, order),
            weights_tag=self.weights_tag,
        )


class GemMemory(_CachedRows):
    """Keys and values of the K GEM tokens of texts, and nothing else of them (paper, section 3 and table 6).

    :meth:`GemTransformer.compress` makes one, :meth:`GemTransformer.reconstruct` reads it.

    Attributes:
        layers: Keys and values of each layer. Shape: ``(B, heads, K, head width)`` each
        lengths: Tokens in each text, which is the position of its GEM tokens. Shape: ``(B,)``
        last_hidden_state: Of the last GEM token, which predicts the first token. Shape: ``(B, D)``
        weights_tag: Tells the weights that made it. Shape: ``(B,)``
    """

    fields = ("lengths", "last_hidden_state", "weights_tag")
    lengths: Tensor
    last_hidden_state: Tensor
    weights_tag: Tensor


class GeneratedText(NamedTuple):
    """What :meth:`GemTransformer.generate` gives with ``return_cache=True``."""

    text: str | list[str]
    cache: GemCache


def take_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder tokens. Shapes: ``(B, heads, T, head width)``, ``(B, T')`` -> ``(B, heads, T', head width)``"""
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


# --------------------------------------------------------------------------------------------------------------------
# The Sentence-Transformers module


class GemTransformer(InputModule):
    """A decoder-only language model that embeds text through GEM tokens, as a Sentence-Transformers module.

    ``SentenceTransformer(modules=[GemTransformer("meta-llama/Llama-3.2-1B", num_gem_tokens=4)])`` is an embedder to
    be trained with :class:`gem_st.GemLoss` or any other loss; ``model[0].generate(...)`` is the generator.

    Args:
        model_name_or_path: Hub id or folder of a decoder-only model with a language-model head, or of a GEM
            checkpoint, in which case the other settings must be those it was saved with.
        num_gem_tokens: K, the number of GEM tokens appended to each text.
        pooling: ``"mean"`` or ``"concat"`` over the hidden states at the GEM tokens.
        max_seq_length: Tokens in a row, GEM tokens included; longer texts are truncated. Defaults to what tokenizer
            and model allow.
        freeze_base: Leave the model as it is; train GEM embeddings, and a LoRA that is active only while GEM tokens are
            computed. Its settings are read from a GEM checkpoint.
        lora_rank: Rank of that LoRA, 32 by default, on all linear layers; its ``lora_alpha`` is 8 times the rank.
        lora_kwargs: Further options of ``peft.LoraConfig``, e.g. ``{"lora_dropout": 0.1}``.
        model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``, e.g. ``{"dtype": torch.float32}``.
        processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``, e.g. ``{"padding_side": "left"}``.
        config_kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        ImportError: If a LoRA is needed and PEFT is not installed.
        ValueError: If a setting is out of range, the model is not a causal decoder with an attention that can be
            masked as K asks for, weights are missing, tokenizer and model do not fit each other, or a GEM checkpoint
            was saved with other settings.

    Attributes:
        model: The ``*ForCausalLM``.
        tokenizer: The base model's tokenizer, unchanged.
        num_gem_tokens: K.
        gem_token_ids: Vocabulary rows of the GEM tokens.
        gem_token_source: Where they come from, see :func:`choose_gem_token_ids`.
        max_seq_length: Tokens in a row, GEM tokens included.
        save_base: Whether checkpoints hold the base beside an adapter, or only name it; True by default.
        save_dtype: Data type of the weights in checkpoints of full mode, e.g. ``torch.float32``. By default, None,
            weights are saved as they are, those that :meth:`train_in_float32` cast as they were loaded.
        base_model_name_or_path: The base as checkpoints with an adapter name it.
        base_model_revision: Its commit on the Hub.
        logit_scale: Log of the factor on cosine similarities in :class:`gem_st.GemLoss`. Shape: ``(1,)``

    References:
        GEM: Empowering LLM for both Embedding Generation and Language Understanding, https://arxiv.org/abs/2506.04344
    """

    config_file_name = "gem_config.json"
    remote_code_file_name = "gem_st.py"
    adapter_folder = "gem_adapter"
    config_keys = [
        "num_gem_tokens",
        "pooling",
        "max_seq_length",
        "gem_token_ids",
        "gem_token_source",
        "freeze_base",
    ]
    save_in_root = True

    model: Any  # a PreTrainedModel with a language-model head; typed loosely, as its methods depend on its class
    tokenizer: PreTrainedTokenizerBase
    adapter_model: Any
    gem_embeddings: nn.Parameter
    base_model_revision: str | None

    def __init__(
        self,
        model_name_or_path: str,
        *,
        num_gem_tokens: int = 1,
        pooling: str = "mean",
        max_seq_length: int | None = None,
        freeze_base: bool = False,
        lora_rank: int | None = None,
        lora_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not freeze_base and (lora_rank is not None or lora_kwargs is not None):
            raise ValueError(
                "lora_rank and lora_kwargs belong to freeze_base=True. For a LoRA on every token, use "
                "model.add_adapter(LoraConfig(...)) on the SentenceTransformer."
            )
        if not isinstance(num_gem_tokens, int) or isinstance(num_gem_tokens, bool) or num_gem_tokens < 1:
            raise ValueError(f"num_gem_tokens must be a whole number of 1 or more, got {num_gem_tokens!r}.")
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling must be one of {POOLING_MODES}, got {pooling!r}.")
        self.num_gem_tokens = num_gem_tokens
        self.pooling = pooling
        self.freeze_base = freeze_base
        hub_kwargs = {key: value for key, value in (model_kwargs or {}).items() if key in HUB_KWARGS}
        saved = self._load_gem_config(model_name_or_path, hub_kwargs)
        self._check_saved_settings(model_name_or_path, saved)
        self.save_base = saved.get("save_base", True)
        self.save_dtype: torch.dtype | None = None
        base, base_kwargs = self._find_base(model_name_or_path, saved, hub_kwargs)

        self.tokenizer = AutoTokenizer.from_pretrained(base, **{**(processor_kwargs or {}), **base_kwargs})
        self.model = _load_causal_lm(
            base, {**(model_kwargs or {}), **base_kwargs}, {**(config_kwargs or {}), **base_kwargs}
        )
        options = {**(config_kwargs or {}), **(model_kwargs or {})}
        is_asked = options.get("dtype") is not None or options.get("torch_dtype") is not None
        self._loaded_dtype = None if is_asked else self.model.dtype
        self._stored_dtypes: dict[str, torch.dtype] = {}
        # In the Hub's cache files are links: their names lie in one folder, what they point to in another.
        config_path = Path(str(cached_file(base, "config.json", **{**hub_kwargs, **base_kwargs})))
        self._base_folder = config_path.absolute().parent
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", config_path.as_posix())
        if commit and self.base_model_revision is None and base == self.base_model_name_or_path:
            self.base_model_revision = commit[1]
        self._fingerprint = fingerprint_base(self._base_folder, self.tokenizer)
        self._check_vocabulary(base, saved)
        self.max_seq_length = saved.get("max_seq_length") if max_seq_length is None else max_seq_length
        self.logit_scale = nn.Parameter(torch.tensor([saved.get("logit_scale", math.log(20.0))]))

        self._check_runs(base)
        self._has_window = _has_window(self.model.config.get_text_config())
        self._can_cache = self._probe_cache()
        self._claim_gem_tokens(saved)
        if freeze_base:
            self._require_cache()
            self._freeze()
        else:
            self._protect_generation()
        if saved and (freeze_base or not self.save_base):
            self._load_adapter(model_name_or_path, hub_kwargs)
        elif freeze_base:
            rank = 32 if lora_rank is None else lora_rank
            options = {"r": rank, "lora_alpha": 8 * rank, "target_modules": "all-linear"}
            if "layers_to_transform" in (lora_kwargs or {}):  # which PEFT does not take with "all-linear"
                options["target_modules"] = self._linear_names()
            self._add_lora(_import_peft().LoraConfig(**_check_lora_kwargs({**options, **(lora_kwargs or {})})))
        self._check_is_causal(base)
        if num_gem_tokens > 1 or freeze_base:
            self.require_attention_mask()
        self.register_load_state_dict_pre_hook(_keep_quantized_weights)
        self._base_versions = self._count_changes()
        # `SentenceTransformer.add_adapter` ends up here.
        own_ids = None if freeze_base else self.gem_token_ids
        self.model.add_adapter = partial(_add_adapter_with_gem_rows, self.model, own_ids)

    # ---- set-up and checks

    @classmethod
    def _load_gem_config(cls, model_name_or_path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The saved settings of a GEM checkpoint; empty for a base model."""
        return cls.load_config(
            model_name_or_path,
            subfolder=hub_kwargs.get("subfolder", ""),
            token=hub_kwargs.get("token"),
            cache_folder=hub_kwargs.get("cache_dir"),
            revision=hub_kwargs.get("revision"),
            local_files_only=hub_kwargs.get("local_files_only", False),
        )

    def _check_saved_settings(self, model_name_or_path: str, saved: dict[str, Any]) -> None:
        for key in ("num_gem_tokens", "pooling", "freeze_base"):
            if saved and saved.setdefault(key, False) != getattr(self, key):
                raise ValueError(
                    f"{model_name_or_path} is a GEM checkpoint saved with {key}={saved[key]!r}, but "
                    f"{key}={getattr(self, key)!r} was asked for. Pass {key}={saved[key]!r}, or load it with "
                    f"SentenceTransformer({str(model_name_or_path)!r}, trust_remote_code=True)."
                )

    def _check_vocabulary(self, model_name_or_path: str, saved: dict[str, Any]) -> None:
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        last_id = max(self.tokenizer.get_vocab().values())
        if last_id >= num_rows:
            raise ValueError(
                f"The tokenizer of {model_name_or_path} produces ids up to {last_id}, but the model has only "
                f"{num_rows} vocabulary rows. Use the tokenizer the model was trained with, or resize its embeddings."
            )
        has_all_rows = not self.freeze_base and self.save_base
        if saved and has_all_rows and max(saved["gem_token_ids"]) >= num_rows:
            raise ValueError(
                f"{model_name_or_path} names gem_token_ids {saved['gem_token_ids']}, but its model has only {num_rows} "
                "vocabulary rows: weights and gem_config.json are not of one checkpoint. Save or download it again."
            )

    def _find_base(
        self, model_name_or_path: str, saved: dict[str, Any], hub_kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Where the base's weights are, and with which arguments they are loaded from there."""
        if not saved or (self.save_base and not self.freeze_base):
            is_folder = Path(model_name_or_path).is_dir()
            name = Path(model_name_or_path).resolve() if is_folder else model_name_or_path
            self.base_model_name_or_path = str(name)
            self.base_model_revision = None
            return model_name_or_path, {}
        self.base_model_name_or_path = saved.get("base_model_name_or_path", "")
        self.base_model_revision = saved.get("base_model_revision")
        if self.save_base:
            return model_name_or_path, {}
        base = self.base_model_name_or_path
        try:
            cached_file(base, "config.json", **{**hub_kwargs, "revision": self.base_model_revision, "subfolder": ""})
        except OSError as error:
            raise ValueError(
                f"{model_name_or_path} holds an adapter only; its base, {base!r} (revision "
                f"{self.base_model_revision}), cannot be loaded: {error}\nMake it available, or edit "
                f"base_model_name_or_path in {self.config_file_name} to where you keep it."
            ) from error
        return base, {"revision": self.base_model_revision, "subfolder": ""}

    def _claim_gem_tokens(self, saved: dict[str, Any]) -> None:
        """Find vocabulary rows for the GEM tokens, or ids beyond them beside a frozen base; initialise new rows."""
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        if saved:
            self.gem_token_ids, self.gem_token_source = saved["gem_token_ids"], saved["gem_token_source"]
        elif self.freeze_base:
            self.gem_token_ids = list(range(num_rows, num_rows + self.num_gem_tokens))
            self.gem_token_source = "adapter"
        else:
            self.gem_token_ids, self.gem_token_source = choose_gem_token_ids(
                self.tokenizer, num_rows, self.num_gem_tokens, _configured_ids(self.model)
            )
        if self.freeze_base or (saved and self.save_base):
            return
        if self.gem_token_source == "grown":
            self.model.resize_token_embeddings(max(self.gem_token_ids) + 1, mean_resizing=False)
        for weight in self._vocabulary_matrices():
            is_used = torch.arange(len(weight), device=weight.device) <= max(self.tokenizer.get_vocab().values())
            is_used[self.gem_token_ids] = False
            rows = draw_gem_rows(weight[is_used], self.num_gem_tokens)
            with torch.no_grad():
                weight[self.gem_token_ids] = rows.to(weight)

    def _vocabulary_matrices(self) -> list[Tensor]:
        """Embedding and output matrix, or the one that is both. Shape: ``(V, D)`` each"""
        weights = [self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight]
        return list({id(weight): weight for weight in weights}.values())

    def _freeze(self) -> None:
        """Freeze the model; beside it, make GEM embeddings, and a second model of the same weights for a LoRA."""
        self._check_sharding()
        self.model.requires_grad_(False)
        self.model.eval()
        self.adapter_model = share_weights(self.model)
        used = torch.arange(max(self.tokenizer.get_vocab().values()) + 1, device=self.model.device)
        rows = draw_gem_rows(self.model.get_input_embeddings()(used), self.num_gem_tokens)
        self.gem_embeddings = nn.Parameter(rows.to(self.model.device))

    def _check_sharding(self) -> None:
        """Refuse to be sharded layer by layer: a frozen base has two containers around the weights of each layer.

        Raises:
            ValueError: If `accelerate launch` was told to.
        """
        if os.environ.get("ACCELERATE_USE_FSDP") != "true":
            return
        policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
        wrapped = set(os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(","))
        holders = {type(module).__name__ for module in self.model.modules() if any(module.children())}
        if policy == "SIZE_BASED_WRAP" or (policy == "TRANSFORMER_BASED_WRAP" and wrapped & holders):
            raise ValueError(
                f"FSDP is to shard by {policy} {sorted(wrapped & holders)}, but freeze_base=True shares the weights of "
                "each layer between base and adapter. Use DDP (a frozen base has few gradients), or FSDP2 with "
                "fsdp_auto_wrap_policy: NO_WRAP."
            )

    @property
    def _gem_model(self) -> Any:
        """The model that GEM tokens run through, and a LoRA works on."""
        return self.adapter_model if self.freeze_base else self.model

    def _linear_names(self) -> list[str]:
        """Names of the linear layers, without the output head."""
        head = self.model.get_output_embeddings()
        modules = self.model.named_modules()
        return sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Linear) and m is not head})

    def _add_lora(self, config: Any) -> Any:
        """Add an adapter to the model that computes GEM tokens; its weights are float32 whatever the base's are."""
        model = self._gem_model
        inject_adapter(model, config)
        _cast_trainable(model)
        return model

    def train_in_float32(self) -> None:
        """Have the weights that are trained in float32, unless a data type was asked for; :class:`gem_st.GemLoss` does.

        In full mode that is the whole model. A LoRA is float32 whatever its base is, which stays as it is.
        """
        low = {weight.dtype for weight in self.model.parameters() if weight.requires_grad} & {*LOW_PRECISION}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
        if not low:
            return
        if self._has_lora:
            _cast_trainable(self.model)
        elif self.model.dtype != self._loaded_dtype or getattr(self.model, "is_quantized", False):
            logger.warning(
                f"The weights to be trained are in {names}, in which small optimizer steps are lost to rounding. Load "
                "them without `dtype`, which trains them in float32 and saves them as they were, and set bf16=True in "
                "the training arguments to compute in bfloat16."
            )
        else:
            held = _tensors_in(self.model)
            self._stored_dtypes = {path: tensor.dtype for *_, path, tensor in held if tensor.dtype in LOW_PRECISION}
            self.model.float()
            logger.warning(
                f"The weights are stored in {names}, in which small optimizer steps are lost to rounding. They are "
                f"trained in float32, and saved in {names} again unless model[0].save_dtype is set."
            )

    @contextlib.contextmanager
    def as_saved(self, device: str | None = None) -> Iterator[None]:
        """Context in which the weights of the language model are in the data types that they are saved in.

        They are copies; the weights themselves come back unchanged.

        Args:
            device: Where the copies are; beside the weights by default.
        """
        copies: dict[int, Tensor] = {}  # one for all owners of a tied weight
        replaced, config_dtype = [], self.model.config.dtype
        try:
            for held, name, path, tensor in [] if self._is_adapter else _tensors_in(self.model):
                dtype = self._saved_dtype(path, tensor)
                if dtype == tensor.dtype:
                    continue
                if id(tensor) not in copies:
                    cast = tensor.detach().to(device, dtype)
                    copies[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
                replaced.append((held, name, tensor))
                held[name] = copies[id(tensor)]
            yield
        finally:
            for held, name, tensor in replaced:
                held[name] = tensor
            self.model.config.dtype = config_dtype  # which saving sets

    def _saved_dtype(self, path: str, tensor: Tensor) -> torch.dtype:
        """Data type in which a weight or buffer of the language model is saved."""
        is_cast = path in self._stored_dtypes
        if self.save_dtype is not None:
            return self.save_dtype if is_cast or isinstance(tensor, nn.Parameter) else tensor.dtype
        return self._stored_dtypes[path] if is_cast and tensor.dtype == torch.float32 else tensor.dtype

    def _save_model(self, folder: Path, **kwargs: Any) -> None:
        """Write the language model in the data types it is to be saved in.

        A folder that a trainer resumes from gets the weights as they are, so that it goes on to the same ones.
        """
        is_resumable = any(CHECKPOINT.match(name) for name in (folder.name, folder.parent.name))
        with contextlib.nullcontext() if is_resumable else self.as_saved("cpu"):
            self.model.save_pretrained(folder, **kwargs)

    def train(self, mode: bool = True) -> GemTransformer:
        """Set training mode; a frozen base stays in evaluation mode, so that what it computes never changes."""
        if not mode and not any(module.training for module in self.modules()):
            return self  # `encode` asks for it on every call, and switching every module takes a while
        super().train(mode)
        if self.freeze_base:
            self.model.eval()
            if mode and any(getattr(m, "gradient_checkpointing", False) for m in self.adapter_model.modules()):
                _disable_checkpointing(self.adapter_model)  # it drops the cache; K tokens need none
        return self

    def _protect_generation(self) -> None:
        """Have ``generate`` never emit a GEM token, here and wherever the saved ``generation_config`` is read."""
        config = self.model.generation_config
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *self.gem_token_ids})

    @torch.no_grad()
    def _check_runs(self, model_name_or_path: str) -> None:
        """Run a quantised model once: whether its kernels take layers of this size is known to them alone."""
        quantizer = getattr(self.model, "hf_quantizer", None)
        if quantizer is None or self.model.config._attn_implementation not in MASKED_ATTENTION:
            return
        try:
            with _Evaluating(self.model):
                self._last_hidden_state(self._probe(0, 1))
        except (AssertionError, RuntimeError) as error:
            method = quantizer.quantization_config.quant_method.name
            raise ValueError(
                f"{model_name_or_path} does not run on {self.model.device} when quantised by {method}: {error}. Leave "
                "out quantization_config, or take a base with layers of other widths."
            ) from error

    @torch.no_grad()
    def _check_is_causal(self, model_name_or_path: str) -> None:
        """Change the last token of a row: nothing before it may move."""
        self._width = self.model.config.get_text_config().hidden_size
        if self.model.config._attn_implementation not in MASKED_ATTENTION:
            return  # FlashAttention runs on a GPU only, and the model may still be on its way there
        with _Evaluating(self.model):
            states = [self._last_hidden_state(self._probe(0, 1, last)) for last in (2, 3)]
        self._width = states[0].shape[-1]
        if not _is_same(states[0][:, :2], states[1][:, :2]):
            raise ValueError(
                f"{model_name_or_path} ({self.model.config.model_type}) is not causal: a token sees the tokens after "
                "it, as in encoder-only models. GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
            )

    def _probe(self, *token_ids: int) -> Tensor:
        return torch.tensor([token_ids], device=self.model.device)

    def require_attention_mask(self) -> None:
        """Make sure that the GEM mask is obeyed, as K > 1 and rows with a suffix need it.

        FlashAttention takes no such mask; the model is then switched to sdpa (or eager), with a warning.

        Raises:
            ValueError: If the model has no attention that could be masked, e.g. a state-space model.
        """
        implementation = self.model.config._attn_implementation
        if implementation not in MASKED_ATTENTION:
            masked = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"
            logger.warning(
                f"attn_implementation={implementation!r} takes no custom mask, which num_gem_tokens > 1 and rows with "
                f"a suffix need; switching to {masked!r}. Only num_gem_tokens=1 without a suffix runs without a mask."
            )
            self.model.set_attn_implementation(masked)
        cause: Exception | None = None
        try:
            obeys = self._obeys_attention_mask()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            obeys, cause = False, error
        if not obeys:
            raise ValueError(
                f"{self.model.config.model_type} does not obey the GEM attention mask and positions: state-space and "
                "recurrent models have no attention to mask, ALiBi models no positions to share. It can be used with "
                "num_gem_tokens=1, trained on plain rows only: GemLoss(model, plain_ratio=1.0)."
            ) from cause

    @torch.no_grad()
    def _obeys_attention_mask(self) -> bool:
        """The second of two GEM tokens may not see the first; nor, to share its position, may positions be ignored."""
        segments = self._probe(PREFIX, GEM, GEM)
        real = torch.ones_like(segments)
        with _Evaluating(self.model):
            masked = [self._last_hidden_state(self._probe(0, i, 3), segments, real)[0, -1] for i in (1, 2)]
            if not _is_same(*masked) or (self.num_gem_tokens == 1 and not self.freeze_base):
                return _is_same(*masked)
            positions = (self._probe(0, 1, 2), self._probe(0, 1, 5))
            moved = [self._run(self.model, input_ids=self._probe(0, 1, 3), position_ids=p) for p in positions]
        return not _is_same(*moved)

    @torch.no_grad()
    def _probe_cache(self) -> bool:
        """True if the model reads a row in two parts, with padding before the first, as it reads it in one."""
        if self.model.config._attn_implementation not in ("eager", "sdpa"):
            return True  # FlashAttention cannot be run yet, and flex_attention would compile for shapes of its own
        past, ids = DynamicCache(), self._probe(0, 0, 1, 2, 3)
        real = torch.ones_like(ids)
        real[:, 0] = 0
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        with _Evaluating(self.model):
            whole = self._last_hidden_state(ids[:, 1:])
            try:
                for part in (slice(0, 3), slice(3, 5)):
                    inputs = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
                    last = self._run(self.model, past, attention_mask=real[:, : part.stop], **inputs)
            except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
                return False
        return len(past.layers) > 0 and _is_same(last, whole[:, -2:])

    @cached_property
    @torch.no_grad()
    def _can_pack(self) -> bool:
        """True if two texts in one row give the hidden states they have alone; looked at once, when it is trained."""
        if self.freeze_base or self.model.config._attn_implementation not in ("eager", "sdpa"):
            return False
        ids = torch.cat([self._probe(0, 1, 2), self._probe(3, 2, 0), self._probe(1, 0, 0)])
        real = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], device=ids.device)
        with _Evaluating(self.model):
            try:
                packed = self._packed_hidden_states(ids, torch.zeros_like(ids), real)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return False
            return _is_same(packed[real.bool()], self._last_hidden_state(ids)[real.bool()])

    def _require_cache(self) -> None:
        if not self._can_cache:
            raise ValueError(
                f"{self.model.config.model_type} does not continue from a cache of keys and values: state-space and "
                "recurrent models keep another state. It can embed and generate in full mode, but prefill, summarize, "
                "extend, compress and freeze_base=True need attention throughout."
            )

    @torch.no_grad()
    def check_output_head(self) -> None:
        """Make sure that :func:`next_token_loss` computes the model's own next-token loss.

        Raises:
            ValueError: If the model does more to its logits than the head and the known factors and caps.
        """
        if self.model.config._attn_implementation not in MASKED_ATTENTION:
            return
        ids = self._probe(0, 1, 2, 3)
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        with _Evaluating(self.model):
            expected = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            result = next_token_loss(self._last_hidden_state(ids), ids, head, config)
        if not torch.allclose(result.float(), expected.float(), rtol=1e-2):
            raise ValueError(
                f"The next-token loss of {self.model.config.model_type} is {expected:.3f} nats by the model itself, "
                f"but {result:.3f} by its output head: it changes its logits in a way that is not supported. Train it "
                "without next-token prediction, by a contrastive loss of Sentence Transformers."
            )

    # ---- properties that Sentence Transformers reads

    @property
    def max_seq_length(self) -> int:
        """Tokens in a row, the K GEM tokens included. Texts are truncated to fit."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        model_limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        limit = min(model_limit, self.tokenizer.model_max_length)
        if value is None:
            value = int(limit) if limit < 1e9 else 2048
        if value <= self.num_gem_tokens + 1 or value > model_limit:
            raise ValueError(
                f"max_seq_length={value} must be more than num_gem_tokens + 1 = {self.num_gem_tokens + 1}, so that "
                f"some text is left beside the GEM tokens, and at most the model's context of {model_limit} tokens."
            )
        self._max_seq_length = int(value)

    def get_embedding_dimension(self) -> int:
        """Size of an embedding: D for ``pooling="mean"``, K * D for ``pooling="concat"``."""
        return self._width if self.pooling == "mean" else self._width * self.num_gem_tokens

    def get_config_dict(self) -> dict[str, Any]:
        """Settings written to ``gem_config.json``; with them a reload is exact."""
        save_base = self.save_base and not self._has_lora
        settings = {
            **super().get_config_dict(),
            "logit_scale": _value_of(self.logit_scale),
            "save_base": save_base,
            "remote_code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        }
        if save_base and is_local(self.base_model_name_or_path):
            return settings  # a folder of this machine is nobody's business
        names = ("base_model_name_or_path", "base_model_revision")
        return {**settings, **{name: getattr(self, name) for name in names}}

    # ---- text -> token ids

    def preprocess(  # type: ignore[override]  # texts only, of all that Sentence Transformers may pass
        self, inputs: Sequence[str], prompt: str | None = None, max_length: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tokenise texts, truncate them so that K places remain, append the GEM tokens and pad.

        Args:
            inputs: Texts. A text that spells out the name of a GEM token is embedded as ordinary text.
            prompt: Put before every text.
            max_length: Tokens in a row, GEM tokens included, instead of :attr:`max_seq_length`.
            **kwargs: ``task`` and the like, which Sentence Transformers passes to every module; not used.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens), padded on the tokenizer's padding side.
            Shape: ``(B, T)`` each

        Raises:
            ValueError: If an input is not a string, or no place is left for text.
        """
        rows = self._tokenize(inputs, prompt or "", self.max_seq_length if max_length is None else max_length)
        return self.pad([torch.tensor(row + self.gem_token_ids) for row in rows])

    def _tokenize(
        self, texts: Sequence[str], prompt: str = "", max_length: int | None = None, **kwargs: Any
    ) -> list[list[int]]:
        """Token ids of each text as the base's tokenizer gives them, truncated to ``max_length - K``."""
        if isinstance(texts, str):
            raise ValueError(f"A list of texts is needed, got the single text {texts!r:.80}. Put it in a list.")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"Input {index} of {len(texts)} is {text!r:.80} ({type(text).__name__}), but only strings can be "
                    "embedded or generated from. Convert it to str, or drop it."
                )
        if max_length is not None and max_length <= self.num_gem_tokens + 1:
            raise ValueError(
                f"max_length={max_length} must be more than num_gem_tokens + 1 = {self.num_gem_tokens + 1}."
            )
        texts = [prompt + text for text in texts]
        if self.gem_token_source == "reserved":
            texts = [self._defuse(text) for text in texts]
        if max_length is not None:
            kwargs |= {"truncation": True, "max_length": max_length - self.num_gem_tokens}
        return self.tokenizer(texts, padding=False, return_attention_mask=False, verbose=False, **kwargs)["input_ids"]

    def _defuse(self, text: str) -> str:
        """Break up the names of GEM tokens in a text, with a zero-width space, so that they are not matched."""
        for name in self.tokenizer.convert_ids_to_tokens(self.gem_token_ids):
            text = text.replace(name, f"{name[0]}\u200b{name[1:]}")
        return text

    def pad(self, rows: list[Tensor], padding_side: str | None = None) -> dict[str, Tensor]:
        """Pad rows of token ids to one length.

        Args:
            rows: Token ids. Shape: ``(T_i,)`` each
            padding_side: ``"left"`` or ``"right"``; defaults to the tokenizer's.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens). Shape: ``(B, T)`` each
        """
        side = padding_side or self.tokenizer.padding_side
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side=side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
        }

    @property
    def pad_token_id(self) -> int:
        """Id written into padding; it is never attended to, so that any id does."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in candidates if token_id is not None)

    # ---- token ids -> embedding

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed rows that hold K GEM tokens each, at the end or between a prefix and a suffix.

        Args:
            features: ``input_ids`` and ``attention_mask``, padded on either side, shape ``(B, T)`` each. If it also
                holds ``labels`` (token ids, -100 for no target, shape ``(B, T)``), the next-token loss is computed too;
                with ``mini_batch_size`` beside them, in mini-batches of as many rows, of which each is computed once
                more in the backward pass (GradCache, https://arxiv.org/abs/2101.06983).
            **kwargs: Not used.

        Returns:
            ``features`` with ``sentence_embedding`` (shape ``(B, D)``, or ``(B, K * D)`` for concat) and, but for
            mini-batches, ``token_embeddings`` (shape ``(B, T, D)``) added; with ``labels``, also ``ntp_loss`` (nats a
            token, shape ``()``), ``num_targets`` (shape ``()``) and ``logit_scale`` (the factor itself, shape
            ``(1,)``).

        Raises:
            ValueError: If a row does not hold exactly K GEM tokens.
        """
        names = [name for name in ("input_ids", "attention_mask", "labels") if name in features]
        rows = [features[name] for name in names]
        order = _right_padding_order(features["attention_mask"])
        if order is not None:
            rows = [tensor.gather(1, order) for tensor in rows]
        if "labels" in features:
            features["num_targets"] = count_targets(rows[2])
            features["logit_scale"] = self.logit_scale.exp()
        if "labels" in features and "mini_batch_size" in features:
            parts = self._embed_mini_batches(rows, features["mini_batch_size"])
            features["sentence_embedding"], features["ntp_loss"] = parts
            return features
        embedding, loss, states = self._embed(*rows)
        features["sentence_embedding"], features["token_embeddings"] = embedding, states
        if order is not None:
            index = order[..., None].expand_as(states)
            features["token_embeddings"] = torch.zeros_like(states).scatter(1, index, states)
        if loss is not None:
            features["ntp_loss"] = loss
        return features

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embeddings, next-token loss and hidden states of right-padded rows.

        Shapes: ``(B, T)`` each -> ``(B, D)`` or ``(B, K * D)``, ``()``, ``(B, T, D)``
        """
        segments = gem_segments(input_ids, attention_mask, self.gem_token_ids)
        states = self._hidden_states(input_ids, segments, attention_mask)
        loss = None
        if labels is not None:
            head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
            loss = next_token_loss(states, labels, head, config)
        return pool_gem_tokens(states, segments, self.num_gem_tokens, self.pooling), loss, states

    def _embed_mini_batches(self, rows: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
        """As :meth:`_embed`, holding the activations of no more than ``size`` rows at a time, those of like length.

        Args:
            rows: ``input_ids``, ``attention_mask`` and ``labels``, padded on the right. Shape: ``(B, T)`` each
            size: Rows in a mini-batch.

        Returns:
            Embeddings, shape ``(B, D)`` or ``(B, K * D)``, and the mean next-token loss, shape ``()``.
        """

        def run(*part: Tensor) -> tuple[Tensor, Any]:
            embedding, loss, _ = self._embed(*part)
            return embedding, loss * count_targets(part[2])  # type: ignore[operator]  # there are labels

        lengths = rows[1].sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        parts = [
            checkpoint(run, *(tensor[index, : int(lengths[index[0]])] for tensor in rows), use_reentrant=False)
            for index in order.split(size)
        ]
        embeddings, losses = zip(*parts, strict=True)
        return torch.cat(embeddings)[order.argsort()], sum(losses) / count_targets(rows[2]).clamp(min=1)

    def _hidden_states(self, input_ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """Run right-padded rows through the backbone, packed in training, otherwise in groups of like length.

        Sharded training (FSDP, DeepSpeed) needs as many passes on every process, hence one group there.
        Shapes: ``(B, T)`` each -> ``(B, T, D)``, zeros at padding
        """
        run: Any = self._staged_hidden_states if self.freeze_base else self._causal_hidden_states
        lengths = attention_mask.sum(dim=1)
        if self._should_pack(lengths):
            return self._packed_hidden_states(input_ids, segments, attention_mask)
        shared = self._run_shared_prefix(input_ids, segments, lengths)
        cost = BUCKET_COST.get(input_ids.device.type, 2048)
        distributed = torch.distributed
        is_single = not (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        buckets = length_buckets(lengths, cost) if is_single else []
        is_far = lengths > self._rope_limit
        buckets = [part for rows in buckets for part in (rows[is_far[rows]], rows[~is_far[rows]]) if len(part)]
        if len(buckets) <= 1:
            return run(input_ids, segments, attention_mask, shared)
        states: Tensor | None = None
        for rows in buckets:
            width = int(lengths[rows[0]])
            part = run(*(t[rows, :width] for t in (input_ids, segments, attention_mask)), shared)
            if states is None:
                states = part.new_zeros((*input_ids.shape, part.shape[-1]))
            states[rows, :width] = part
        assert states is not None  # there are two buckets or more
        return states

    def _packed_hidden_states(self, input_ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """Run short texts side by side in one row, where each sees itself only. Shapes: ``(B, T)`` -> ``(B, T, D)``"""
        num_rows, width = input_ids.shape
        places = pack_texts(attention_mask.sum(dim=1), width)
        is_real, source = places >= 0, places.clamp(min=0)
        text_ids = places.div(width, rounding_mode="floor")
        packed_segments = segments.flatten()[source].masked_fill(~is_real, PREFIX)
        states = self._run(
            self.model,
            input_ids=input_ids.flatten()[source],
            # Padding is a text of its own, so that no query is left without a key.
            attention_mask=gem_attention_mask(
                self.model.config, packed_segments, torch.ones_like(places), self.model.dtype, text_ids=text_ids
            ),
            position_ids=gem_position_ids(segments, attention_mask).flatten()[source],
        )
        unpacked = states.new_zeros((num_rows * width, states.shape[-1]))
        return unpacked.index_put((places[is_real],), states[is_real]).view(num_rows, width, -1)

    def _should_pack(self, lengths: Tensor) -> bool:
        """True in training where packing is possible, and saves more padding than another pass would cost."""
        implementation = self.model.config._attn_implementation
        if not (torch.is_grad_enabled() and implementation in ("eager", "sdpa") and self._can_pack):
            return False
        longest = int(lengths.max())
        return longest <= self._rope_limit and int((longest - lengths).sum()) > BUCKET_COST["cpu"]

    @property
    def _rope_limit(self) -> float:
        """Length from which "longrope" turns all positions of a batch otherwise; infinite for other models."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return math.inf
        name = "original_max_position_embeddings"
        return float(rope.get(name) or getattr(config, name, None) or math.inf)

    def _run_shared_prefix(
        self, input_ids: Tensor, segments: Tensor, lengths: Tensor
    ) -> tuple[Tensor, DynamicCache] | None:
        """Run the tokens that all rows start with, such as an instruction, once for all of them, where that pays.

        Shapes: ``(B, T)``, ``(B, T)``, ``(B,)`` -> ``(1, P, D)`` and the keys and values of P tokens; or None
        """
        is_possible = self._can_cache and self.model.config._attn_implementation in ("eager", "sdpa")
        if not is_possible or torch.is_grad_enabled() or self.training or len(input_ids) < 2:
            return None
        if int(lengths.max()) > self._rope_limit:
            return None
        width = int(lengths.min())
        is_same = ((input_ids == input_ids[:1]) & (segments == PREFIX))[:, :width].all(dim=0)
        num_shared = int(is_same.cumprod(dim=0).sum())
        if num_shared < max(SHARED_PREFIX_LENGTH, SHARED_PREFIX_SHARE * float(lengths.float().mean())):
            return None
        past = DynamicCache()
        return self._run(self.model, past, input_ids=input_ids[:1, :num_shared]), past

    def _causal_hidden_states(
        self,
        input_ids: Tensor,
        segments: Tensor,
        attention_mask: Tensor,
        shared: tuple[Tensor, DynamicCache] | None = None,
    ) -> Tensor:
        """One pass over whole rows, as the paper has it. Shapes: ``(B, T)`` each -> ``(B, T, D)``"""
        needs_mask = self.num_gem_tokens > 1 or bool((segments == SUFFIX).any())
        if shared is None:
            return self._last_hidden_state(input_ids, *((segments, attention_mask) if needs_mask else ()))
        states, past = _expand(shared, len(input_ids))
        inputs: dict[str, Any] = {"input_ids": input_ids[:, states.shape[1] :]}
        if needs_mask:
            inputs["attention_mask"] = gem_attention_mask(
                self.model.config, segments, attention_mask, self.model.dtype, past
            )
            inputs["position_ids"] = gem_position_ids(segments, attention_mask)[:, states.shape[1] :]
        return torch.cat([states, self._run(self.model, past, **inputs)], dim=1)

    def _staged_hidden_states(
        self,
        input_ids: Tensor,
        segments: Tensor,
        attention_mask: Tensor,
        shared: tuple[Tensor, DynamicCache] | None = None,
    ) -> Tensor:
        """Prefix by the base without gradient, GEM tokens with the LoRA, suffix by the base from the GEM tokens' cache.

        Shapes: ``(B, T)`` each -> ``(B, T, D)``
        """
        is_prefix = (segments == PREFIX) & attention_mask.bool()
        lengths = is_prefix.sum(dim=1)
        width = int(lengths.max())
        is_prefix = is_prefix[:, :width]
        with torch.no_grad():
            text_ids = input_ids[:, :width].masked_fill(~is_prefix, self.pad_token_id)
            text_states, past = self._run_prefix(text_ids, shared)
            past, is_text = self._close_gaps(past, is_prefix)
        gem_states = self._run_gem_tokens(past, is_text, lengths)
        states = gem_states.new_zeros((*input_ids.shape, gem_states.shape[-1]))
        states[:, :width] = text_states.where(is_prefix[..., None], 0)
        states = states.masked_scatter((segments == GEM)[..., None], gem_states)
        rows = (segments == SUFFIX).any(dim=1).nonzero()[:, 0]
        return states if len(rows) == 0 else self._run_suffix(states, rows, input_ids, segments, lengths, past)

    def _run_suffix(
        self, states: Tensor, rows: Tensor, input_ids: Tensor, segments: Tensor, lengths: Tensor, past: DynamicCache
    ) -> Tensor:
        """Have the base read the GEM tokens' keys and values, and nothing else, and write the suffix's states.

        Args:
            states: Hidden states of prefix and GEM tokens. Shape: ``(B, T, D)``
            rows: The rows that have a suffix. Shape: ``(B',)``
            input_ids: Token ids. Shape: ``(B, T)``
            segments: Their segments. Shape: ``(B, T)``
            lengths: Tokens in the prefix. Shape: ``(B,)``
            past: Keys and values of prefix and GEM tokens.

        Returns:
            ``states`` with those of the suffixes. Shape: ``(B, T, D)``
        """
        is_suffix = segments[rows] == SUFFIX
        order = (~is_suffix).int().argsort(dim=1, stable=True)[:, : int(is_suffix.sum(dim=1).max())]
        is_real = is_suffix.gather(1, order)
        suffix_ids = input_ids[rows].gather(1, order).masked_fill(~is_real, self.pad_token_id)
        suffix_states = self._run(
            self.model,
            cache_of((k[rows, :, -self.num_gem_tokens :] for k in layer) for layer in tensors_of(past)),
            input_ids=suffix_ids,
            position_ids=lengths[rows, None] + 1 + torch.arange(order.shape[1], device=order.device),
        )
        index = rows[:, None].expand_as(order)[is_real], order[is_real]
        return states.index_put(index, suffix_states[is_real])

    def _run_prefix(
        self, input_ids: Tensor, shared: tuple[Tensor, DynamicCache] | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Run right-padded text through the base. Shapes: ``(B, T)`` -> ``(B, T, D)`` and its keys and values"""
        nothing = self._gem_rows().new_zeros((1, 0, self._width)), DynamicCache()
        states, past = _expand(shared or nothing, len(input_ids))
        if input_ids.shape[1] == states.shape[1]:
            return states, past
        new_states = self._run(self.model, past, input_ids=input_ids[:, states.shape[1] :])
        return torch.cat([states, new_states], dim=1), past

    def _close_gaps(self, past: DynamicCache, is_text: Tensor) -> tuple[DynamicCache, Tensor]:
        """Move padding to the left where a sliding window counts keys, so that it ends at the last of the text."""
        if not self._has_window or bool(is_text.all()):
            return past, is_text
        order = is_text.int().argsort(dim=1, stable=True)
        moved = cache_of((take_tokens(tensor, order) for tensor in layer) for layer in tensors_of(past))
        return moved, is_text.gather(1, order)

    def _run_gem_tokens(self, past: DynamicCache, is_text: Tensor, lengths: Tensor) -> Tensor:
        """Append the K GEM tokens to a cache, in place.

        Args:
            past: Keys and values of P tokens.
            is_text: False for keys that are padding. Shape: ``(B, P)``
            lengths: The position of the GEM tokens, which is the number of tokens before them. Shape: ``(B,)``

        Returns:
            Hidden states of the GEM tokens. Shape: ``(B, K, D)``
        """
        shape, model = (len(lengths), self.num_gem_tokens), self._gem_model
        real = F.pad(is_text, (0, self.num_gem_tokens), value=True)
        mask: Any = real
        if self.num_gem_tokens > 1:
            segments = F.pad(torch.full(shape, GEM, device=lengths.device), (is_text.shape[1], 0), value=PREFIX)
            mask = gem_attention_mask(model.config, segments, real, model.dtype, past)
        elif bool(is_text.all()):
            mask = None
        return self._run(
            model,
            past,
            inputs_embeds=self._gem_rows().expand(len(lengths), -1, -1),
            attention_mask=mask,
            position_ids=lengths[:, None].expand(shape),
        )

    def _gem_rows(self) -> Tensor:
        """Embeddings of the GEM tokens. Shape: ``(K, D)``"""
        if self.freeze_base:
            return self.gem_embeddings.to(self.model.dtype)
        return self.model.get_input_embeddings()(torch.tensor(self.gem_token_ids, device=self.model.device))

    def _last_hidden_state(
        self, input_ids: Tensor, segments: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Run the backbone on right-padded rows; without ``segments`` as a plain causal model, with no mask at all.

        Causality keeps padding on the right from every real token, so that only the GEM rule needs a mask.
        Shapes: ``(B, T)`` each -> ``(B, T, D)``
        """
        if segments is None or attention_mask is None:
            return self._run(self.model, input_ids=input_ids)
        mask = gem_attention_mask(self.model.config, segments, attention_mask, self.model.dtype)
        position_ids = gem_position_ids(segments, attention_mask)
        return self._run(self.model, input_ids=input_ids, attention_mask=mask, position_ids=position_ids)

    def _run(self, model: Any, past: DynamicCache | None = None, **inputs: Any) -> Tensor:
        """Run a model without its language-model head; a cache is read, and written to. Shape: ``(B, T, D)``"""
        backbone = model.get_decoder() if model.base_model is model else model.base_model
        if past is None:
            return backbone(use_cache=False, **inputs).last_hidden_state
        num_past = past.get_seq_length()
        inputs[cache_name(type(backbone).forward)] = past
        states = backbone(use_cache=True, **inputs).last_hidden_state
        if past.get_seq_length() != num_past + states.shape[1]:
            raise RuntimeError(f"{type(backbone).__name__} did not write what it read to the cache it was given.")
        return states

    # ---- one cache for embedding and generation

    @torch.no_grad()
    def prefill(self, texts: Prompts, *, prompt: str | None = None, max_length: int | None = None) -> GemCache:
        """Read texts once, to embed and to continue them.

        Args:
            texts: Texts or chat messages, as :meth:`generate` takes them.
            prompt: Put before every text; none of the model's prompts is by itself.
            max_length: Tokens in a row, the K places for GEM tokens included, instead of :attr:`max_seq_length`.
                Longer texts are truncated as `encode` does, with a warning.

        Returns:
            A cache of B rows, whose GEM tokens are yet to come.
        """
        max_length = self.max_seq_length if max_length is None else max_length
        rows, _ = self._tokenize_prompts(texts, prompt or "")
        width = max_length - self.num_gem_tokens
        if any(len(row) > width for row in rows):
            logger.warning(
                f"Some of {len(rows)} texts were truncated to {width} tokens; raise max_length to keep more."
            )
            rows, _ = self._tokenize_prompts(texts, prompt or "", max_length)
        return self._append(None, rows)

    @torch.no_grad()
    def extend(self, cache: GemCache, texts: str | Sequence[str]) -> GemCache:
        """Append text to what a cache has read, at the price of the new tokens.

        Args:
            cache: What was read before; it stays as it is.
            texts: One text for each row, or one for all. Each is tokenised on its own, without special tokens.

        Returns:
            A new cache.

        Raises:
            ValueError: If there are more or fewer texts than rows, or they exceed the model's context.
        """
        texts = [texts] * len(cache) if isinstance(texts, str) else list(texts)
        if len(texts) != len(cache):
            raise ValueError(f"extend needs one text for each of {len(cache)} rows, or one for all, got {len(texts)}.")
        return self._append(cache, self._tokenize(texts, add_special_tokens=False))

    def _append(self, cache: GemCache | None, rows: list[list[int]]) -> GemCache:
        self._require_cache()
        if not rows:
            raise ValueError("There is nothing to read: an empty list was given.")
        new = self.pad([torch.tensor(row, dtype=torch.long) for row in rows], padding_side="right")
        ids, real = (new[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        with _Evaluating(self.model):
            if cache is None:
                self._check_context(real)
                past = self._run_prefix(ids)[1]
            else:
                self._check_cache(cache)
                past, num_new = cache.past_key_values(), ids.shape[1]
                ids, real = torch.cat([cache.input_ids, ids], dim=1), torch.cat([cache.attention_mask, real], dim=1)
                self._check_context(real)
                if num_new:
                    positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
                    inputs = {"input_ids": ids[:, -num_new:], "attention_mask": real.long(), "position_ids": positions}
                    self._run(self.model, past, **inputs)
        return self._make_cache(past, ids, real)

    def _make_cache(self, past: DynamicCache, input_ids: Tensor, real: Tensor) -> GemCache:
        tags = torch.full((len(real),), self._weights_tag(), device=real.device)
        mask = real.bool()
        return GemCache(tensors_of(past), input_ids=input_ids, attention_mask=mask, weights_tag=tags)._keep(mask)

    def _count_changes(self) -> int:
        """A number that grows whenever the language model's weights are changed in place."""
        return sum(weight._version for weight in self.model.parameters())

    def _weights_tag(self) -> int:
        """A number that tells the language model's weights from others, of a sample of their values."""
        weights = list(self.model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        chosen = [*weights[:: max(1, len(weights) // 16)], *trained[:: max(1, len(trained) // 16)]]
        flat = [weight.detach().flatten() for weight in chosen]
        sample = torch.cat([weight[:: max(1, len(weight) // 16)][:16].float() for weight in flat]).cpu()
        return int.from_bytes(hashlib.sha256(sample.numpy().tobytes()).digest()[:7], "big")

    @torch.no_grad()
    def summarize(self, cache: GemCache) -> Tensor:
        """Embed what a cache has read, at the price of K tokens.

        Args:
            cache: From :meth:`prefill`, :meth:`extend` or :meth:`generate`; it stays as it is.

        Returns:
            What `encode` gives for the same tokens, before further modules.
            Shape: ``(B, D)``, or ``(B, K * D)`` for concat

        Raises:
            ValueError: If the cache is not of this model.
        """
        states, _ = self._summarize(cache)
        return pool_gem_tokens(states, torch.full_like(states[..., 0], GEM), self.num_gem_tokens, self.pooling)

    def _summarize(self, cache: GemCache) -> tuple[Tensor, DynamicCache]:
        """Hidden states of the GEM tokens, shape ``(B, K, D)``, and a cache that ends in them."""
        self._check_cache(cache)
        self._check_context(F.pad(cache.attention_mask, (0, 1), value=True))
        past = cache.past_key_values()
        with _Evaluating(self):
            return self._run_gem_tokens(past, cache.attention_mask, cache.lengths), past

    def _check_cache(self, cache: GemCache) -> None:
        if getattr(cache, "fields", None) != GemCache.fields:  # the class may come from another checkpoint's copy
            raise ValueError(
                f"A GemCache is needed, got {type(cache).__name__}. `prefill` makes one, and so does `generate` with "
                "return_cache=True; a cache of transformers may have dropped what lies outside a sliding window."
            )
        config = self.model.config.get_text_config()
        keys = cache.layers[0][0] if cache.layers else None
        if keys is None:
            return
        if len(cache.layers) > config.num_hidden_layers or keys.dtype != self.model.dtype:
            raise ValueError(
                f"The cache has {len(cache.layers)} layers of {keys.dtype}, the model {config.num_hidden_layers} of "
                f"{self.model.dtype}: it was made by another model, or cast. Read the texts again with `prefill`."
            )
        if keys.device != self.model.device:
            raise ValueError(f"The cache is on {keys.device}, the model on {self.model.device}. Use cache.to(device).")
        self._check_tags(cache.weights_tag)

    def _check_tags(self, tags: Tensor) -> None:
        if bool((tags != self._weights_tag()).any()):
            raise ValueError(
                "The cache was made by other weights than the model's: by another model, or before training. Read the "
                "texts again."
            )

    def _check_context(self, real: Tensor) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        limit = min(limit, self._rope_limit)
        longest = int(real.sum(dim=1).max()) if len(real) else 0
        if longest > limit:
            raise ValueError(
                f"{longest} tokens exceed the model's context of {limit} (with longrope: the original one, as keys are "
                "turned otherwise beyond it). Shorten the texts, or the cache with cache.crop(...)."
            )

    @torch.no_grad()
    def compress(self, texts: Prompts | GemCache) -> GemMemory:
        """Keep of texts only the keys and values of their K GEM tokens (paper, table 6).

        Args:
            texts: Texts or chat messages, or a cache that has read them.

        Returns:
            A memory of B rows, whose size does not depend on the texts' length.
        """
        cache: Any = texts if hasattr(texts, "fields") else self.prefill(texts)
        states, past = self._summarize(cache)
        last = slice(-self.num_gem_tokens, None)
        layers = [(keys[:, :, last], values[:, :, last]) for keys, values in tensors_of(past)]
        return GemMemory(layers, lengths=cache.lengths, last_hidden_state=states[:, -1], weights_tag=cache.weights_tag)

    @torch.no_grad()
    def reconstruct(self, memory: GemMemory, **generate_kwargs: Any) -> list[str]:
        """Write the texts that a memory was made of, as far as it holds them (paper, table 6).

        It takes a model trained with the reconstruction task of :class:`gem_st.GemLoss`. Decoding is greedy unless
        asked otherwise, and stops after as many tokens as the text had.

        Args:
            memory: From :meth:`compress`.
            **generate_kwargs: Passed to transformers' ``generate``; the first token is always the most likely one.

        Returns:
            One text for each row.

        Raises:
            ValueError: If it is no memory.
        """
        if getattr(memory, "fields", None) != GemMemory.fields:
            raise ValueError(f"A GemMemory is needed, got {type(memory).__name__}. `compress` makes one.")
        self._check_tags(memory.weights_tag)
        num_new = (memory.lengths - self.num_special_tokens).clamp(min=0).tolist()
        longest = max(num_new, default=0)
        if longest < 1:
            return [""] * len(memory)
        logits = output_logits(
            memory.last_hidden_state, self.model.get_output_embeddings(), self.model.config.get_text_config()
        )
        if not self.freeze_base:
            logits[:, self.gem_token_ids] = -torch.inf
        # The ids of the GEM tokens are not read again: their keys and values are there.
        ids = F.pad(logits.argmax(dim=-1, keepdim=True), (self.num_gem_tokens, 0), value=self.pad_token_id)
        sequences = ids
        if longest > 1:
            sequences = self._generate(
                ids,
                torch.ones_like(ids),
                cache_of(memory.layers),
                position_ids=memory.lengths[:, None] + 1 + torch.arange(-self.num_gem_tokens, 1, device=ids.device),
                **{"do_sample": False, "max_new_tokens": longest - 1, **generate_kwargs},
            ).sequences
        new = sequences[:, self.num_gem_tokens :]
        written = self._is_written(new, generate_kwargs)
        decode: Any = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [decode(row[mask][:limit]) for row, mask, limit in zip(new, written, num_new, strict=True)]

    @property
    def num_special_tokens(self) -> int:
        """Special tokens, BOS in most models, that the tokenizer puts before a text."""
        return count_special_tokens(self.tokenizer)

    # ---- generation

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        cache: GemCache | None = None,
        return_cache: bool = False,
        **generate_kwargs: Any,
    ) -> str | list[str] | GeneratedText:
        """Continue text, or answer chat messages, as the language model that this model still is.

        Args:
            prompts: A text, a list of texts, the messages of a conversation (dicts with ``role`` and ``content``),
                or a list of such conversations. Messages need a tokenizer with a chat template.
            cache: What was read before, instead of prompts; it stays as it is.
            return_cache: Also return what was read and written, without the end token, to be embedded or extended.
            **generate_kwargs: Passed to transformers' ``generate``, e.g. ``max_new_tokens=40, do_sample=True``.

        Returns:
            The new text, without the prompt: a string for a single prompt, otherwise, and for a cache, a list of
            strings. With ``num_return_sequences`` above 1 always a list, all sequences of a prompt in a row. With
            ``return_cache`` the pair ``(text, cache)``.

        Raises:
            ValueError: If a prompt is not text, messages are given and the tokenizer has no chat template, or there
                is not either a prompt or a cache to start from.
        """
        if (prompts is None) == (cache is None):
            raise ValueError("generate needs either prompts or a cache, and not both.")
        is_single, past = False, None
        if return_cache:
            self._require_cache()
            past = DynamicCache()
            if self._option("num_beams", generate_kwargs, 1) > 1:
                raise ValueError("return_cache=True needs num_beams=1.")
        if cache is None:
            assert prompts is not None
            rows, is_single = self._tokenize_prompts(prompts)
            if not rows and return_cache:
                raise ValueError("There is nothing to read: an empty list was given.")
            if not rows:
                return []
            empty = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            if any(not row for row in rows) and not empty:
                raise ValueError("An empty prompt needs a tokenizer with a BOS token to start from; give some text.")
            inputs = self.pad([torch.tensor(row or empty) for row in rows], padding_side="left")
            ids, real = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        else:
            self._check_cache(cache)
            if len(cache) == 0 or bool((cache.lengths == 0).any()):
                raise ValueError("A row of the cache is empty: there is nothing to continue.")
            ids, real = cache.input_ids, cache.attention_mask.long()
            # The last token is read again, for its logits.
            past = cache_of((tensor[:, :, :-1] for tensor in layer) for layer in cache.layers)
            names = ("num_beams", "num_return_sequences")
            past.batch_repeat_interleave(max(self._option(name, generate_kwargs, 1) for name in names))
        output = self._generate(ids, real, past, **generate_kwargs)
        written = self._is_written(output.sequences[:, ids.shape[1] :], generate_kwargs)
        keep = F.pad(written, (ids.shape[1], 0), value=True)
        rows_and_masks = zip(output.sequences, keep, strict=True)
        texts: list[str] = [self._decode_new(sequence[mask], ids.shape[1]) for sequence, mask in rows_and_masks]
        text = texts[0] if is_single and len(texts) == 1 else texts
        return GeneratedText(text, self._cache_of_output(output, real, written)) if return_cache else text

    def _generate(
        self, input_ids: Tensor, attention_mask: Tensor, past: DynamicCache | None, **generate_kwargs: Any
    ) -> Any:
        suppressed = {*(generate_kwargs.pop("suppress_tokens", None) or [])}
        if not self.freeze_base:
            suppressed |= {*self.gem_token_ids}
        if suppressed:
            generate_kwargs["suppress_tokens"] = sorted(suppressed)
        if past is not None:
            if generate_kwargs.get("use_cache", True) is False:
                raise ValueError("use_cache=False was given, but a cache is to be read or returned.")
            is_assisted = any(self._option(name, generate_kwargs) for name in ASSISTED_GENERATION)
            if is_assisted and past.get_seq_length():
                raise ValueError(f"Assisted generation ({', '.join(ASSISTED_GENERATION)}) cannot start from a cache.")
            generate_kwargs |= {"use_cache": True, cache_name(create_masks_for_generate): past}
        generate_kwargs = {"pad_token_id": self.pad_token_id, **generate_kwargs, "return_dict_in_generate": True}
        with _Evaluating(self.model):
            return self.model.generate(input_ids, attention_mask=attention_mask, **generate_kwargs)

    def _cache_of_output(self, output: Any, prompt_mask: Tensor, written: Tensor) -> GemCache:
        """What transformers' ``generate`` has read and written, the last token included, as a :class:`GemCache`."""
        sequences = output.sequences
        prompt_mask = prompt_mask.bool().repeat_interleave(len(sequences) // len(prompt_mask), dim=0)
        real = torch.cat([prompt_mask, written], dim=1)
        past = output[cache_name(create_masks_for_generate)]
        num_read = past.get_seq_length()
        cache = self._make_cache(past, sequences[:, :num_read], real[:, :num_read])
        rest = [ids[keep].tolist() for ids, keep in zip(sequences[:, num_read:], real[:, num_read:], strict=True)]
        with torch.no_grad():
            return self._append(cache, rest)

    def _is_written(self, new_ids: Tensor, generate_kwargs: dict[str, Any]) -> Tensor:
        """True for tokens before the end token and the padding behind it. Shapes: ``(B, T)`` -> ``(B, T)``"""
        eos = self._option("eos_token_id", generate_kwargs)
        eos_ids = torch.as_tensor([] if eos is None else eos, device=new_ids.device).reshape(-1)
        is_over = torch.isin(new_ids, eos_ids).cumsum(dim=1) > 0
        is_text = new_ids != generate_kwargs.get("pad_token_id", self.pad_token_id)
        is_padding = is_text.flip(1).cumsum(dim=1).flip(1) == 0
        return ~is_over & ~is_padding

    def _option(self, name: str, generate_kwargs: dict[str, Any], default: Any = None) -> Any:
        """An option of `generate`: as given, else of the given `generation_config`, else of the model's."""
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        value = generate_kwargs.get(name, getattr(config, name, None))
        return default if value is None else value

    def _tokenize_prompts(
        self, prompts: Prompts, prefix: str = "", max_length: int | None = None
    ) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether a single one was given."""
        if not isinstance(prompts, str | list | tuple):
            raise ValueError(f"Prompts are a text, messages, or a list of either, got {type(prompts).__name__}.")
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
        batch: list[Any] = [prompts] if is_single else list(prompts)
        if not batch:
            return [], is_single
        if isinstance(batch[0], list):
            return self._tokenize(self._render_chat(batch), "", max_length, add_special_tokens=False), is_single
        return self._tokenize(batch, prefix, max_length), is_single

    def _decode_new(self, sequence: Tensor, prompt_length: int) -> str:
        """Text of the tokens behind a prompt; decoded with it, since some tokenizers drop the first space of a text."""
        decode: Any = partial(self.tokenizer.decode, skip_special_tokens=True)
        prompt, whole = decode(sequence[:prompt_length]), decode(sequence)
        return whole[len(prompt) :] if whole.startswith(prompt) else decode(sequence[prompt_length:])

    def _render_chat(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "Chat messages were given, but the tokenizer has no chat template. Pass plain text to `generate`, or "
                "use an instruction-tuned base."
            )
        rendered: Any = self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        return rendered

    # ---- checkpoints

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the ``*ForCausalLM``, the tokenizer, ``gem_config.json`` and this file into a folder.

        Args:
            output_path: The folder.
            *args: Not used.
            safe_serialization: Only True: weights are always safetensors.
            **kwargs: Passed to ``save_pretrained`` of the model, e.g. ``max_shard_size="5GB"``.

        Weights sharded over processes (FSDP2, ZeRO 3) are gathered, for which every process has to call this; the first
        one writes.

        Raises:
            ValueError: If ``safe_serialization`` is False, there is no adapter to be saved alone, or the base beside
                an adapter was changed.
        """
        if not safe_serialization:
            raise ValueError("GEM checkpoints hold safetensors only; save with safe_serialization=True.")
        if not (self.save_base or self.freeze_base or self._has_lora):
            raise ValueError(
                "save_base=False needs an adapter: freeze_base=True, or model.add_adapter(LoraConfig(...))."
            )
        if self._is_adapter and not (self.freeze_base and self.save_base) and not self.base_model_name_or_path:
            raise ValueError(
                "An adapter is saved without its base, and has to name it: set model[0].base_model_name_or_path (and "
                "base_model_revision) to the base's Hub id."
            )
        with _Gathered(self) as is_first:
            if is_first and _may_write():
                self._write(Path(output_path), **kwargs)

    def _write(self, folder: Path, **kwargs: Any) -> None:
        """Write a checkpoint of weights that are whole in memory."""
        if self._is_adapter:
            self._check_base_unchanged()
        self._remove_leftovers(folder)
        if self.freeze_base and self.save_base:
            self._copy_base(folder, **kwargs)
        elif not self._is_adapter:
            self._save_model(folder, **kwargs)
        if self.save_base and not self._has_lora:
            if backend := getattr(self.tokenizer, "backend_tokenizer", None):
                backend.no_truncation()
            self.save_tokenizer(str(folder))
        if self._is_adapter:
            self._save_adapter(folder / self.adapter_folder)
        self.save_config(str(folder))
        self._require_versions(folder / "config_sentence_transformers.json")
        remote_code = folder / self.remote_code_file_name
        if not remote_code.exists() or not remote_code.samefile(__file__):
            shutil.copyfile(__file__, remote_code)

    @property
    def _is_adapter(self) -> bool:
        """True if checkpoints hold an adapter, be it beside a frozen base or a LoRA on every token."""
        return self.freeze_base or self._has_lora

    @property
    def _has_lora(self) -> bool:
        """True if a PEFT adapter works on every token, as `SentenceTransformer.add_adapter` makes it."""
        return bool(getattr(self.model, "peft_config", None))

    def _remove_leftovers(self, folder: Path) -> None:
        """Remove what another form of checkpoint left in the folder, unless this one's base lies there."""
        if not folder.is_dir() or (self._base_folder.is_dir() and folder.samefile(self._base_folder)):
            return
        names = ("config.json", "generation_config.json", "model.safetensors.index.json")
        for file in [*folder.glob("model*.safetensors"), *(folder / name for name in names)]:
            file.unlink(missing_ok=True)
        shutil.rmtree(folder / self.adapter_folder, ignore_errors=True)

    @staticmethod
    def _require_versions(config_path: Path) -> None:
        """Add the versions needed to what Sentence Transformers has just written, and does not keep by itself."""
        if not config_path.exists():
            return
        for _ in range(100):  # other processes of a training may be writing the same into it at this moment
            with contextlib.suppress(json.JSONDecodeError):
                config = json.loads(config_path.read_text(encoding="utf-8"))
                config["requirements"] = {**REQUIREMENTS, **config.get("requirements", {})}
                config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
                return
            time.sleep(0.1)

    def _save_adapter(self, folder: Path) -> None:
        """Write the LoRA in PEFT's format, the GEM rows, and what the base is recognised by."""
        peft, model = _import_peft(), self._gem_model
        status = peft.get_model_status(model)
        if status.enabled is not True:
            raise ValueError("The adapter is disabled, so that a reload would differ. Enable it in all layers first.")
        if status.active_adapters == "irregular" or len(status.active_adapters) != 1:
            raise ValueError(f"One active adapter can be saved, but these are: {status.active_adapters}.")
        name = status.active_adapters[0]
        folder.mkdir(parents=True, exist_ok=True)
        lora = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        lora = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in lora.items()}
        save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(model.peft_config[name])
        config.base_model_name_or_path = self.get_config_dict().get("base_model_name_or_path")
        config.inference_mode = True
        config.save_pretrained(folder)
        matrices = [] if self.freeze_base else self._vocabulary_matrices()
        rows = [self.gem_embeddings] if self.freeze_base else [matrix[self.gem_token_ids] for matrix in matrices]
        named = {f"gem_rows.{index}": row.detach().contiguous() for index, row in enumerate(rows)}
        save_file(named, folder / "gem_rows.safetensors", metadata={"format": "pt"})
        is_whole = self.freeze_base and self.save_base
        fingerprint = fingerprint_base(folder.parent, self.tokenizer) if is_whole else self._fingerprint
        text = json.dumps(fingerprint, indent=2) + "\n"
        (folder / "base_fingerprint.json").write_text(text, encoding="utf-8")
        if not self.save_base and is_local(self.base_model_name_or_path):
            logger.warning(
                f"The checkpoint names its base by a folder of this machine, {self.base_model_name_or_path}. Set "
                "model[0].base_model_name_or_path (and base_model_revision) to the base's Hub id before saving."
            )

    def _load_adapter(self, model_name_or_path: str, hub_kwargs: dict[str, Any]) -> None:
        """Read what :meth:`_save_adapter` wrote, after making sure that the base is the one it was trained on.

        Raises:
            ValueError: If a file is missing, or the base is another one.
        """
        subfolder = str(Path(hub_kwargs.get("subfolder") or "", self.adapter_folder))
        names = ("adapter_config.json", "adapter_model.safetensors", "gem_rows.safetensors", "base_fingerprint.json")
        paths = [cached_file(model_name_or_path, name, **{**hub_kwargs, "subfolder": subfolder}) for name in names]
        saved = json.loads(Path(str(paths[-1])).read_text(encoding="utf-8"))
        if different := [key for key, value in saved.items() if value != self._fingerprint[key]]:
            raise ValueError(
                f"{model_name_or_path} was trained on another base than {self._base_folder}: {' and '.join(different)} "
                f"differ. It needs {self.base_model_name_or_path or 'the base it was saved with'}, unchanged."
            )
        rows = load_file(str(paths[2]))
        with torch.no_grad():
            if self.freeze_base:
                self.gem_embeddings.copy_(rows["gem_rows.0"])
            else:
                for index, weight in enumerate(self._vocabulary_matrices()):
                    weight[self.gem_token_ids] = rows[f"gem_rows.{index}"].to(weight)
        config = _import_peft().PeftConfig.from_pretrained(str(Path(str(paths[0])).parent))
        config.inference_mode = False
        model = self._add_lora(config)
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(str(paths[1])).items()}
        expected = _import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
        if expected.keys() != state.keys():
            raise ValueError(
                f"{paths[1]} does not fit its adapter_config.json: {sorted(expected.keys() ^ state.keys())}."
            )
        _import_peft().set_peft_model_state_dict(model, state)

    def _check_base_unchanged(self) -> None:
        """Make sure that base and adapter will find each other: on the disk and in memory, weights are as loaded.

        All weights are compared if any was written to since loading, otherwise a sample.

        Raises:
            ValueError: If they are not.
        """
        if not self._base_folder.is_dir():
            return
        if fingerprint_base(self._base_folder, self.tokenizer) != self._fingerprint:
            raise ValueError(f"The base in {self._base_folder} was changed since it was loaded. Put it back to save.")
        # In full mode the vocabulary may hold GEM rows of our own.
        skipped = [] if self.freeze_base else [id(matrix) for matrix in self._vocabulary_matrices()]
        weights = {name.replace(".base_layer.", "."): weight for name, weight in self.model.named_parameters()}
        # Some optimizers write without being counted, but only to what takes gradients.
        is_touched = self._count_changes() != self._base_versions
        is_touched |= any(weight.requires_grad for weight in self.model.parameters())
        for name, stored, rows in read_weights(self._base_folder, sample=not is_touched):
            weight = weights.get(name)
            if weight is None or id(weight) in skipped or not weight.is_floating_point():
                continue  # quantised, or named otherwise in memory
            if weight[rows].shape == stored.shape and not torch.equal(weight[rows].cpu(), stored.to(weight.dtype)):
                raise ValueError(
                    f"The base's weight {name} was changed after loading, so that an adapter saved for "
                    f"{self._base_folder} would not fit it. Use freeze_base=False, or do not unfreeze the base."
                )

    def _copy_base(self, folder: Path, **kwargs: Any) -> None:
        """Copy the base's files byte for byte; written anew only where they are not safetensors, or gone."""
        weights = weight_files(self._base_folder)
        if not weights:
            logger.warning(f"{self._base_folder} holds no safetensors (any more): the base's weights are written anew.")
            self.model.save_pretrained(folder, **kwargs)
            return
        others = ("config.json", "generation_config.json", "model.safetensors.index.json")
        for file in [*weights, *(self._base_folder / name for name in others)]:
            target = folder / file.name
            if file.exists() and not (target.exists() and target.samefile(file)):
                shutil.copyfile(file, target)

    def merge(self) -> None:
        """Merge a LoRA that works on every token (`SentenceTransformer.add_adapter`) into the weights, in place.

        Embeddings stay the same to 1e-5; afterwards the model is saved as a whole, without an adapter.

        Raises:
            ValueError: If there is nothing to merge, or merging would not be exact.
        """
        if self.freeze_base:
            raise ValueError(
                "The LoRA of a frozen base cannot be merged: it works on GEM tokens only, and merged weights would "
                "work on the text as well, which changes both the embeddings and the generator. Save it as it is."
            )
        if not self._has_lora:
            raise ValueError("There is no adapter to merge. model.add_adapter(LoraConfig(...)) adds one.")
        if dtypes := {p.dtype for p in self.model.parameters()} - {torch.float32}:
            raise ValueError(
                f"Merging into weights of {', '.join(sorted(map(str, dtypes)))} would round them, and change the "
                'embeddings. Save the adapter, load it with model_kwargs={"dtype": "float32"}, merge, cast afterwards.'
            )
        has_lora_on_head = any(hasattr(module, "lora_A") for module in self.model.get_output_embeddings().modules())
        if has_lora_on_head and self.model.config.get_text_config().tie_word_embeddings:
            raise ValueError("The LoRA is on an output head that is tied to the embedding: merging would change both.")
        modules: list[tuple[str, Any]] = list(self.model.named_modules())
        for name, module in modules:
            if hasattr(module, "unload_and_optionally_merge_module"):  # the embedding, with its trained rows
                merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            elif hasattr(module, "get_base_layer") and ".token_adapter" not in name:
                module.merge(safe_merge=True)
                merged = module.get_base_layer()
            else:
                continue
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, merged)
        del self.model.peft_config
        self.model._hf_peft_config_loaded = False
        self.model.requires_grad_(True)
        self.save_base = True

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> GemTransformer:
        """Load a GEM checkpoint from a folder or the Hub, as Sentence Transformers calls it.

        Args:
            model_name_or_path: Folder or Hub id.
            subfolder: Folder inside it.
            token: Hub token.
            cache_folder: Folder for downloads.
            revision: Branch, tag or commit.
            local_files_only: Do not ask the Hub.
            init_defaults: Not used; all settings are saved.
            trust_remote_code: Passed on, for bases that bring code of their own.
            model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.
            processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``.
            config_kwargs: Passed to ``AutoConfig.from_pretrained``.
            backend: Only ``"torch"``.
            **kwargs: Not used.

        Raises:
            ValueError: If the checkpoint holds no GEM settings, or ``backend`` is not ``"torch"``.
        """
        if backend != "torch":
            raise ValueError(f"GEM checkpoints run on backend='torch', got {backend!r}.")
        hub_kwargs = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        saved = cls._load_gem_config(model_name_or_path, hub_kwargs)
        if not saved:
            raise ValueError(
                f"{model_name_or_path} holds no {cls.config_file_name}: it is not a GEM checkpoint. To make one of a "
                f"base model, use SentenceTransformer(modules=[GemTransformer({str(model_name_or_path)!r})])."
            )
        return cls(
            model_name_or_path,
            num_gem_tokens=saved["num_gem_tokens"],
            pooling=saved["pooling"],
            freeze_base=saved.get("freeze_base", False),
            model_kwargs={**hub_kwargs, "trust_remote_code": trust_remote_code, **(model_kwargs or {})},
            processor_kwargs={**hub_kwargs, "trust_remote_code": trust_remote_code, **(processor_kwargs or {})},
            config_kwargs={**hub_kwargs, "trust_remote_code": trust_remote_code, **(config_kwargs or {})},
        )


def inject_adapter(model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    """Add a trainable adapter to a model of transformers by PEFT's own functions, and make it the active one.

    Raises:
        ImportError: If PEFT is missing, or it and transformers do not fit each other.
        TypeError: If the configuration is none of PEFT's.
        ValueError: If there is an adapter of that name.
    """
    peft, name = _import_peft(), adapter_name or "default"
    if not isinstance(adapter_config, peft.PeftConfig):
        raise TypeError(f"An adapter needs a PeftConfig, e.g. LoraConfig(...), got {type(adapter_config).__name__}.")
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"There is an adapter {name!r} already. Give the new one another adapter_name.")
    with _OneLineForPeft():
        peft.inject_adapter_in_model(adapter_config, model, name)
    model._hf_peft_config_loaded = True  # as transformers marks a model that has an adapter


def _add_adapter_with_gem_rows(
    model: Any, gem_token_ids: list[int] | None, adapter_config: Any, adapter_name: str | None = None
) -> None:
    """Have PEFT train the GEM tokens' embeddings along with a LoRA, and save them without the rest of the matrix.

    Raises:
        ValueError: If the base is frozen.
    """
    if gem_token_ids is None:
        raise ValueError("A frozen base takes no further adapter. Use GemTransformer(..., freeze_base=False).")
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    others = [getattr(adapter_config, key, None) or () for key in ("target_modules", "modules_to_save")]
    is_trained = any(embedding.rpartition(".")[2] in names for names in others if not isinstance(names, str))
    indices = getattr(adapter_config, "trainable_token_indices", ())
    if indices is None and not is_trained:
        adapter_config.trainable_token_indices = gem_token_ids
    elif isinstance(indices, list):
        adapter_config.trainable_token_indices = sorted({*indices, *gem_token_ids})
    inject_adapter(model, adapter_config, adapter_name)


def is_local(base: str) -> bool:
    """True for a base that is named by a folder, also one that is gone by now; empty names are none of the Hub's."""
    return Path(base).is_absolute() or Path(base).is_dir()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads a model's weights from; empty if there are none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def read_weights(folder: Path, *, sample: bool) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, rows and row numbers of each weight in a model's files; of a sample the first, middle and last row."""
    paths = weight_files(folder)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                weight = file.get_slice(name)
                if not sample:
                    yield name, file.get_tensor(name), ...
                elif rows := _sample_rows(weight.get_shape()):
                    yield name, torch.cat([weight[row : row + 1] for row in rows]), rows
    for path in [] if paths else sorted(folder.glob("pytorch_model*.bin")):
        for name, weight in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
            if not sample:
                yield name, weight, ...
            elif rows := _sample_rows(weight.shape):
                yield name, weight[rows], rows


def _sample_rows(shape: Sequence[int]) -> list[int]:
    num_rows = shape[0] if len(shape) else 0
    return sorted({0, num_rows // 2, num_rows - 1}) if num_rows else []


def fingerprint_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """What a base is recognised by: hashes of its config, its tokenizer and a sample of its weights.

    They are taken from files, so that they do not depend on the data type or quantisation it is loaded with.
    """
    volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = "The quick brown fox, 3.14 \u00e9\u4e16 \n"
    tokens = [sorted(tokenizer.get_vocab().items()), tokenizer(text)["input_ids"]]
    weights = sorted(
        (name, str(sample.dtype), hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, sample, _ in read_weights(folder, sample=True)
    )
    parts = {"config": _without(config, *volatile), "tokenizer": tokens, "weights": weights}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() if part else None
        for name, part in parts.items()
    }


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _import_peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("A LoRA needs PEFT: pip install peft")
    with _OneLineForPeft():
        return importlib.import_module("peft")


class _OneLineForPeft:
    """Context in which an error of PEFT and transformers about each other's version says what to install."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *details: object) -> None:
        is_of_version = isinstance(error, ValueError) and "version" in str(error)
        if not is_of_version and not isinstance(error, ImportError | AttributeError):
            return
        installed = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in TESTED_TOGETHER)
        command = " ".join(f"{name}=={version}" for name, version in TESTED_TOGETHER.items())
        raise ImportError(f"{installed} do not work together ({error}). These do: pip install {command}") from error


def _cast_trainable(model: nn.Module) -> None:
    """Cast what is trained to float32, in place."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _tensors_in(module: nn.Module) -> list[tuple[dict[str, Any], str, str, Tensor]]:
    """Each floating-point weight and buffer: what holds it, its name in there, its name in the module, the tensor."""
    return [
        (held, name, WRAPPERS.sub("", f"{prefix}.{name}"), tensor)
        for prefix, owner in module.named_modules()
        for held in (owner._parameters, owner._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.is_floating_point()
    ]


def share_weights(model: Any) -> Any:
    """A second model made of the same layers and weights, to which adapters can be added without touching the first.

    Modules that hold modules are copied; those at the leaves, all parameters and the configurations are shared, so
    that no memory is spent and moving or casting one moves or casts both.
    """
    shared: list[Any] = [model.config, model.config.get_text_config(), model.generation_config, *model.parameters()]
    shared += [module for module in model.modules() if not any(module.children())]
    return copy.deepcopy(model, {id(part): part for part in shared})


def _expand(shared: tuple[Tensor, DynamicCache], num_rows: int) -> tuple[Tensor, DynamicCache]:
    """Repeat the states, keys and values of one row, without copying them."""
    states, past = shared
    layers = [[tensor.expand(num_rows, -1, -1, -1) for tensor in layer] for layer in tensors_of(past)]
    return states.expand(num_rows, -1, -1), cache_of(layers)


def _has_window(config: Any) -> bool:
    """True if some layer does not see every key, so that gaps between keys would count."""
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return True
    return any(value for key, value in config.to_dict().items() if "window" in key or "chunk" in key)


def _check_lora_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what would change or train the base's own weights beside a LoRA."""
    if options.get("bias", "none") != "none":
        raise ValueError(f"bias={options['bias']!r} trains biases of the frozen base. Use bias='none'.")
    initial = options.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={initial!r} changes the weights of the frozen base. Use True, 'gaussian' or "
            "'orthogonal'."
        )
    return options


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding, which some kernels do by what else is in the batch."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    first, second = first.float(), second.float()
    return bool((first - second).abs().max() <= tolerance * first.abs().max())


def _disable_checkpointing(model: Any) -> None:
    """Turn activation checkpointing off, which transformers called gradient checkpointing before 5.24."""
    is_new = hasattr(model, "activation_checkpointing_disable")
    model.activation_checkpointing_disable() if is_new else model.gradient_checkpointing_disable()


class _Evaluating:
    """Context in which a module is in evaluation mode; its former mode is restored."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.was_training = module, module.training
        self.is_needed = module.training or any(child.training for child in module.children())

    def __enter__(self) -> None:
        if self.is_needed:
            self.module.eval()

    def __exit__(self, *exc_info: object) -> None:
        if self.is_needed:
            self.module.train(self.was_training)


def _keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit layers for CPUs with bf16 instructions when they are first evaluated.

    A packed layer passes no gradient on, and does not run below a width of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _keep_quantized_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Leave quantised weights as they are when a state is loaded.

    They are never trained, and a trainer that resumes reads the checkpoint's base as it is stored, not quantised.
    """
    for name, weight in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
            for key in [key for key in state_dict if key.startswith(f"{name}.")]:  # scales and the like
                del state_dict[key]
            state_dict[name] = weight.data


def _may_write() -> bool:
    """False where a trainer saves that leaves it to another process to write.

    Trainers ask every process to save, since sharded weights take all of them, and Sentence Transformers passes that on
    as it is; who is to write stands in the trainer's arguments alone.
    """
    name = ("transformers.trainer", "Trainer")
    frame = find_caller(lambda caller: any((cls.__module__, cls.__name__) == name for cls in type(caller).__mro__))
    return frame is None or bool(frame.f_locals["self"].args.should_save)


def find_caller(is_wanted: Callable[[Any], bool]) -> FrameType | None:
    """The innermost frame of the call stack whose ``self`` is wanted."""
    frame = inspect.currentframe()
    while frame is not None and not is_wanted(frame.f_locals.get("self")):
        frame = frame.f_back
    return frame


class _Gathered:
    """Context in which parameters sharded over processes (FSDP2, ZeRO 3) are whole; True where they are.

    That is on the first process, or on any process of a model that is not sharded. All processes have to enter it, and
    leave it together.
    """

    def __init__(self, module: nn.Module) -> None:
        owners = [(owner, name, p) for owner in module.modules() for name, p in owner._parameters.items()]
        self.sharded: list[tuple[nn.Module, str, Any]] = [entry for entry in owners if hasattr(entry[2], "full_tensor")]
        self.by_deepspeed: Any = None
        if partitioned := [p for p in module.parameters() if hasattr(p, "ds_id")]:
            self.by_deepspeed = importlib.import_module("deepspeed").zero.GatheredParameters(partitioned)

    def __enter__(self) -> bool:
        if self.by_deepspeed is not None:
            self.by_deepspeed.__enter__()
        elif not self.sharded:
            return True
        is_first = torch.distributed.get_rank() == 0
        whole: dict[int, nn.Parameter] = {}  # one for all owners of a tied weight
        for owner, name, parameter in self.sharded:
            if id(parameter) not in whole:
                tensor = parameter.full_tensor().detach()
                kept = tensor.cpu() if is_first else tensor.new_empty(0)
                whole[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            if is_first:
                owner._parameters[name] = whole[id(parameter)]
        return is_first

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        for owner, name, parameter in self.sharded:
            owner._parameters[name] = parameter
        if self.by_deepspeed is not None:
            self.by_deepspeed.__exit__(error, *details)
        if (self.sharded or self.by_deepspeed is not None) and error is None:
            torch.distributed.barrier()


def _value_of(parameter: Any) -> float:
    """The number that a parameter holds; nan on a process that has no part of it (FSDP2). Shape: ``(1,)``"""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.item() if local.numel() else math.nan


def count_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Special tokens, BOS in most models, that a tokenizer puts before a text."""
    ids, special = tokenizer("a")["input_ids"], set(tokenizer.all_special_ids)
    return next((index for index, token_id in enumerate(ids) if token_id not in special), 0)


def _configured_ids(model: Any) -> set[int]:
    """Vocabulary rows that a model's configurations give a meaning (padding, start, end)."""
    ids: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, key, None)
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def _right_padding_order(attention_mask: Tensor) -> Tensor | None:
    """Indices that move the real tokens of each row to its start, or None if they are there. Shape: ``(B, T)``"""
    real = attention_mask.bool()
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return (~real).int().argsort(dim=1, stable=True)


def _load_causal_lm(model_name_or_path: str, model_kwargs: dict[str, Any], config_kwargs: dict[str, Any]) -> Any:
    """Load a decoder with its language-model head, and refuse one of which a weight is missing."""
    config = AutoConfig.from_pretrained(model_name_or_path, **config_kwargs)
    needed = "GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
    if config.is_encoder_decoder:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) is an encoder-decoder model. {needed}")
    has_remote_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_remote_code:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) has no causal language-model head. {needed}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_name_or_path, config=config, output_loading_info=True, **model_kwargs
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{model_name_or_path} lacks weights of {type(model).__name__}: {missing}. They would be random; use a "
            "checkpoint saved with its language-model head (AutoModelForCausalLM, not AutoModel)."
        )
    _keep_differentiable(model)
    return model


if __name__ == "gem_st.modeling_gem":
    # The class's public name, as numpy does it: checkpoints name `gem_st.GemTransformer`, and carry this file as
    # `gem_st.py`, so that they load alike with and without the package. A copy's class stays where it is found.
    GemTransformer.__module__ = "gem_st"
