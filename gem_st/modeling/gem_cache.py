"""Keys and values as values: what has been read, to be embedded, continued, extended and compressed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from typing_extensions import Self


@lru_cache
def cache_name(function: Callable[..., Any]) -> str:
    """What a function of transformers, or a model's ``forward``, calls its cache: ``cache``, before 5.24 otherwise."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def tensors_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a transformers cache. Shape: ``(B, heads, T, head width)`` each"""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(layers: Iterable[Iterable[Tensor]]) -> DynamicCache:
    """A transformers cache of keys and values, in which every layer holds every token, sliding windows too.

    It holds the very tensors, which a cache of transformers never changes; given to its constructor they are copied.
    """
    given = [tuple(layer) for layer in layers]
    cache: Any = DynamicCache([tuple(tensor[..., :0, :] for tensor in layer) for layer in given])
    for layer, (keys, values) in zip(cache.layers, given, strict=True):
        layer.keys, layer.values = keys, values
    return cache


def take_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder tokens. Shapes: ``(B, heads, T, head width)``, ``(B, T')`` -> ``(B, heads, T', head width)``"""
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def expand_rows(shared: tuple[Tensor, DynamicCache], num_rows: int) -> tuple[Tensor, DynamicCache]:
    """Repeat the states, keys and values of one row, without copying them."""
    states, past = shared
    layers = [[tensor.expand(num_rows, -1, -1, -1) for tensor in layer] for layer in tensors_of(past)]
    return states.expand(num_rows, -1, -1), cache_of(layers)


def write_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file that may be read like other files made here; safetensors leaves it to its owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)


class CachedRows:
    """Keys and values of a batch of rows, with further tensors whose first dimension is the rows'.

    Nothing that reads one changes it: methods return new ones, which may share memory with it.
    """

    kind: str
    fields: tuple[str, ...]

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]], **fields: Tensor) -> None:
        self.layers = list(layers)
        for name in self.fields:
            setattr(self, name, fields[name])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as :meth:`save` writes them."""
        named = {f"keys.{index}": keys for index, (keys, _) in enumerate(self.layers)}
        named |= {f"values.{index}": values for index, (_, values) in enumerate(self.layers)}
        return named | {name: getattr(self, name) for name in self.fields}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._of({name: function(tensor) for name, tensor in self.tensors().items()})

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
        tensors = [part.tensors() for part in parts]
        return cls._of({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to a device, cast keys, values and states, or both."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, as a whole or not at all."""
        target = Path(path).resolve()
        part = target.with_name(f"{target.name}.part")
        try:
            write_tensors(self._map(Tensor.contiguous).tensors(), part, kind=self.kind)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what :meth:`save` wrote. Keys and values only mean something to the weights that made them.

        Raises:
            ValueError: If the file holds something else.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            kind = (file.metadata() or {}).get("kind")
            if kind != cls.kind:
                raise ValueError(f"{path} holds {kind or 'other tensors'}, not a {cls.kind}.")
            return cls._of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict


class GemCache(CachedRows):
    """Keys and values of texts, from which they can be embedded, continued and extended.

    :meth:`GemTransformer.prefill` makes one. GEM tokens are never part of it, and layers with a sliding window keep
    all keys, so that it can be cropped anywhere.

    Attributes:
        layers: Keys and values of each layer. Shape: ``(B, heads, T, head width)`` each
        input_ids: Token ids, padded on the left. Shape: ``(B, T)``
        attention_mask: True for real tokens. Shape: ``(B, T)``
        weights_tag: Tells the weights that made it. Shape: ``(B,)``
    """

    kind = "GemCache"
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
        return self.keep(self.attention_mask & (self.attention_mask.cumsum(dim=1) <= kept))

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

    def keep(self, keep: Tensor) -> GemCache:
        """The tokens for which ``keep`` is True, in order, padded on the left. Shape: ``(B, T)``"""
        width = int(keep.sum(dim=1).max()) if len(keep) else 0
        order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
        return GemCache(
            [tuple(take_tokens(tensor, order) for tensor in layer) for layer in self.layers],  # type: ignore[misc]
            input_ids=self.input_ids.gather(1, order),
            attention_mask=keep.gather(1, order),
            weights_tag=self.weights_tag,
        )


class GemMemory(CachedRows):
    """Keys and values of the K GEM tokens of texts, and nothing else of them (paper, section 3 and table 6).

    :meth:`GemTransformer.compress` makes one, :meth:`GemTransformer.reconstruct` reads it.

    Attributes:
        layers: Keys and values of each layer. Shape: ``(B, heads, K, head width)`` each
        lengths: Tokens in each text, which is the position of its GEM tokens. Shape: ``(B,)``
        last_hidden_state: Of the last GEM token, which predicts the first token. Shape: ``(B, D)``
        weights_tag: Tells the weights that made it. Shape: ``(B,)``
    """

    kind = "GemMemory"
    fields = ("lengths", "last_hidden_state", "weights_tag")
    lengths: Tensor
    last_hidden_state: Tensor
    weights_tag: Tensor
