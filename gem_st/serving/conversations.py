"""Conversations that have been read: the longest prefix of token ids is found, the oldest ones are dropped."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ..modeling.gem_cache import GemCache

MIN_SHARED = 8
"""Fewer tokens are read again: a system's first words are no conversation."""


def num_bytes(cache: GemCache) -> int:
    """Memory that keys, values and ids take."""
    return sum(tensor.nbytes for tensor in cache.tensors().values())


def count_shared(read: Tensor, ids: Tensor) -> int:
    """Tokens that two rows of ids start with alike. Shapes: ``(T,)``, ``(T',)``"""
    width = min(len(read), len(ids))
    return int((read[:width] == ids[:width]).cumprod(dim=0).sum())


class Conversations:
    """Caches of one row each, by the token ids that they have read; it is used by one thread.

    Args:
        max_bytes: Memory that they may take together; nothing is kept at 0.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._caches: OrderedDict[int, GemCache] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._caches)

    def find(self, ids: list[int]) -> GemCache | None:
        """What was read of the longest beginning of these ids, at least ``MIN_SHARED`` of them; it counts as used."""
        wanted = torch.tensor(ids)
        shared = {key: count_shared(cache.input_ids[0].cpu(), wanted) for key, cache in self._caches.items()}
        best = max(shared, key=shared.__getitem__, default=None)
        if best is None or shared[best] < MIN_SHARED:
            return None
        self._caches.move_to_end(best)
        cache = self._caches[best]
        return cache if shared[best] == cache.input_ids.shape[1] else cache.crop(shared[best])

    def keep(self, cache: GemCache) -> None:
        """Keep what was read, in place of what it continues; the least recently used ones make room.

        One that is larger than all the memory is not kept.
        """
        size = num_bytes(cache)
        if size > self.max_bytes:
            return
        ids = cache.input_ids[0].cpu()
        for key, other in list(self._caches.items()):
            read = other.input_ids[0].cpu()
            num_shared = count_shared(read, ids)
            if num_shared == len(read):
                self._drop(key)
            elif num_shared == len(ids):
                self._caches.move_to_end(key)
                return
        while self.num_bytes + size > self.max_bytes:
            self._drop(next(iter(self._caches)))
        self._caches[self._next], self._next = cache, self._next + 1
        self.num_bytes += size

    def _drop(self, key: int) -> None:
        self.num_bytes -= num_bytes(self._caches.pop(key))
