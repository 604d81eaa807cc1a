"""LoRA by PEFT's own functions: beside a frozen base on GEM tokens only, otherwise on every token."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .gem_base import GemBase

TESTED_TOGETHER = {"transformers": "5.24.0", "peft": "0.21.2"}
"""Releases that passed all tests together, for whoever has others that do not fit each other."""


def import_peft() -> Any:
    """PEFT, which only a LoRA needs.

    Raises:
        ImportError: If it is missing, or does not fit transformers.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("A LoRA needs PEFT: pip install peft")
    with _OneLineForPeft():
        return importlib.import_module("peft")


_places: ContextVar[tuple[torch.Size, Tensor | slice] | None] = ContextVar("places", default=None)
"""Where a LoRA acts in a gated model, for whoever runs it, and no other thread: B and T, and tokens of ``B * T``"""


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


def inject_adapter(model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    """Add a trainable adapter to a model of transformers by PEFT's own functions, and make it the active one.

    Raises:
        ImportError: If PEFT is missing, or it and transformers do not fit each other.
        TypeError: If the configuration is none of PEFT's.
        ValueError: If there is an adapter of that name.
    """
    peft, name = import_peft(), adapter_name or "default"
    if not isinstance(adapter_config, peft.PeftConfig):
        raise TypeError(f"An adapter needs a PeftConfig, e.g. LoraConfig(...), got {type(adapter_config).__name__}.")
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"There is an adapter {name!r} already. Give the new one another adapter_name.")
    with _OneLineForPeft():
        peft.inject_adapter_in_model(adapter_config, model, name)
    model._hf_peft_config_loaded = True  # as transformers marks a model that has an adapter


def add_adapter_with_gem_rows(
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


def add_lora(model: Any, config: Any) -> Any:
    """Add a LoRA whose weights are float32 whatever the base's are, and give the model."""
    inject_adapter(model, config)
    cast_trainable(model)
    return model


class GatedLinear(nn.Module):
    """A linear layer to which a LoRA is added at the tokens that :func:`lora_only_at` names.

    Args:
        lora: PEFT's layer, whose weights are used as they are then.
    """

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: ``(B, T, D)`` -> ``(B, T, D')``

        Raises:
            ValueError: If the inputs are not one for each token, as those of a mixture's experts.
        """
        lora = self.lora
        shape, places = _places.get() or ((), slice(0))
        if inputs.shape[:-1] != shape:
            raise ValueError(f"A LoRA cannot tell the tokens of inputs of shape {tuple(inputs.shape)}.")
        outputs = lora.base_layer(inputs)
        flat, chosen = outputs.flatten(0, 1), inputs.flatten(0, 1)[places]
        for name in () if lora.disable_adapters or lora.merged else lora.active_adapters:
            if name not in lora.lora_A:
                continue
            first, second = lora.lora_A[name].weight, lora.lora_B[name].weight
            product = chosen.to(first.dtype) @ first.T
            added = torch.addmm(flat[places].to(first.dtype), product, second.T, alpha=lora.scaling[name])
            flat[places] = added.to(flat.dtype)
        return flat.view_as(outputs)


@contextmanager
def lora_only_at(places: Tensor) -> Iterator[None]:
    """Context in which the LoRA of a gated model acts on some of the tokens. Shape: ``(B, T)``"""
    index = places.flatten().nonzero()[:, 0]
    first, last = int(index[0]), int(index[-1])
    is_run = last - first + 1 == len(index)  # as in a single text: no copy of what is chosen
    before = _places.set((places.shape, slice(first, last + 1) if is_run else index))
    try:
        yield
    finally:
        _places.reset(before)


def gate_lora(base: Any, model: Any) -> Any:
    """A model of the same layers and weights whose LoRA acts where it is told to by :func:`lora_only_at`.

    Args:
        base: What text is read by.
        model: The one that :func:`share_weights` made of it, with the LoRA.

    Raises:
        ValueError: If they differ in more than products of two matrices that are added to linear layers.
    """
    return share_weights(model, {layer: GatedLinear(layer) for layer in products_in(base, model)})


def products_in(base: Any, model: Any) -> list[Any]:
    """PEFT's layers in a model that add a product of two matrices to a base's linear layer.

    Args:
        base: What text is read by.
        model: The one that :func:`share_weights` made of it, with the LoRA.

    Raises:
        ValueError: If the two differ in anything else.
    """
    kind = importlib.import_module("peft.tuners.lora").Linear
    layers = [module for module in modules_of(model) if type(module) is kind and _is_product(module)]
    if _structure_of(base, {}) != _structure_of(model, {layer: layer.base_layer for layer in layers}):
        raise ValueError("The adapter is more than products of two matrices, or its base is another.")
    return layers


def _is_product(layer: Any) -> bool:
    return not layer.lora_variant and all(product.bias is None for product in layer.lora_B.values())


def _structure_of(module: Any, replaced: Mapping[nn.Module, nn.Module]) -> list[Any]:
    """Kinds of containers with what they hold themselves, and the very modules at the leaves, in their order."""
    module = replaced.get(module, module)
    children = [child for child in module._modules.values() if child is not None]
    if not children:
        return [module]
    held = [type(module), *map(id, module._parameters.values())]
    return held + [part for child in children for part in _structure_of(child, replaced)]


def modules_of(model: Any) -> list[Any]:
    """All modules, those in two places twice; many times faster than ``modules()``."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def lora_options(base: GemBase, rank: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Options of the LoRA beside a frozen base: rank 8 and a factor of 8 on all linear layers, unless given.

    Raises:
        ValueError: If one of them would change or train the base's own weights.
    """
    options = options or {}
    rank = 8 if rank is None else rank
    # PEFT does not take "all-linear" with layers_to_transform.
    target_modules: Any = base.linear_names() if "layers_to_transform" in options else "all-linear"
    return _check_lora_kwargs({"r": rank, "lora_alpha": 8 * rank, "target_modules": target_modules, **options})


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


def cast_trainable(model: nn.Module) -> None:
    """Cast what is trained to float32, in place."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def share_weights(model: Any, replaced: Mapping[nn.Module, nn.Module] | None = None) -> Any:
    """A second model made of the same layers and weights, to which adapters can be added without touching the first.

    Modules that hold modules are copied; those at the leaves, all parameters and the configurations are shared, so
    that no memory is spent and moving or casting one moves or casts both.

    Args:
        model: The first.
        replaced: Modules of it, and what the second has in their place.
    """
    shared: list[Any] = [model.config, model.config.get_text_config(), model.generation_config, *model.parameters()]
    shared += [module for module in model.modules() if not any(module.children())]
    others = {id(module): other for module, other in (replaced or {}).items()}
    return copy.deepcopy(model, {id(part): part for part in shared} | others)


def check_sharding(model: Any) -> None:
    """Refuse to be sharded layer by layer: a frozen base has two containers around the weights of each layer.

    Raises:
        ValueError: If `accelerate launch` was told to.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    wrapped = set(os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(","))
    holders = {type(module).__name__ for module in model.modules() if any(module.children())}
    if policy == "SIZE_BASED_WRAP" or (policy == "TRANSFORMER_BASED_WRAP" and wrapped & holders):
        raise ValueError(
            f"FSDP is to shard by {policy} {sorted(wrapped & holders)}, but freeze_base=True shares the weights of "
            "each layer between base and adapter. Use DDP (a frozen base has few gradients), or FSDP2 with "
            "fsdp_auto_wrap_policy: NO_WRAP."
        )


def disable_checkpointing(model: Any) -> None:
    """Turn activation checkpointing off, which transformers called gradient checkpointing before 5.24."""
    is_new = hasattr(model, "activation_checkpointing_disable")
    model.activation_checkpointing_disable() if is_new else model.gradient_checkpointing_disable()


def keep_quantized_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Leave quantised weights as they are when a state is loaded.

    They are never trained, and a trainer that resumes reads the checkpoint's base as it is stored, not quantised.
    """
    for name, weight in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
            for key in [key for key in state_dict if key.startswith(f"{name}.")]:  # scales and the like
                del state_dict[key]
            state_dict[name] = weight.data
