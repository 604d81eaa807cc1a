"""Passes: the ways in which rows go through the model. Those of one mode give the same states, but for rounding."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, Protocol

import torch
from sentence_transformers.util import get_world_size
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .gem_adapter import gate_lora, lora_only_at, modules_of
from .gem_base import Evaluating, GemBase, run_backbone
from .gem_cache import cache_of, expand_rows, take_tokens, tensors_of
from .gem_groups import length_groups, pack_texts, run_groups, stage_groups
from .gem_mask import GEM, PREFIX, SUFFIX, Rows, gem_attention_mask, gem_position_ids
from .gem_probes import REFUSALS, BaseFacts, is_same, require_finite
from .gem_tokens import GemTokens

Shared = tuple[Tensor, DynamicCache]
"""States, shape ``(1, P, D)``, and keys and values of the first P tokens of all rows."""

PACKED_PADDING = 128
"""Padding tokens that have to be saved for a batch to be packed."""

GATED_TOKENS = {"cpu": 128}
"""Places of a batch up to which two stages cost more than one pass, by device type; not measured on accelerators."""


class Pass(Protocol):
    """What turns rows into hidden states, and may be told what was read of them: causal and staged passes."""

    def __call__(self, rows: Rows, shared: Shared | None = None) -> Tensor:
        """Hidden states of right-padded rows, whose first tokens may have been read. Shape: ``(B, T, D)``"""


class CausalPass:
    """One pass over whole rows, as the paper has it."""

    def __init__(self, base: GemBase, tokens: GemTokens) -> None:
        self.base = base
        self.tokens = tokens

    def __call__(self, rows: Rows, shared: Shared | None = None) -> Tensor:
        """Hidden states of all tokens, of rows of like length at a time. Shapes: ``(B, T)`` -> ``(B, T, D)``"""
        return run_groups(partial(self._run, shared), rows, length_groups(rows.lengths))

    def _run(self, shared: Shared | None, rows: Rows) -> Tensor:
        input_ids, segments, attention_mask = rows[:3]
        needs_mask = len(self.tokens) > 1 or bool((segments == SUFFIX).any())
        if shared is None:
            return self.base.states(input_ids, *((segments, attention_mask) if needs_mask else ()))
        states, past = expand_rows(shared, len(input_ids))
        inputs: dict[str, Any] = {"input_ids": input_ids[:, states.shape[1] :]}
        if needs_mask:
            inputs["attention_mask"] = gem_attention_mask(
                self.base.model.config, segments, attention_mask, self.base.model.dtype, past
            )
            inputs["position_ids"] = gem_position_ids(segments, attention_mask)[:, states.shape[1] :]
        return torch.cat([states, self.base.run(past, **inputs)], dim=1)


class PackedPass:
    """Short texts side by side in one row, where each sees itself only."""

    def __init__(self, base: GemBase) -> None:
        self.base = base

    def __call__(self, rows: Rows) -> Tensor:
        """Hidden states of all tokens. Shapes: ``(B, T)`` -> ``(B, T, D)``"""
        input_ids, segments, attention_mask = rows[:3]
        model = self.base.model
        num_rows, width = input_ids.shape
        places = pack_texts(attention_mask.sum(dim=1), width)
        is_real, source = places >= 0, places.clamp(min=0)
        text_ids = places.div(width, rounding_mode="floor")
        packed_segments = segments.flatten()[source].masked_fill(~is_real, PREFIX)
        states = self.base.run(
            input_ids=input_ids.flatten()[source],
            # Padding is a text of its own, so that no query is left without a key.
            attention_mask=gem_attention_mask(
                model.config, packed_segments, torch.ones_like(places), model.dtype, text_ids=text_ids
            ),
            position_ids=gem_position_ids(segments, attention_mask).flatten()[source],
        )
        unpacked = states.new_zeros((num_rows * width, states.shape[-1]))
        return unpacked.index_put((places[is_real],), states[is_real]).view(num_rows, width, -1)

    def takes(self, rows: Rows) -> bool:
        """True in training where packing is possible, and saves more padding than another pass would cost."""
        if not (torch.is_grad_enabled() and self.base.attention in ("eager", "sdpa") and self.works):
            return False
        lengths = rows.lengths
        longest = int(lengths.max())
        return longest <= self.base.rope_limit and int((longest - lengths).sum()) > PACKED_PADDING

    @cached_property
    @torch.no_grad()
    def works(self) -> bool:
        """True if two texts in one row have the hidden states they have alone; looked at once."""
        if self.base.attention not in ("eager", "sdpa"):
            return False
        ids = torch.cat([self.base.probe(0, 1, 2), self.base.probe(3, 2, 0), self.base.probe(1, 0, 0)])
        real = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], device=ids.device)
        with Evaluating(self.base.model):
            try:
                packed = self(Rows(ids, torch.zeros_like(ids), real))
            except REFUSALS:
                return False
            return is_same(packed[real.bool()], self.base.states(ids)[real.bool()])


class AppendPass:
    """The K GEM tokens behind a cache of the text.

    Args:
        model: What GEM tokens run through: the base's model, or the one with a LoRA beside a frozen base.
        tokens: The GEM tokens.
    """

    def __init__(self, model: Any, tokens: GemTokens) -> None:
        self.model = model
        self.tokens = tokens

    def __call__(self, past: DynamicCache, is_text: Tensor, lengths: Tensor) -> Tensor:
        """Append the K GEM tokens to a cache, in place.

        Args:
            past: Keys and values of P tokens.
            is_text: False for keys that are padding. Shape: ``(B, P)``
            lengths: The position of the GEM tokens, which is the number of tokens before them. Shape: ``(B,)``

        Returns:
            Hidden states of the GEM tokens. Shape: ``(B, K, D)``
        """
        shape = (len(lengths), len(self.tokens))
        real = F.pad(is_text, (0, len(self.tokens)), value=True)
        mask: Any = real
        if len(self.tokens) > 1:
            segments = F.pad(torch.full(shape, GEM, device=lengths.device), (is_text.shape[1], 0), value=PREFIX)
            mask = gem_attention_mask(self.model.config, segments, real, self.model.dtype, past)
        elif bool(is_text.all()):
            mask = None
        return run_backbone(
            self.model,
            past,
            inputs_embeds=self.tokens.rows.expand(len(lengths), -1, -1),
            attention_mask=mask,
            position_ids=lengths[:, None].expand(shape),
        )


class GatedPass:
    """Few rows beside a frozen base in one pass, in which the LoRA acts on GEM tokens only.

    A pass over a few tokens costs as much as reading the weights, so that the second stage would double it.
    """

    def __init__(self, append: AppendPass, base: GemBase) -> None:
        self.append = append
        self.base = base
        self.made: tuple[list[Any], Any] = ([], None)
        """The modules that a gated model was made of, and it, or None if none could be made."""

    def __call__(self, rows: Rows) -> Tensor:
        """Hidden states of all tokens of rows without a suffix. Shapes: ``(B, T)`` -> ``(B, T, D)``"""
        return self._run(self.made[1], rows)

    def _run(self, gated: Any, rows: Rows) -> Tensor:
        input_ids, segments, attention_mask = rows[:3]
        is_gem = segments == GEM
        text_ids = input_ids.masked_fill(is_gem | ~attention_mask.bool(), self.base.text.pad_token_id)
        embeddings = self.base.model.get_input_embeddings()(text_ids)
        gem_rows = self.append.tokens.rows.to(embeddings.dtype).expand(len(input_ids), -1, -1)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings.masked_scatter(is_gem[..., None], gem_rows)}
        if len(self.append.tokens) > 1:
            config = self.base.model.config
            inputs["attention_mask"] = gem_attention_mask(config, segments, attention_mask, embeddings.dtype)
            inputs["position_ids"] = gem_position_ids(segments, attention_mask)
        with lora_only_at(is_gem):
            return run_backbone(gated, **inputs)

    def takes(self, rows: Rows) -> bool:
        """True for few tokens without a suffix, outside training, where the LoRA can be told on what to act."""
        num_places = GATED_TOKENS.get(rows.input_ids.device.type, 0)
        is_small = rows.input_ids.numel() <= num_places and int(rows.lengths.max()) <= self.base.rope_limit
        if not is_small or torch.is_grad_enabled() or get_world_size() > 1:
            return False
        counts = (rows.segments == GEM).sum(dim=1)
        is_complete = bool((counts == len(self.append.tokens)).all()) and not bool((rows.segments == SUFFIX).any())
        return is_complete and self.base.attention in ("eager", "sdpa") and self._works()

    def _works(self) -> bool:
        """Make the gated model, and run it on a few tokens; again when somebody put in, or took out, a module."""
        base, model = self.base.model, self.append.model
        modules = [*modules_of(base), *modules_of(model)]
        if any(map(_is_watched, modules)):
            return False
        if self.made[0] != modules:
            gated = None
            try:
                gated = gate_lora(base, model)
                ids = self.base.probe(0, 1, *self.append.tokens.ids)
                self._run(gated, Rows.of(ids, torch.ones_like(ids), self.append.tokens.ids))
            except REFUSALS:
                gated = None
            self.made = modules, gated  # in one step, as other threads may be reading
        return self.made[1] is not None


def _is_watched(module: Any) -> bool:
    """True for a module that draws, as dropout does in training, or that somebody hooked into, for two stages."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(module.training or is_hooked)


class StagedPass:
    """Prefix by the base without gradient, GEM tokens with the LoRA, suffix by the base from the GEM tokens' cache.

    Rows of like length are read together; GEM tokens, which are few, are put behind many rows at a time.
    """

    def __init__(self, base: GemBase, facts: BaseFacts, append: AppendPass) -> None:
        self.base = base
        self.facts = facts
        self.append = append

    def __call__(self, rows: Rows, shared: Shared | None = None) -> Tensor:
        """Hidden states of all tokens. Shapes: ``(B, T)`` -> ``(B, T, D)``"""
        return run_groups(partial(self._run, shared), rows, stage_groups(rows.lengths))

    def _run(self, shared: Shared | None, rows: Rows) -> Tensor:
        input_ids, segments, attention_mask = rows[:3]
        is_prefix = (segments == PREFIX) & attention_mask.bool()
        lengths = is_prefix.sum(dim=1)
        width = int(lengths.max())
        is_prefix = is_prefix[:, :width]
        with torch.no_grad():
            text_ids = input_ids[:, :width].masked_fill(~is_prefix, self.base.text.pad_token_id)
            text_states, past = self._read(text_ids, lengths, shared)
            past, is_text = self._close_gaps(past, is_prefix)
        gem_states = self.append(past, is_text, lengths)
        states = gem_states.new_zeros((*input_ids.shape, gem_states.shape[-1]))
        states[:, :width] = text_states.where(is_prefix[..., None], 0)
        states = states.masked_scatter((segments == GEM)[..., None], gem_states)
        with_suffix = (segments == SUFFIX).any(dim=1).nonzero()[:, 0]
        if len(with_suffix) == 0:
            return states
        return self._run_suffix(states, with_suffix, input_ids, segments, lengths, past)

    def _read(self, text_ids: Tensor, lengths: Tensor, shared: Shared | None) -> tuple[Tensor, DynamicCache]:
        """Hidden states, keys and values of prefixes, read in groups of like length and put together.

        Shapes: ``(B, P)``, ``(B,)`` -> ``(B, P, D)`` and the cache
        """
        groups = length_groups(lengths)
        if len(groups) <= 1:
            return self.base.read(text_ids, self.facts.width, shared)
        whole: list[Tensor] = []
        for index in groups:
            width = int(lengths[index[0]])
            states, past = self.base.read(text_ids[index, :width], self.facts.width, shared)
            # Tokens last but one, as keys and values have them.
            parts = [states, *(tensor for layer in tensors_of(past) for tensor in layer)]
            if not whole:  # the longest rows come first
                whole = [part.new_zeros((len(text_ids), *part.shape[1:])) for part in parts]
            for target, part in zip(whole, parts, strict=False):  # rows without a token have neither key nor value
                target[index, ..., :width, :] = part
        return whole[0], cache_of(zip(whole[1::2], whole[2::2], strict=True))

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
        suffix_ids = input_ids[rows].gather(1, order).masked_fill(~is_real, self.base.text.pad_token_id)
        suffix_states = self.base.run(
            cache_of((k[rows, :, -len(self.append.tokens) :] for k in layer) for layer in tensors_of(past)),
            input_ids=suffix_ids,
            position_ids=lengths[rows, None] + 1 + torch.arange(order.shape[1], device=order.device),
        )
        index = rows[:, None].expand_as(order)[is_real], order[is_real]
        return states.index_put(index, suffix_states[is_real])

    def _close_gaps(self, past: DynamicCache, is_text: Tensor) -> tuple[DynamicCache, Tensor]:
        """Move padding to the left where a sliding window counts keys, so that it ends at the last of the text."""
        if not self.facts.has_window or bool(is_text.all()):
            return past, is_text
        order = is_text.int().argsort(dim=1, stable=True)
        moved = cache_of((take_tokens(tensor, order) for tensor in layer) for layer in tensors_of(past))
        return moved, is_text.gather(1, order)


@torch.no_grad()
def check_append(base: GemBase, append: AppendPass) -> None:
    """Put GEM tokens behind a short text, as embeddings that are no token's and with a LoRA on them.

    Raises:
        ValueError: If the model does not take them so, e.g. as it looks up more than one embedding by a token's id.
        FloatingPointError: If what comes out is not finite.
    """
    if base.attention not in ("eager", "sdpa"):
        return  # FlashAttention cannot be run yet, and flex_attention would compile for shapes of its own
    ids, past = base.probe(0, 1, 2), DynamicCache()
    try:
        with Evaluating(base.model), Evaluating(append.model):
            base.run(past, input_ids=ids)
            states = append(past, torch.ones_like(ids).bool(), torch.tensor([ids.shape[1]], device=ids.device))
    except REFUSALS as error:
        raise ValueError(
            f"{base.model.config.model_type} does not run GEM tokens beside a frozen base, where they are embeddings "
            f"without an id, and a LoRA works on them: {error}. Use freeze_base=False, or, where a layer takes no "
            'LoRA, others by lora_kwargs={"target_modules": [...]}.'
        ) from error
    require_finite(states)
