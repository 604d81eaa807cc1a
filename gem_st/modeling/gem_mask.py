"""Token ids -> segments, positions and the attention mask (paper, section 3 and figure 1).

Notation used for tensor shapes, here and in the other files:

- ``B``: batch size
- ``T``: tokens in a row, padding included
- ``K``: GEM tokens in a row
- ``D``: width of the hidden states
- ``V``: vocabulary size, i.e. rows of the embedding matrix
- ``N``: next-token targets in a batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from .gem_cache import cache_name

PREFIX, GEM, SUFFIX = 0, 1, 2
"""The three segments of a row (paper, section 3): ``prefix (m tokens) | K GEM tokens | suffix (n tokens)``."""

MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers builds a mask from an index rule."""


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
    combine = partial(combine_masks, rule=rule, is_causal=key[num_past:, None] >= key)
    masks = create_masks_for_generate(**inputs)
    return {name: combine(mask) for name, mask in masks.items()} if isinstance(masks, dict) else combine(masks)


def combine_masks(mask: Tensor | None, rule: Tensor, is_causal: Tensor) -> Tensor:
    """Forbid in a mask of transformers what the rule forbids; None is its shorthand for causality.

    Shapes: ``(B, 1, Q, T)``, ``(B, 1, Q, T)``, ``(Q, T)`` -> ``(B, 1, Q, T)``
    """
    if mask is None:
        return rule & is_causal
    if mask.dtype == torch.bool:
        return rule & mask
    return mask.masked_fill(~rule, torch.finfo(mask.dtype).min)


def right_padding_order(attention_mask: Tensor) -> Tensor | None:
    """Indices that move the real tokens of each row to its start, or None if they are there. Shape: ``(B, T)``"""
    real = attention_mask.bool()
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return (~real).int().argsort(dim=1, stable=True)


class Rows(NamedTuple):
    """A batch of rows ``prefix | GEM tokens | suffix``, padded on the right.

    Attributes:
        input_ids: Token ids. Shape: ``(B, T)``
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        attention_mask: 1 for real tokens. Shape: ``(B, T)``
        order: Where the tokens stood in rows that were padded otherwise; None if they were not. Shape: ``(B, T)``
    """

    input_ids: Tensor
    segments: Tensor
    attention_mask: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, gem_token_ids: Sequence[int]) -> Rows:
        """Rows of token ids padded on either side. Shape: ``(B, T)`` each"""
        order = right_padding_order(attention_mask)
        if order is not None:
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        return cls(input_ids, gem_segments(input_ids, attention_mask, gem_token_ids), attention_mask, order)

    @property
    def lengths(self) -> Tensor:
        """Tokens in each row. Shape: ``(B,)``"""
        return self.attention_mask.sum(dim=1)

    def take(self, index: Tensor, width: int) -> Rows:
        """Some of the rows, cut to ``width`` tokens. Shape: ``(B',)``"""
        return Rows(*(tensor[index, :width] for tensor in self[:3]))

    def arrange(self, tensor: Tensor) -> Tensor:
        """Move what stands beside the tokens to where they are. Shape: ``(B, T)``"""
        return tensor if self.order is None else tensor.gather(1, self.order)

    def restore(self, states: Tensor) -> Tensor:
        """Move hidden states to where the tokens were. Shape: ``(B, T, D)``"""
        if self.order is None:
            return states
        return torch.zeros_like(states).scatter(1, self.order[..., None].expand_as(states), states)
