"""GemLoss and its parts: rows, next-token prediction, the contrastive part."""

from .gem_loss import GemLoss
from .info_nce import find_same_texts, info_nce, text_keys

__all__ = ["GemLoss", "find_same_texts", "info_nce", "text_keys"]
