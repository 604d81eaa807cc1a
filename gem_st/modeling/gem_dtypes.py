"""Data types of weights: float32 while they are trained, on the disk as they were stored."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .gem_adapter import cast_trainable

logger = logging.get_logger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Data types of so few digits that the small steps of an optimizer are lost to rounding."""

WRAPPERS = re.compile(r"\b_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\.")
"""What activation checkpointing, FSDP and torch.compile add to the names of weights."""


class WeightTypes:
    """Which data types the weights of a language model were loaded in, and are saved in.

    Args:
        model: The language model, as loaded.
        is_asked: Whether a data type was asked for.
    """

    def __init__(self, model: Any, is_asked: bool) -> None:
        self.model = model
        self.loaded = None if is_asked else model.dtype
        self.stored: dict[str, torch.dtype] = {}

    def train_in_float32(self, has_adapter: bool) -> None:
        """Have the weights that are trained in float32, unless a data type was asked for.

        Args:
            has_adapter: Whether it is a LoRA that is trained, whose base stays as it is.
        """
        low = {weight.dtype for weight in self.model.parameters() if weight.requires_grad} & {*LOW_PRECISION}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
        if not low:
            return
        if has_adapter:
            cast_trainable(self.model)
        elif self.model.dtype != self.loaded or getattr(self.model, "is_quantized", False):
            logger.warning(
                f"The weights to be trained are in {names}, in which small optimizer steps are lost to rounding. Load "
                "them without `dtype`, which trains them in float32 and saves them as they were, and set bf16=True in "
                "the training arguments to compute in bfloat16."
            )
        else:
            held = _tensors_in(self.model)
            self.stored = {path: tensor.dtype for *_, path, tensor in held if tensor.dtype in LOW_PRECISION}
            self.model.float()
            logger.warning(
                f"The weights are stored in {names}, in which small optimizer steps are lost to rounding. They are "
                f"trained in float32, and saved in {names} again unless model[0].save_dtype is set."
            )

    @contextlib.contextmanager
    def as_saved(self, save_dtype: torch.dtype | None, device: str | None = None) -> Iterator[None]:
        """Context in which the weights of the language model are in the data types that they are saved in.

        They are copies; the weights themselves come back unchanged.

        Args:
            save_dtype: That of all weights; by default they are saved as they were loaded.
            device: Where the copies are; beside the weights by default.
        """
        copies: dict[int, Tensor] = {}  # one for all owners of a tied weight
        replaced, config_dtype = [], self.model.config.dtype
        try:
            for held, name, path, tensor in _tensors_in(self.model):
                dtype = self._saved_dtype(path, tensor, save_dtype)
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

    def _saved_dtype(self, path: str, tensor: Tensor, save_dtype: torch.dtype | None) -> torch.dtype:
        """Data type in which a weight or buffer of the language model is saved."""
        is_cast = path in self.stored
        if save_dtype is not None:
            return save_dtype if is_cast or isinstance(tensor, nn.Parameter) else tensor.dtype
        return self.stored[path] if is_cast and tensor.dtype == torch.float32 else tensor.dtype


def _tensors_in(module: nn.Module) -> list[tuple[dict[str, Any], str, str, Tensor]]:
    """Each floating-point weight and buffer: what holds it, its name in there, its name in the module, the tensor."""
    return [
        (held, name, WRAPPERS.sub("", f"{prefix}.{name}"), tensor)
        for prefix, owner in module.named_modules()
        for held in (owner._parameters, owner._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.is_floating_point()
    ]
