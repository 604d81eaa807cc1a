"""GemLoss: next-token prediction beside a contrastive loss, as a Sentence-Transformers loss (paper, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.util import all_gather, all_gather_with_grad, batch_to_device, get_rank, get_world_size
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerState
from transformers.utils import logging

from ..cards.card_data import CITATION, use_gem_card
from ..checkpoints import last_checkpoint
from ..finding import require_gem
from ..modeling.gem_checkpoint import check_writable
from ..modeling.gem_parts import LAUNCH
from .contrastive import find_same_texts, info_nce, text_keys
from .dataset_checks import StreamCheck, check_dataset, is_stream, warn_of_truncation
from .next_token import check_output_head
from .objective import RowObjective
from .plan import RowPlan, check_tasks, check_views, default_token_dropout, plan_rows
from .rows import NO_TARGET, check_columns, draw_crops, drop_tokens, join_row, split_rows, split_text, takes_pairs
from .trainer_link import TrainerLink
from .wrapped_loss import BackwardOf, give_embeddings_to, mini_batch_size_of

logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = math.log(100.0)
LAST_STEP = 10**9
"""Step at which an alpha schedule is read where there is no training whose last step could be read."""


@dataclass
class _Column:
    """Rows made of one column of the data."""

    rows: list[tuple[Tensor, Tensor]]
    """Token ids and labels. Shape: ``(T_i,)`` each"""
    texts: list[Tensor]
    """Token ids of what the embedding of each row stands for. Shape: ``(m_i,)`` each"""
    others: dict[str, Any]
    """What else belongs to the column, such as the ``task`` that a Router goes by."""


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
            which has nothing to learn from next-token prediction but what its GEM tokens hold, to 1, or to 0.5 where
            tasks are chosen.
        tasks: Ways to make prefix and suffix, drawn evenly: ``"reconstruction"`` (the text twice), ``"continuation"``
            (cut at a random place; the row is then embedded by its first part), and, of two columns, ``"summary"``
            (context and summary) or ``"soft_prompt"`` (prompt and answer). By default the last two where the columns
            of the trainer's data bear these names and there is no ``loss``, otherwise the first two; reconstruction
            alone beside labels.
        views: Ways to make two views of a text, drawn evenly: ``"deletion"``, the text and the same with tokens deleted
            (the paper's), or ``"crops"``, two spans of it, which teaches retrieval from longer texts (Contriever).
            Texts of fewer than 16 tokens are not cropped.
        token_dropout: Share of tokens deleted for the second view of a text, in [0, 1). Defaults to 0.7, and beside a
            frozen base to 0.85.
        alpha: Weight of the contrastive part: a number in [0, 1], or a function of (optimizer step, last step).
            Defaults to :class:`gem_st.AlphaSchedule`, 0 for a fifth of the training and then rising to 0.9 at
            its end; beside a frozen base to 1, or 0.7 where ``plain_ratio`` is below 1.
        scale: Initial factor on cosine similarities (1 / temperature), in [1, 100]. It is learned with the model;
            by default it starts at what the model holds, which is 20 for a new one.
        loss: A loss of Sentence Transformers, made with the same model, instead of InfoNCE as the contrastive part.
            It is given embeddings, not the model, so that a batch still takes one forward pass; the loss is then
            GemLoss's own. Labels and scores of the data set go to it.
        inner: Another name of ``loss``.
        mini_batch_size: Rows whose activations are held at a time (GradCache, https://arxiv.org/abs/2101.06983): large
            batches in the memory of small ones, for one more forward pass. Gradients are the same. Defaults to that
            of a caching ``loss``.
        gather_across_devices: Take the texts of all processes as in-batch negatives.

    References:
        - GEM: Empowering LLM for both Embedding Generation and Language Understanding, section 3:
          https://arxiv.org/abs/2506.04344

    Requirements:
        1. One column of texts (self-supervised: the second view is the text with tokens deleted), or
        2. (anchor, positive) pairs, (anchor, positive, negative) triplets or n-tuples (supervised), or
        3. (context, summary) or (prompt, answer) pairs (self-supervised on both, with the task of that name), or
        4. what ``loss`` takes.

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
        | (context, summary) or (prompt, answer) pairs    | none   |
        +-------------------------------------------------+--------+
        | what ``loss`` takes                            | its    |
        +-------------------------------------------------+--------+

    Recommendations:
        - Set ``bf16=True`` in the training arguments where the device has it: weights loaded without a ``dtype`` are
          trained in float32, and saved as they were.
        - Use ``BatchSamplers.NO_DUPLICATES`` with pairs, so that no in-batch negative equals a positive.

    Raises:
        ValueError: If an option is out of range, the first module is not a GemTransformer, or ``loss`` needs more than
            embeddings or is of another model.

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
        tasks: Sequence[str] | None = None,
        views: str | Sequence[str] = "deletion",
        token_dropout: float | None = None,
        alpha: float | Callable[[int, int], float] | None = None,
        scale: float | None = None,
        loss: nn.Module | None = None,
        inner: nn.Module | None = None,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if loss is not None and inner is not None:
            raise ValueError("`inner` is another name of `loss`: give one of them.")
        loss = inner if loss is None else loss
        gem = require_gem(model, "GemLoss")
        gem.train_in_float32()
        if tasks is not None:
            check_tasks(tasks)
        self.views = check_views(views)
        if token_dropout is None:
            token_dropout = default_token_dropout(gem.freeze_base)
        if plain_ratio is not None:
            _check_range("plain_ratio", plain_ratio, 0.0, 1.0)
        _check_range("token_dropout", token_dropout, 0.0, 0.99)
        if scale is not None:
            _check_range("scale", scale, 1.0, 100.0)
            nn.init.constant_(gem.logit_scale, math.log(scale))
        if alpha is not None and not callable(alpha):
            _check_range("alpha", alpha, 0.0, 1.0)
        if loss is not None and (scale is not None or gather_across_devices):
            raise ValueError("scale and gather_across_devices belong to GemLoss's own InfoNCE; set those of `loss`.")
        if loss is not None:
            give_embeddings_to(loss, model)
            mini_batch_size = mini_batch_size_of(loss) if mini_batch_size is None else mini_batch_size
            if takes_pairs(tasks or ()):
                raise ValueError(f"tasks={tasks} take both columns as one text, of which `loss` would see one only.")
        if mini_batch_size is not None and not (isinstance(mini_batch_size, int) and mini_batch_size > 0):
            raise ValueError(f"mini_batch_size must be a whole number of 1 or more, got {mini_batch_size!r}.")
        self.model = model
        if loss is not None:  # where Sentence Transformers' card looks for it
            self.loss = loss
        self.token_dropout = token_dropout
        self.mini_batch_size = mini_batch_size
        self.gather_across_devices = gather_across_devices
        self.trainer_link = TrainerLink()
        self._stream_check: StreamCheck | None = None
        self._gem: tuple[Any] = (gem,)  # a tuple, so that the module is not registered twice
        self._given: dict[str, Any] = {"plain_ratio": plain_ratio, "alpha": alpha}
        self.tasks = None if tasks is None else tuple(tasks)
        self._last_plan = self._plan()
        _, self.plain_ratio, self.alpha = self._last_plan
        check_output_head(gem.base)
        if self.plain_ratio < 1:
            gem.require_attention_mask()
        gem.embedder.prepare_for_training()
        self.num_special = gem.base.text.num_special_tokens
        use_gem_card(model)

    @property
    def inner(self) -> nn.Module | None:
        """The loss that is the contrastive part instead of InfoNCE, if there is one."""
        return getattr(self, "loss", None)

    def _plan(self, column_names: Sequence[str] = (), has_labels: bool = False) -> RowPlan:
        """How rows are made of a batch with these columns; an inner loss knows itself what its columns are."""
        columns = column_names if self.inner is None else ()
        return plan_rows(self._gem[0].freeze_base, columns, tasks=self.tasks, has_labels=has_labels, **self._given)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GemLoss:
        """Meet the trainer that is being built, which moves its loss to the device."""
        if trainer := self.trainer_link.look():
            self._check_trainer(trainer)
        return super()._apply(fn, recurse)

    def on_trainer_init(self, trainer: BaseTrainer) -> None:
        """Meet a trainer that introduces itself."""
        if self.trainer_link.set(trainer):
            self._check_trainer(trainer)

    def _check_trainer(self, trainer: BaseTrainer) -> None:
        """Raise if something in the model, the data or the batch size cannot be trained with, or not be saved."""
        (gem,) = self._gem
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"The trainer sees {trainer.args.n_gpu} GPUs and no launcher, and would wrap the model in "
                f"nn.DataParallel, in which it does not run. {LAUNCH}"
            )
        check_writable(gem)
        if gem.mode == "lora" and not any(p.requires_grad for p in gem.model.get_input_embeddings().parameters()):
            raise ValueError(
                "The LoRA leaves the embeddings of the GEM tokens untrained. model.add_adapter(LoraConfig(...)) on the "
                "SentenceTransformer adds one that trains them."
            )
        options = {"takes_labels": self.inner is not None, "needs_others": self._needs_others}
        rows = check_dataset(trainer.train_dataset, "training", **options)
        check_dataset(trainer.eval_dataset, "evaluation", **options)
        is_streamed = not isinstance(trainer.train_dataset, dict) and is_stream(trainer.train_dataset)
        self._stream_check = StreamCheck(gem, self._needs_others) if is_streamed else None
        warn_of_truncation(gem, rows)
        columns = getattr(trainer.train_dataset, "column_names", None)
        if isinstance(columns, list):  # of several data sets, each may have its own loss
            check_columns(self.tasks or (), columns)
        self._check_batch_size(trainer)

    @property
    def _needs_others(self) -> bool:
        """Whether a text is to be told from others."""
        return self.inner is None and self.alpha != 0

    def _check_batch_size(self, trainer: BaseTrainer) -> None:
        """Raise if a batch of one has nothing to be told from: hard negatives, or texts of other processes."""
        columns = getattr(trainer.train_dataset, "column_names", None) or ()
        has_others = len(columns) > 2 or isinstance(columns, dict)
        has_others = has_others or (self.gather_across_devices and trainer.args.world_size > 1)
        if trainer.args.per_device_train_batch_size > 1 or has_others or not self._needs_others:
            return
        raise ValueError(
            "In batches of one text there are no negatives to tell it from. Raise per_device_train_batch_size "
            "(GemLoss(mini_batch_size=1) keeps the memory of one text), or pass alpha=0 for next-token prediction "
            "alone."
        )

    def _alpha_at(self, alpha: float | Callable[[int, int], float], state: TrainerState | None) -> float:
        """Weight of the contrastive part at the optimizer step; in evaluation, at the last step.

        Evaluation losses at different steps can then be compared, e.g. to find the best checkpoint.
        """
        if not callable(alpha):
            return float(alpha)
        if state is None:
            raise ValueError(
                "An alpha schedule needs a SentenceTransformerTrainer; outside one, pass alpha as a number."
            )
        last_step = state.max_steps or LAST_STEP  # 0 before a training
        value = float(alpha(state.global_step if self._gem[0].training else last_step, last_step))
        _check_range("alpha", value, 0.0, 1.0)
        if state.global_step == 0 and alpha(last_step, last_step) == 0:
            logger.warning_once(
                f"alpha stays 0 for all {last_step} steps of this training, so that embeddings are not trained to "
                "differ. Pass alpha=AlphaSchedule(num_ntp_steps=...) with fewer steps or a share below 1, or a number."
            )
        return value

    # ---- the loss

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Loss of one batch.

        Args:
            sentence_features: For each column, ``input_ids`` and ``attention_mask``. Shape: ``(B, T)`` each
            labels: What ``loss`` takes, otherwise None: GemLoss knows positives by their column.

        Returns:
            ``(1 - alpha) * ntp + alpha * contrastive``. Shape: ``()``

        Raises:
            ValueError: If labels or columns are not those the loss takes.
            FloatingPointError: If the loss is not a finite number, in training.
        """
        if labels is not None and self.inner is None:
            raise ValueError(
                "GemLoss takes texts only, but the dataset has a label or score column. Remove it with "
                "dataset.remove_columns(...), filter the pairs by it first, or give GemLoss a loss that takes it as "
                "`loss`."
            )
        (gem,) = self._gem
        if self.trainer_link.trainer is None:
            self.trainer_link.look()
        sentence_features, trainer = list(sentence_features), self.trainer_link.trainer
        names: tuple[str, ...] = ()
        if self.tasks is None and self.inner is None:
            names = self.trainer_link.column_names(self, len(sentence_features))
        plan = self._plan(names, labels is not None)
        self._last_plan = plan
        alpha = self._alpha_at(plan.alpha, trainer.state if trainer else None)
        with torch.no_grad():
            gem.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        columns = self._build_columns(sentence_features, plan, labels is not None)
        if gem.training and self._stream_check is not None and not self._stream_check.is_over:
            self._stream_check.see(self._split(sentence_features))
        embeddings, ntp, scale = self._embed(columns)
        if self.inner is None:
            contrastive = self._info_nce(columns, embeddings, scale)
        else:
            contrastive = self._inner_loss(columns, embeddings, labels)
        loss = (1 - alpha) * ntp + alpha * contrastive
        parts = {"ntp": ntp, "contrastive": contrastive, "alpha": alpha, "scale": scale}
        if gem.training:
            self._check_finite(loss, parts, trainer, columns)
        if trainer is not None:
            trainer.track_loss_components(
                {
                    name: torch.as_tensor(part, dtype=torch.float32, device=ntp.device).squeeze()
                    for name, part in parts.items()
                }
            )
        return loss

    def _build_columns(self, sentence_features: list[dict[str, Any]], plan: RowPlan, has_labels: bool) -> list[_Column]:
        """Make the rows of each column; of one without labels, which belong to whole texts, a second view as well."""
        (gem,) = self._gem
        generator = None if gem.training else torch.Generator().manual_seed(0)
        texts = self._split(sentence_features)
        suffixes = None
        check_columns(plan.tasks, len(texts))
        if takes_pairs(plan.tasks):
            suffixes = [text[self.num_special :] for text in texts.pop()]
        whole, crops = texts[0], None
        if "crops" in self.views and len(texts) == 1 and suffixes is None and not has_labels:
            texts[0], crops = self._draw_crops(whole, generator)
        rows, prefixes = self.build_rows([text for column in texts for text in column], generator, suffixes, plan)
        columns, size = [], len(texts[0])
        for start, features in zip(range(0, len(rows), size), sentence_features, strict=False):
            others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}
            columns.append(_Column(rows[start : start + size], prefixes[start : start + size], others))
        if len(columns) == 1 and not has_labels:
            views = self.build_views(prefixes, generator, crops)
            columns.append(_Column(views, prefixes if crops is None else whole, columns[0].others))
        return columns

    def _split(self, sentence_features: list[dict[str, Any]]) -> list[list[Tensor]]:
        """Token ids of the texts of each column, without padding and GEM tokens. Shape: ``(T_i,)`` each"""
        ids = self._gem[0].gem_token_ids
        return [split_rows(features["input_ids"], features["attention_mask"], ids) for features in sentence_features]

    def _draw_crops(
        self, texts: Sequence[Tensor], generator: torch.Generator | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Two spans of each text whose views are crops; the text itself and None of the others."""
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for text in texts:
            view = self.views[int(torch.randint(len(self.views), (), generator=generator))]
            spans = draw_crops(text, self.num_special, generator) if view == "crops" else None
            pairs.append(spans or (text, None))
        return [first for first, _ in pairs], [second for _, second in pairs]

    def _embed(self, columns: Sequence[_Column]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run all columns through the wrapped model, together but for those that a Router sends different ways.

        Returns:
            Embeddings of each column, shape ``(B, D)``; the next-token loss, shape ``()``, whose mean over processes
            is that over all their targets; and the factor on similarities, shape ``(1,)``.
        """
        embeddings: dict[int, Tensor] = {}
        totals, counts = [], []
        for index, column in enumerate(columns):
            if index in embeddings:
                continue
            group = [i for i, other in enumerate(columns) if other.others == column.others]
            features = self.collate([row for i in group for row in columns[i].rows])
            features = batch_to_device(features, self._gem[0].model.device)
            objective = RowObjective(features.pop("labels"), self.mini_batch_size)
            output = self.model({**column.others, **features, "objective": objective})
            embeddings |= zip(
                group, output["sentence_embedding"].split([len(columns[i].rows) for i in group]), strict=True
            )
            totals.append(output["ntp_loss"] * output["num_targets"])
            counts.append(output["num_targets"])
        num_targets = torch.stack(counts).sum()
        if (num_processes := get_world_size()) > 1:
            torch.distributed.all_reduce(num_targets)
        ntp = torch.stack(totals).sum() * num_processes / num_targets.clamp(min=1)
        return [embeddings[i] for i in range(len(columns))], ntp, output["logit_scale"]

    def _info_nce(self, columns: Sequence[_Column], embeddings: Sequence[Tensor], scale: Tensor) -> Tensor:
        """InfoNCE of the first column against all others. Shape: ``()``"""
        anchors, candidates = embeddings[0], list(embeddings[1:])
        keys = [text_keys(column.texts).to(anchors.device) for column in columns[1:]]
        offset = 0
        if self.gather_across_devices and get_world_size() > 1:
            candidates = [all_gather_with_grad(candidate) for candidate in candidates]
            keys = [all_gather(key) for key in keys]
            offset = get_rank() * len(anchors)
        same_text = find_same_texts(torch.cat(keys), len(anchors), offset)
        return info_nce(anchors, torch.cat(candidates), scale, same_text, offset)

    def _inner_loss(self, columns: Sequence[_Column], embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The inner loss, which sees texts without GEM tokens, and their embeddings. Shape: ``()``"""
        assert self.inner is not None
        joined = torch.cat(list(embeddings))
        detached = joined.detach().requires_grad_(joined.requires_grad)
        parts = detached.split([len(embedding) for embedding in embeddings])
        features = []
        for column, part in zip(columns, parts, strict=True):
            tokens = batch_to_device(self._gem[0].pad(column.texts), part.device)
            if tokens["input_ids"].shape[1] == part.shape[1]:
                # Losses that cut mini-batches trim what is as wide as the tokens, which embeddings must not be.
                tokens = {name: F.pad(tensor, (0, 1)) for name, tensor in tokens.items()}
            features.append({**column.others, **tokens, "sentence_embedding": part})
        loss = self.inner(features, labels)
        if isinstance(loss, dict):
            loss = torch.stack(list(loss.values())).sum()
        return BackwardOf.apply(joined, (detached, loss))

    def _check_finite(
        self, loss: Tensor, parts: dict[str, Any], trainer: BaseTrainer | None, columns: Sequence[_Column]
    ) -> None:
        """Stop before a step that would spoil the weights."""
        if bool(torch.isfinite(loss).all()):
            return
        values = ", ".join(f"{name} {torch.as_tensor(part).item():.4g}" for name, part in parts.items())
        texts = [self._gem[0].tokenizer.decode(text, skip_special_tokens=True)[:60] for text in columns[0].texts[:3]]
        where = "" if trainer is None else f" at step {trainer.state.global_step + 1} of {trainer.state.max_steps}"
        saved = None if trainer is None else last_checkpoint(str(trainer.args.output_dir))
        raise FloatingPointError(
            f"The loss is {loss.item()}{where} ({values}), in a batch of {len(columns[0].texts)} that starts with "
            f"{texts}. Weights were not changed by it. Go on from "
            f"{saved or 'the start'} with a lower learning rate, a longer warm-up or float32."
        )

    def build_rows(
        self,
        texts: Sequence[Tensor],
        generator: torch.Generator | None = None,
        suffixes: Sequence[Tensor] | None = None,
        plan: RowPlan | None = None,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Make plain and bottleneck rows of texts (paper, section 3).

        Args:
            texts: Token ids without padding and GEM tokens. Shape: ``(T_i,)`` each
            generator: Source of randomness; torch's global one by default.
            suffixes: What the summary and soft prompt tasks put behind them; part of the text in plain rows.
            plan: Tasks and share of plain rows, those of one column of texts by default.

        Returns:
            Token ids and labels of each row, as :func:`gem_st.losses.rows.join_row` gives them; and the prefix of each,
            which its embedding stands for, shape ``(m_i,)`` each.
        """
        (gem,) = self._gem
        max_length = gem.max_seq_length - gem.num_gem_tokens
        tasks, plain_ratio, _ = plan or self._plan()
        prefixes, rows = [], []
        for index, text in enumerate(texts):
            kind, given = "plain", None if suffixes is None else suffixes[index]
            if torch.rand((), generator=generator) >= plain_ratio:
                kind = tasks[int(torch.randint(len(tasks), (), generator=generator))]
            prefix, suffix = split_text(kind, text, given, max_length, self.num_special, generator)
            prefixes.append(prefix)
            row, labels = join_row(prefix, gem.gem_token_ids, suffix)
            if gem.freeze_base:
                labels[: len(prefix)] = NO_TARGET  # nothing to be learned where the base computes it
            rows.append((row, labels))
        return rows, prefixes

    def build_views(
        self,
        prefixes: Sequence[Tensor],
        generator: torch.Generator | None = None,
        crops: Sequence[Tensor | None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Make the second view of each prefix: some tokens deleted, GEM tokens appended, no next-token targets.

        Args:
            prefixes: Token ids. Shape: ``(m_i,)`` each
            generator: Source of randomness; torch's global one by default.
            crops: Second views that there are already, and None where tokens are to be deleted.

        Returns:
            Token ids and labels of each row, shape ``(at most m_i + K,)`` each.
        """
        views = [
            drop_tokens(prefix, self.token_dropout, self.num_special, generator) if given is None else given
            for prefix, given in zip(prefixes, crops or [None] * len(prefixes), strict=True)
        ]
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
            "plain_ratio": self._last_plan.plain_ratio,
            "tasks": list(self._last_plan.tasks),
            **({} if self.views == ("deletion",) else {"views": list(self.views)}),
            "token_dropout": self.token_dropout,
            "alpha": alpha if isinstance(alpha := self._last_plan.alpha, float | int) else repr(alpha),
            **({} if self.inner is None else {"inner": type(self.inner).__name__}),
            **({} if self.mini_batch_size is None else {"mini_batch_size": self.mini_batch_size}),
            **({"gather_across_devices": True} if self.gather_across_devices else {}),
        }

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper, for the model card."""
        return CITATION


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}.")
