"""Training from a file: configuration, data, run, preview, report; and the schedules of the paper."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from ..checkpoints import last_checkpoint
    from ..losses.schedules import AlphaSchedule, TwoPhaseLearningRate

__all__ = ["AlphaSchedule", "TwoPhaseLearningRate", "last_checkpoint"]
__getattr__ = lazy(
    __name__, {"checkpoints": ["last_checkpoint"], "losses.schedules": ["AlphaSchedule", "TwoPhaseLearningRate"]}
)
