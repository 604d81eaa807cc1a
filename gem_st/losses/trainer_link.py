"""The one place where a loss meets its trainer.

Sentence Transformers hands a loss neither the trainer, nor the step, nor names of columns. GemLoss needs the step for
``alpha``, the names for ``tasks``, and the trainer's log for its parts. A trainer moves its loss to the device while it
is being built: it is looked up then, once, and read as an object afterwards.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any

from sentence_transformers.base.trainer import BaseTrainer
from torch import nn

from .dataset_checks import LABEL_COLUMNS
from .rows import PAIR_TASKS

OTHER_COLUMNS = (*LABEL_COLUMNS, "dataset_name")
"""Columns of a data set that are no texts."""


class TrainerLink:
    """What a loss knows of the trainers that were built with it. Copies of the loss know none."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[BaseTrainer]] = []
        self._names: weakref.WeakKeyDictionary[BaseTrainer, dict[tuple[Any, ...], tuple[str, ...]]]
        self._names = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    @property
    def trainers(self) -> list[BaseTrainer]:
        """Those that there still are, the newest last."""
        return [trainer for reference in self._references if (trainer := reference()) is not None]

    @property
    def trainer(self) -> BaseTrainer | None:
        """The one that is training, otherwise the newest; None if there is none."""
        trainers = self.trainers
        return next((trainer for trainer in trainers if trainer.is_in_train), trainers[-1] if trainers else None)

    def look(self) -> BaseTrainer | None:
        """The trainer that is being built, if there is one and it is not known yet."""
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), BaseTrainer):
            frame = frame.f_back
        return None if frame is None else self.set(frame.f_locals["self"])

    def set(self, trainer: BaseTrainer) -> BaseTrainer | None:
        """Remember a trainer; gives it if it is a new one."""
        if any(trainer is known for known in self.trainers):
            return None
        self._references.append(weakref.ref(trainer))
        return trainer

    def column_names(self, loss: nn.Module, num_columns: int) -> tuple[str, ...]:
        """Names of the columns of text that a batch was made of.

        Args:
            loss: The loss that is linked.
            num_columns: Columns in the batch.

        Raises:
            ValueError: If data sets of as many columns name them for different tasks, and none can tell which is read.
        """
        trainer = self.trainer
        if trainer is None:
            return ()
        is_training = trainer.model.training
        key = (is_training, num_columns, id(trainer.train_dataset), id(trainer.eval_dataset))
        names = self._names.setdefault(trainer, {})
        if key not in names:
            names[key] = self._find_names(trainer, loss, is_training, num_columns)
        return names[key]

    def _find_names(self, trainer: Any, loss: nn.Module, is_training: bool, num_columns: int) -> tuple[str, ...]:
        datasets = [trainer.train_dataset, trainer.eval_dataset]
        for dataset in datasets if is_training else reversed(datasets):
            found = [names for names in _names_of(dataset, trainer.loss, loss) if len(names) == num_columns]
            if len({names if names in PAIR_TASKS.values() else () for names in found}) > 1:
                raise ValueError(
                    f"One GemLoss is to train on data sets of different columns, {found}, by which it would choose its "
                    "tasks. Name the columns alike, pass tasks=[...], or give the trainer a dict of losses."
                )
            if found:
                return found[0]
        return ()


def _names_of(dataset: Any, losses: Any, loss: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of the columns of text of each data set that a loss is used for."""
    parts = dataset if isinstance(dataset, dict) else {"": dataset}
    for name, part in parts.items():
        is_of_other = isinstance(losses, dict) and name in losses and loss not in set(losses[name].modules())
        if part is None or is_of_other:
            continue
        yield tuple(column for column in getattr(part, "column_names", None) or () if column not in OTHER_COLUMNS)
