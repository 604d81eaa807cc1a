"""GEM for Sentence Transformers: one decoder-only LLM that embeds text and keeps generating (arXiv 2506.04344)."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .lora import merge_lora
    from .losses import GemLoss
    from .model_card import GemModelCardData
    from .modeling.gem_cache import GemCache, GemMemory
    from .modeling.gem_mask import gem_attention_mask
    from .modeling.gem_transformer import GemTransformer
    from .training import AlphaSchedule, TwoPhaseLearningRate, last_checkpoint

__all__ = [
    "AlphaSchedule",
    "GemCache",
    "GemLoss",
    "GemMemory",
    "GemModelCardData",
    "GemTransformer",
    "TwoPhaseLearningRate",
    "__version__",
    "gem_attention_mask",
    "last_checkpoint",
    "merge_lora",
]

# PEFT imports bitsandbytes wherever it is installed, which then warns of a kernel that only its 4-bit layers would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)

_MODULES = {
    "lora": ("merge_lora",),
    "losses": ("GemLoss",),
    "model_card": ("GemModelCardData",),
    "modeling.gem_transformer": ("GemTransformer",),
    "modeling.gem_cache": ("GemCache", "GemMemory"),
    "modeling.gem_mask": ("gem_attention_mask",),
    "training": ("AlphaSchedule", "TwoPhaseLearningRate", "last_checkpoint"),
}
"""Where the public names are: torch and transformers are imported with the first that is asked for."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    for module, names in _MODULES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(f".{module}", __name__), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
