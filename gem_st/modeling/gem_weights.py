"""What the weights of a model are told from others by, wherever they lie."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NUM_SAMPLED = 16
"""Values of each weight that are looked at on every call."""

WORDS = 1024
"""Words of 8 bytes whose sum is hashed."""

Held = tuple[nn.Module, str, Tensor]
"""A module, and the name of a weight or a saved buffer in it."""


class WeightsId:
    """A number of what a model computes keys and values from: its weights, and which adapters are on.

    It is of every byte of them, the same on any device, whether gradients are taken or not, and does not depend on the
    output head. It is computed anew once weights are written to or moved, or a sample of them, which is looked at on
    every call, is another one; on an accelerator, which has to be waited for, only where some take gradients.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, int] | None = None

    def __call__(self, backbone: nn.Module) -> int:
        """The number of a model without its head; what is written by way of ``weight.data`` may not be seen."""
        held = list(weights_in(backbone))
        adapters = adapters_in(backbone)
        is_cheap = any(tensor.requires_grad or tensor.device.type == "cpu" for *_, tensor in held)
        sample = sample_of([tensor for *_, tensor in held]) if is_cheap else b""
        state = adapters, sample, [(count_writes(t), t.data_ptr(), t.dtype) for *_, t in held]
        if self._last is None or self._last[0] != state:
            self._last = state, _hash_weights(held, adapters)
        return self._last[1]


def weights_in(module: nn.Module) -> Iterator[Held]:
    """Weights and saved buffers; of sharded ones (FSDP2) what this process has."""
    for owner in module.modules():
        saved = {k: b for k, b in owner._buffers.items() if k not in owner._non_persistent_buffers_set}
        for name, tensor in [*owner._parameters.items(), *saved.items()]:
            if tensor is not None:
                yield owner, name, local_part(tensor)


def local_part(tensor: Any) -> Tensor:
    """Without gradient, what this process has of a tensor that may be sharded (FSDP2)."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def adapters_in(module: nn.Module) -> str:
    """Which of PEFT's adapters are on in each layer, and how strong they are."""
    layers: list[Any] = [p for p in module.modules() if isinstance(getattr(p, "disable_adapters", None), bool)]
    return str([(p.disable_adapters, p.active_adapters, getattr(p, "scaling", None)) for p in layers])


def count_writes(weight: Tensor) -> int:
    """A number that grows whenever a weight is changed in place; inference tensors are not counted."""
    return 0 if weight.is_inference() else weight._version


def sample_of(weights: list[Tensor]) -> bytes:
    """A few values of each weight, evenly spread."""
    groups: dict[Any, list[Tensor]] = {}
    for weight in weights:
        flat = weight.reshape(-1)
        if not weight.is_meta:
            values = flat[:: max(1, len(flat) // NUM_SAMPLED)][:NUM_SAMPLED]
            groups.setdefault((weight.device, weight.dtype), []).append(values)
    return b"".join(bytes_of(torch.cat(group)) for group in groups.values())


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return tensor.view(torch.uint8).cpu().numpy().tobytes()


def check_places(model: Any, name: str, is_frozen: bool, writes_rows: bool) -> None:
    """Raise if weights that have to be in memory are not, as `device_map` may put some on the disk.

    Args:
        model: The ``*ForCausalLM``.
        name: What it was loaded from.
        is_frozen: Whether a second model is to be made of the same weights.
        writes_rows: Whether rows of the GEM tokens are to be written.
    """
    needed = [model.get_input_embeddings(), *([model.get_output_embeddings()] if writes_rows else [])]
    parts = [model] if is_frozen else needed
    held = {id(tensor) for part in parts for tensor in part.parameters() if tensor.is_meta}
    if missing := [path for path, tensor in model.named_parameters() if id(tensor) in held]:
        why = "Beside a frozen base all weights" if is_frozen else "Embeddings, and the head of a new model,"
        raise ValueError(
            f"{why} have to be in memory, but device_map leaves out {len(missing)} of {name}, such as {missing[0]}. "
            "Place them on a device, or leave out device_map."
        )


def _hash_weights(held: list[Held], adapters: str) -> int:
    """Seven bytes of a hash."""
    digest = hashlib.sha256(adapters.encode())
    for owner, name, tensor in held:
        value = tensor
        if tensor.is_meta:  # it lies on the disk, or in memory that is not the model's
            with importlib.import_module("accelerate.utils").align_module_device(owner, "cpu"):
                value = getattr(owner, name).detach().clone()
        digest.update(sample_of([value]) + bytes_of(sum_words(value)))
    return int.from_bytes(digest.digest()[:7], "big")


def sum_words(weight: Tensor) -> Tensor:
    """Sums of the words of a weight, in integers, which add up alike in any order. Shape: ``(some,)``"""
    flat = weight.reshape(-1)
    data = (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
    whole, rest = data[: len(data) // 8 * 8], data[len(data) // 8 * 8 :]
    words = (whole if whole.storage_offset() % 8 == 0 else whole.clone()).view(torch.int64)
    num = len(words) // WORDS * WORDS
    parts = [words[:num].view(-1, WORDS).sum(dim=1), words[num:].sum()[None], rest.sum(dtype=torch.int64)[None]]
    return torch.cat(parts)
