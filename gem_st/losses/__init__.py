"""GemLoss and its parts: rows, next-token prediction, the contrastive part."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .contrastive import find_same_texts, info_nce, text_keys
    from .gem_loss import GemLoss

__all__ = ["GemLoss", "find_same_texts", "info_nce", "text_keys"]
__getattr__ = lazy(
    __name__,
    {
        "losses.gem_loss": ["GemLoss", "MAX_LOGIT_SCALE"],
        "losses.contrastive": ["find_same_texts", "info_nce", "text_keys"],
        "losses.plan": ["RowPlan", "default_token_dropout", "plan_rows"],
    },
)
