"""GEM for Sentence Transformers: one decoder-only LLM that embeds text and keeps generating (arXiv 2506.04344)."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ._lazy import lazy
from ._moved import MOVED, MovedModules
from ._version import __version__

if TYPE_CHECKING:
    from .cards.card_data import GemModelCardData
    from .checkpoints import last_checkpoint
    from .losses.gem_loss import GemLoss
    from .losses.schedules import AlphaSchedule, TwoPhaseLearningRate
    from .modeling.gem_cache import GemCache, GemMemory
    from .modeling.gem_mask import gem_attention_mask
    from .modeling.gem_transformer import GemTransformer
    from .training.lora import merge_lora

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

_MODULES: dict[str, tuple[str, ...]] = {
    "cards.card_data": ("GemModelCardData",),
    "checkpoints": ("last_checkpoint",),
    "losses.gem_loss": ("GemLoss",),
    "losses.schedules": ("AlphaSchedule", "TwoPhaseLearningRate"),
    "modeling.gem_cache": ("GemCache", "GemMemory"),
    "modeling.gem_mask": ("gem_attention_mask",),
    "modeling.gem_transformer": ("GemTransformer",),
    "training.lora": ("merge_lora",),
}
"""Where the public names are: torch and transformers are imported with the first that is asked for."""

_WINGS = ("cards", "cli", "evaluation", "hub", "losses", "modeling", "ray", "serving", "training")

sys.meta_path.append(MovedModules())
__getattr__ = lazy(__name__, _MODULES | dict.fromkeys([*_WINGS, *MOVED], ()))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
