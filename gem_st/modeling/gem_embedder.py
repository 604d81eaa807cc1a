"""Embedder: rows of token ids, or what a cache has read, -> embeddings. It holds no state and knows no text."""

from __future__ import annotations

from functools import partial

import torch
from sentence_transformers.util import get_world_size
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .gem_base import GemBase
from .gem_cache import GemCache, GemMemory, tensors_of
from .gem_groups import run_groups
from .gem_mask import GEM, PREFIX, Rows
from .gem_passes import AppendPass, GatedPass, PackedPass, Pass, Shared
from .gem_probes import BaseFacts
from .gem_tokens import GemTokens

SHARED_PREFIX_LENGTH, SHARED_PREFIX_SHARE = 8, 1 / 8
"""Tokens that rows share at their start are computed once if they are as many, and as large a share of the batch."""


class Embedder:
    """Embeds.

    Args:
        base: The base.
        facts: What it can do.
        tokens: The GEM tokens.
        whole: The pass for whole rows.
        append: The pass for GEM tokens behind a cache.
        packed: The pass for short texts in training, if there is one.
        gated: The pass for few tokens, if there is one.
    """

    def __init__(
        self,
        base: GemBase,
        facts: BaseFacts,
        tokens: GemTokens,
        whole: Pass,
        append: AppendPass,
        packed: PackedPass | None = None,
        gated: GatedPass | None = None,
    ) -> None:
        self.base = base
        self.facts = facts
        self.tokens = tokens
        self.whole = whole
        self.append = append
        self.packed = packed
        self.gated = gated

    def prepare_for_training(self) -> None:
        """Find out what takes a run of the model, before its weights may be sharded."""
        _ = self.packed is not None and self.packed.works

    def embed_ids(self, ids: list[list[int]]) -> Tensor:
        """Embeddings of texts given as token ids, without GEM tokens. Shape: ``(B, D)``, or ``(B, K * D)`` for concat

        Raises:
            ValueError: If there is nothing to embed.
        """
        if not ids:
            raise ValueError("There is nothing to embed: an empty list was given.")
        padded = self.base.text.pad([torch.tensor(row + self.tokens.ids) for row in ids], padding_side="right")
        device = self.base.model.device
        rows = Rows.of(padded["input_ids"].to(device), padded["attention_mask"].to(device), self.tokens.ids)
        return self.tokens.pool(self.states(rows), rows.segments)

    def states(self, rows: Rows) -> Tensor:
        """Run rows through the model, by the first pass that takes them; some padding is zeros.

        Rows beyond the limit of "longrope", and the others, are not run together.
        Shapes: ``(B, T)`` -> ``(B, T, D)``
        """
        for special in (self.packed, self.gated):
            if special is not None and special.takes(rows):
                return special(rows)
        shared = self.read_shared_prefix(rows)
        lengths = rows.lengths
        num_far = int((lengths > self.base.rope_limit).sum())
        parts = lengths.argsort(descending=True, stable=True).tensor_split([num_far])
        groups = [part for part in parts if len(part)] if get_world_size() == 1 else []
        return run_groups(partial(self.whole, shared=shared), rows, groups)

    def read_shared_prefix(self, rows: Rows) -> Shared | None:
        """Run the tokens that all rows start with, such as an instruction, once for all of them, where that pays."""
        input_ids, segments, lengths = rows.input_ids, rows.segments, rows.lengths
        is_possible = self.facts.can_cache and self.base.attention in ("eager", "sdpa")
        if not is_possible or torch.is_grad_enabled() or self.append.model.training or len(input_ids) < 2:
            return None
        if int(lengths.max()) > self.base.rope_limit:
            return None
        width = int(lengths.min())
        is_same = ((input_ids == input_ids[:1]) & (segments == PREFIX))[:, :width].all(dim=0)
        num_shared = int(is_same.cumprod(dim=0).sum())
        if num_shared < max(SHARED_PREFIX_LENGTH, SHARED_PREFIX_SHARE * float(lengths.float().mean())):
            return None
        past = DynamicCache()
        return self.base.run(past, input_ids=input_ids[:1, :num_shared]), past

    def embed_cache(self, cache: GemCache) -> Tensor:
        """Embeddings of what a cache has read. Shape: ``(B, D)``, or ``(B, K * D)`` for concat

        Raises:
            ValueError: If it is not of this model.
        """
        states, _ = self._append_to(cache)
        return self.tokens.pool(states, torch.full_like(states[..., 0], GEM))

    def compress(self, cache: GemCache) -> GemMemory:
        """Keys and values of the K GEM tokens of what a cache has read.

        Raises:
            ValueError: If it is not of this model.
        """
        states, past = self._append_to(cache)
        last = slice(-len(self.tokens), None)
        layers = [(keys[:, :, last], values[:, :, last]) for keys, values in tensors_of(past)]
        return GemMemory(layers, lengths=cache.lengths, last_hidden_state=states[:, -1], weights_tag=cache.weights_tag)

    def _append_to(self, cache: GemCache) -> tuple[Tensor, DynamicCache]:
        """Hidden states of the GEM tokens, shape ``(B, K, D)``, and a cache that ends in them."""
        self.base.check_cache(cache)
        self.base.check_context(F.pad(cache.attention_mask, (0, 1), value=True))
        past = cache.past_key_values()
        return self.append(past, cache.attention_mask, cache.lengths), past
