"""The paper's schedules: of alpha and of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NTP_SHARE = 0.2
"""Share of a training that is next-token prediction alone, unless another is asked for."""


def count_steps(number: float, last_step: int) -> int:
    """Optimizer steps that a number stands for: a number below 1 is a share of the training.

    As for ``warmup_steps`` and ``eval_steps`` of the training arguments, but rounded to the nearest step.

    Args:
        number: Steps, or a share of them.
        last_step: Steps of the training.
    """
    return round(number * last_step) if number < 1 else int(number)


@dataclass(frozen=True)
class AlphaSchedule:
    """Weight of the contrastive loss over the training: 0, then rising linearly, then constant (paper, section 3).

    A number of steps below 1 is a share of the training, as in the training arguments.

    Args:
        num_ntp_steps: Optimizer steps with alpha = 0, i.e. next-token prediction alone; 100 in the paper.
        final: Alpha at the end of the rise, in [0, 1].
        num_rise_steps: Optimizer steps over which alpha rises; None means until the end of the training, 0 at once.

    Raises:
        ValueError: If a number is out of range.
    """

    num_ntp_steps: float = NTP_SHARE
    final: float = 0.9
    num_rise_steps: float | None = None

    def __post_init__(self) -> None:
        numbers = (self.num_ntp_steps, self.num_rise_steps or 0)
        if not 0.0 <= self.final <= 1.0 or min(numbers) < 0 or any(n > 1 and n != int(n) for n in numbers):
            raise ValueError(
                "final must be in [0, 1], and the numbers of steps shares below 1 or whole numbers of 0 or more, got "
                f"{self}."
            )

    def __call__(self, step: int, last_step: int) -> float:
        """Alpha at an optimizer step (0 before the first) of a training of ``last_step`` steps."""
        start = count_steps(self.num_ntp_steps, last_step)
        rise = last_step - start if self.num_rise_steps is None else count_steps(self.num_rise_steps, last_step)
        if step < start:
            return 0.0
        return self.final * min(1.0, (step - start) / rise) if rise > 0 else self.final


class TwoPhaseLearningRate(TrainerCallback):
    """The paper's learning rate: 1e-4 while alpha is 0, then 1e-5 falling to 0 along a cosine (paper, section 4).

    ``SentenceTransformerTrainer(..., callbacks=[TwoPhaseLearningRate()])`` switches it on; it replaces the scheduler
    of the training arguments and resumes from a checkpoint like any other.

    Args:
        ntp_learning_rate: Rate of the first phase.
        learning_rate: Rate at the start of the second phase.
        num_ntp_steps: Optimizer steps of the first phase, or its share; that of :class:`AlphaSchedule`.
    """

    def __init__(
        self, ntp_learning_rate: float = 1e-4, learning_rate: float = 1e-5, num_ntp_steps: float = NTP_SHARE
    ) -> None:
        self.ntp_learning_rate = ntp_learning_rate
        self.learning_rate = learning_rate
        self.num_ntp_steps = num_ntp_steps

    def rate(self, step: int, last_step: int) -> float:
        """Learning rate at an optimizer step of a training of ``last_step`` steps."""
        start = count_steps(self.num_ntp_steps, last_step)
        if step < start:
            return self.ntp_learning_rate
        progress = (step - start) / max(1, last_step - start)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the two phases into the trainer's scheduler, relative to ``args.learning_rate``."""
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        if not hasattr(scheduler, "lr_lambdas"):
            raise ValueError(f"TwoPhaseLearningRate needs a LambdaLR scheduler, got {type(scheduler).__name__}.")

        def factor(step: int) -> float:
            return self.rate(step, state.max_steps) / args.learning_rate

        scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
        for group, base_rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base_rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # what the trainer logs
