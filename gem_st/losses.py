"""GemLoss: next-token prediction beside a contrastive loss, as a Sentence-Transformers loss (paper, section 3)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.trainer import BaseTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerState
from transformers.utils import logging

from .model_card import CITATION, gem_of, use_gem_card
from .training import AlphaSchedule
from .views import NO_TARGET, TASKS, drop_tokens, join_row, split_rows

logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = math.log(100.0)
LAST_STEP = 10**9
"""Step at which an alpha schedule is read where there is no training whose last step could be read."""


def info_nce(
    anchors: Tensor, candidates: Tensor, logit_scale: Tensor | float, same_text: Tensor | None = None
) -> Tensor:
    """InfoNCE on scaled cosine similarities: candidate ``i`` is the positive of anchor ``i``, all others negatives.

    Args:
        anchors: Embeddings. Shape: ``(B, D)``
        candidates: Embeddings of the positives, then of any further negatives. Shape: ``(at least B, D)``
        logit_scale: Factor on the similarities (not its log). Shape: ``()`` or ``(1,)``
        same_text: True where a candidate is no negative, from :func:`find_same_texts`. Shape: ``(B, at least B)``

    Returns:
        Mean loss in nats. Shape: ``()``
    """
    similarities = F.normalize(anchors.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T
    logits = similarities * logit_scale
    if same_text is not None:
        logits = logits.masked_fill(same_text, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def find_same_texts(texts: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Which candidates spell the same text as an anchor's positive, and are therefore no negatives of it.

    Args:
        texts: Token ids of each candidate, positives first. Shape: ``(T_i,)`` each
        num_anchors: B, the number of positives.

    Returns:
        True for the same text, except for the positive itself. Shape: ``(B, number of candidates)``
    """
    keys: dict[tuple[int, ...], int] = {}
    index = torch.tensor([keys.setdefault(tuple(text.tolist()), len(keys)) for text in texts])
    same = index[:num_anchors, None] == index
    return same & ~torch.eye(num_anchors, len(texts), dtype=torch.bool)


class GemLoss(nn.Module):
    """Trains a model whose first module is a :class:`gem_st.GemTransformer` by ``(1 - alpha) * ntp + alpha *
    contrastive``: next-token prediction keeps it a language model and, on rows with a suffix behind the GEM
    tokens, teaches these to carry the text; the contrastive part spreads their embeddings.

    Each text becomes a row: with probability ``plain_ratio`` plain text with GEM tokens appended, otherwise
    ``prefix | GEM | suffix`` by one of ``tasks``. One forward pass gives both the next-token loss and the
    embedding of each prefix.

    Args:
        model: SentenceTransformer model with a GemTransformer as its first module.
        plain_ratio: Share of plain rows, in [0, 1] (p in the paper). Defaults to 0.8, and beside a frozen base,
            which has nothing to learn from next-token prediction but what its GEM tokens hold, to 1.
        tasks: Ways to make prefix and suffix, drawn evenly: ``"reconstruction"`` (the text twice),
            ``"continuation"`` (cut at a random place; the row is then embedded by its first part).
        token_dropout: Share of tokens deleted for the second view of a text, in [0, 1). Defaults to 0.7, and beside a
            frozen base to 0.85.
        alpha: Weight of the contrastive part: a number in [0, 1], or a function of (optimizer step, last step).
            Defaults to :class:`gem_st.AlphaSchedule`, 0 for 100 steps and then rising; beside a frozen base to 1, or
            0.7 where ``plain_ratio`` is below 1.
        scale: Initial factor on cosine similarities (1 / temperature), in [1, 100]. It is learned with the model;
            by default it starts at what the model holds, which is 20 for a new one.

    References:
        - GEM: Empowering LLM for both Embedding Generation and Language Understanding, section 3:
          https://arxiv.org/abs/2506.04344

    Requirements:
        1. One column of texts (self-supervised: the second view is the text with tokens deleted), or
        2. (anchor, positive) pairs, (anchor, positive, negative) triplets or n-tuples (supervised).

    Inputs:
        +-------------------------------------------------+--------+
        | Texts                                           | Labels |
        +=================================================+========+
        | single texts                                    | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive) pairs                        | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative) triplets           | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

    Recommendations:
        - Train weights kept in float32 with ``bf16=True`` in the training arguments: in bfloat16, steps of a
          small learning rate are lost to rounding.
        - Use ``BatchSamplers.NO_DUPLICATES`` with pairs, so that no in-batch negative equals a positive.

    Raises:
        ValueError: If an option is out of range or the first module is not a GemTransformer.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
            from gem_st import GemLoss, GemTransformer

            model = SentenceTransformer(modules=[GemTransformer("HuggingFaceTB/SmolLM2-135M")])
            train_dataset = Dataset.from_dict({"text": ["It's so sunny.", "He took the car to the office."]})
            trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=GemLoss(model))
            trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        plain_ratio: float | None = None,
        tasks: Sequence[str] = ("reconstruction", "continuation"),
        token_dropout: float | None = None,
        alpha: float | Callable[[int, int], float] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        gem = gem_of(model, "GemLoss")
        if plain_ratio is None:
            plain_ratio = 1.0 if gem.freeze_base else 0.8
        if token_dropout is None:
            token_dropout = 0.85 if gem.freeze_base else 0.7
        if alpha is None and gem.freeze_base:
            alpha = 1.0 if plain_ratio == 1 else 0.7
        _check_range("plain_ratio", plain_ratio, 0.0, 1.0)
        _check_range("token_dropout", token_dropout, 0.0, 0.99)
        if scale is not None:
            _check_range("scale", scale, 1.0, 100.0)
            nn.init.constant_(gem.logit_scale, math.log(scale))
        if unknown := [task for task in tasks if task not in TASKS] or (plain_ratio < 1 and not tasks):
            raise ValueError(f"tasks must be some of {sorted(TASKS)}, got {tasks!r} (not known: {unknown}).")
        if alpha is not None and not callable(alpha):
            _check_range("alpha", alpha, 0.0, 1.0)
        self.model = model
        self.plain_ratio = plain_ratio
        self.tasks = tuple(tasks)
        self.token_dropout = token_dropout
        self.alpha = AlphaSchedule() if alpha is None else alpha
        self._gem: tuple[Any] = (gem,)  # a tuple, so that the module is not registered twice
        gem.check_output_head()
        if plain_ratio < 1:
            gem.require_attention_mask()
        self.num_special = gem.num_special_tokens
        _warn_of_low_precision(gem)
        use_gem_card(model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GemLoss:
        """Check the data: a trainer moves its loss to the device while it is being built, and calls this."""
        if (trainer := _find_trainer()) is not None:
            _check_dataset(trainer.train_dataset, "training")
            _check_dataset(trainer.eval_dataset, "evaluation")
        return super()._apply(fn, recurse)

    def current_alpha(self, state: TrainerState | None) -> float:
        """Weight of the contrastive part at the optimizer step; in evaluation, at the last step.

        Evaluation losses at different steps can then be compared, e.g. to find the best checkpoint.

        Args:
            state: The trainer's, which knows the step.

        Raises:
            ValueError: If ``alpha`` is a function and there is no trainer, or it returns a number outside [0, 1].
        """
        if not callable(self.alpha):
            return float(self.alpha)
        if state is None:
            raise ValueError(
                "An alpha schedule needs a SentenceTransformerTrainer; outside one, pass alpha as a number."
            )
        last_step = state.max_steps or LAST_STEP  # 0 before a training
        alpha = float(self.alpha(state.global_step if self._gem[0].training else last_step, last_step))
        _check_range("alpha", alpha, 0.0, 1.0)
        if state.global_step == 0 and self.alpha(last_step, last_step) == 0:
            logger.warning_once(
                f"alpha stays 0 for all {last_step} steps of this training, so that embeddings are not trained to "
                "differ. Pass alpha=AlphaSchedule(num_ntp_steps=...) with fewer steps, or a number."
            )
        return alpha

    # ---- the loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Loss of one batch.

        Args:
            sentence_features: For each column, ``input_ids`` and ``attention_mask``. Shape: ``(B, T)`` each
            labels: None; GemLoss knows positives by their column.

        Returns:
            ``(1 - alpha) * ntp + alpha * contrastive``. Shape: ``()``
        """
        if labels is not None:
            raise ValueError(
                "GemLoss takes texts only, but the dataset has a label or score column. Remove it with "
                "dataset.remove_columns(...), or filter the pairs by it first."
            )
        (gem,) = self._gem
        trainer = _find_trainer()
        alpha = self.current_alpha(trainer.state if trainer else None)
        generator = None if gem.training else torch.Generator().manual_seed(0)
        columns = [
            split_rows(features["input_ids"], features["attention_mask"], gem.gem_token_ids)
            for features in sentence_features
        ]
        with torch.no_grad():
            gem.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

        rows, prefixes = self.build_rows([text for column in columns for text in column], generator)
        if len(columns) == 1:
            columns.append(prefixes)
            rows += self.build_views(prefixes, generator)
        # One pass through the wrapped model for everything: distributed training allows no more.
        output = self.model({name: tensor.to(gem.model.device) for name, tensor in self.collate(rows).items()})
        anchors, candidates = output["sentence_embedding"].split([len(columns[0]), len(rows) - len(columns[0])])
        same_text = find_same_texts([text for column in columns[1:] for text in column], len(columns[0]))
        contrastive = info_nce(anchors, candidates, output["logit_scale"], same_text.to(anchors.device))
        ntp = output["ntp_loss"]
        if trainer is not None:
            parts = {"ntp": ntp, "contrastive": contrastive, "alpha": alpha, "scale": output["logit_scale"]}
            trainer.track_loss_components(
                {
                    name: torch.as_tensor(part, dtype=torch.float32, device=ntp.device).squeeze()
                    for name, part in parts.items()
                }
            )
        return (1 - alpha) * ntp + alpha * contrastive

    def build_rows(
        self, texts: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Make plain and bottleneck rows of texts (paper, section 3).

        Args:
            texts: Token ids without padding and GEM tokens. Shape: ``(T_i,)`` each
            generator: Source of randomness; torch's global one by default.

        Returns:
            Token ids and labels of each row, as :func:`gem_st.views.join_row` gives them; and the prefix of each row,
            which its embedding stands for, shape ``(m_i,)`` each.
        """
        (gem,) = self._gem
        max_length = gem.max_seq_length - gem.num_gem_tokens
        prefixes, rows = [], []
        for text in texts:
            prefix, suffix = text, None
            if torch.rand((), generator=generator) >= self.plain_ratio:
                task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
                prefix, suffix = TASKS[task](text, max_length, self.num_special, generator)
            prefixes.append(prefix)
            row, labels = join_row(prefix, gem.gem_token_ids, suffix)
            if gem.freeze_base:
                labels[: len(prefix)] = NO_TARGET  # nothing to be learned where the base computes it
            rows.append((row, labels))
        return rows, prefixes

    def build_views(
        self, prefixes: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Make the second view of each prefix: some tokens deleted, GEM tokens appended, no next-token targets.

        Args:
            prefixes: Token ids. Shape: ``(m_i,)`` each
            generator: Source of randomness; torch's global one by default.

        Returns:
            Token ids and labels of each row, shape ``(at most m_i + K,)`` each.
        """
        views = [drop_tokens(prefix, self.token_dropout, self.num_special, generator) for prefix in prefixes]
        rows = [join_row(view, self._gem[0].gem_token_ids)[0] for view in views]
        return [(row, torch.full_like(row, NO_TARGET)) for row in rows]

    def collate(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Pad rows on the right.

        Args:
            rows: Token ids and labels. Shape: ``(T_i,)`` each

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``. Shape: ``(B, T)`` each
        """
        features = self._gem[0].pad([row for row, _ in rows], padding_side="right")
        labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=NO_TARGET)
        return {**features, "labels": labels}

    def get_config_dict(self) -> dict[str, Any]:
        """Options of this loss, for the model card."""
        return {
            "plain_ratio": self.plain_ratio,
            "tasks": list(self.tasks),
            "token_dropout": self.token_dropout,
            "alpha": self.alpha if isinstance(self.alpha, float | int) else repr(self.alpha),
        }

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper, for the model card."""
        return CITATION


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}.")


def _warn_of_low_precision(gem: Any) -> None:
    dtypes = {p.dtype for p in gem.model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if dtypes:
        logger.warning(
            f"The weights to be trained are in {', '.join(map(str, dtypes))}, in which small optimizer steps are lost "
            'to rounding. Load them with model_kwargs={"dtype": "float32"} and set bf16=True in the training '
            "arguments to compute in bfloat16."
        )


def _find_trainer() -> BaseTrainer | None:
    """The Sentence-Transformers trainer whose method is running, if any.

    Sentence Transformers hands a loss neither the trainer nor the step. Both are needed: the step for ``alpha``, the
    trainer's log for the parts of the loss.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), BaseTrainer):
            return trainer
        frame = frame.f_back
    return None


def _check_dataset(dataset: Any, kind: str) -> None:
    """Raise if a training or evaluation set cannot be used, before the first step.

    Columns are checked where there is one data set; of several, another loss may use some.

    Raises:
        ValueError: If it is empty, or a column is known not to hold text.
    """
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if any(hasattr(part, "__len__") and len(part) == 0 for part in parts):
        raise ValueError(f"The {kind} set has no rows. Check how it was loaded, filtered or split.")
    features = None if isinstance(dataset, dict) else getattr(dataset, "features", None)
    for column, feature in (features or {}).items():
        dtype = getattr(feature, "dtype", type(feature).__name__)
        if dtype not in ("string", "large_string"):
            raise ValueError(
                f"Column {column!r} of the {kind} set holds {dtype}, but GemLoss trains on columns of text. Drop it "
                f"with dataset.remove_columns({column!r}); filter pairs by a label or score first, if you have one."
            )
