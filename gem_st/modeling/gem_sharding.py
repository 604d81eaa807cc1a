"""Weights that are sharded over processes (FSDP2, ZeRO 3), whole for a moment."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn


class Gathered:
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


def value_of(parameter: Any) -> float:
    """The number that a parameter holds; nan on a process that has no part of it (FSDP2). Shape: ``(1,)``"""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.item() if local.numel() else math.nan
