"""Measures of the two sides of a GEM model that Sentence Transformers' own evaluators do not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .modeling.gem_text import TextCodec


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 16,
) -> float:
    """Perplexity of a causal language model on texts: exp of the mean loss over all tokens but the first of each.

    Args:
        model: A ``*ForCausalLM``: ``model[0].model`` of a GEM model, or any base.
        tokenizer: Its tokenizer.
        texts: The texts; longer ones are truncated.
        max_length: Tokens read of each text.
        batch_size: Texts in a forward pass.

    Returns:
        Perplexity, per token.

    Raises:
        ValueError: If no text has two tokens.
    """
    ids = TextCodec(tokenizer).encode(list(texts), max_tokens=max_length)
    rows = sorted((torch.tensor(row) for row in ids if len(row) > 1), key=len)
    if not rows:
        raise ValueError("Perplexity needs at least one text of two tokens or more.")
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        labels = pad_sequence(batch, batch_first=True, padding_value=-100).to(model.device)
        num_targets = sum(len(row) - 1 for row in batch)
        # Padding on the right of a causal model needs no mask: no real token sees it.
        loss = model(input_ids=labels.clamp(min=0), labels=labels, use_cache=False).loss
        total, count = total + loss.item() * num_targets, count + num_targets
    model.train(was_training)
    return math.exp(total / count)


class _GemEvaluator(BaseEvaluator):
    """An evaluator of what a GEM model does beside embedding."""

    texts: list[str]
    name: str

    def __call__(  # type: ignore[override]  # a dict always
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure.

        Args:
            model: A model whose first module is a GemTransformer.
            output_path: Not used.
            epoch: The trainer's epoch, for the model card.
            steps: The trainer's step, for the model card.

        Returns:
            The metrics.
        """
        metrics = self.prefix_name_to_metrics(self.measure(model[0]), self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def measure(self, gem: Any) -> dict[str, float]:
        """The metrics of a GEM module under their short names, without a word to the model card."""
        raise NotImplementedError


class PerplexityEvaluator(_GemEvaluator):
    """Perplexity of a GEM model's generator on texts, so that the trainer and the model card watch it, too.

    Args:
        texts: The texts, of the kind the base model is good at, and not trained on.
        name: Put before the name of the metric.
        max_length: Tokens read of each text.
        batch_size: Texts in a forward pass.
    """

    greater_is_better = False

    def __init__(self, texts: Sequence[str], name: str = "", max_length: int = 256, batch_size: int = 16) -> None:
        super().__init__()
        self.texts, self.name, self.max_length, self.batch_size = list(texts), name, max_length, batch_size
        self.primary_metric = f"{name}_perplexity" if name else "perplexity"

    def measure(self, gem: Any) -> dict[str, float]:
        """The perplexity of a GEM module's generator."""
        value = perplexity(gem.model, gem.tokenizer, self.texts, max_length=self.max_length, batch_size=self.batch_size)
        return {"perplexity": value}


class ReconstructionEvaluator(_GemEvaluator):
    """How much of texts their GEM tokens hold: writes each from its memory alone and compares (paper, table 6).

    As an ``evaluator`` of the trainer it monitors the reconstruction task of :class:`gem_st.GemLoss`. Metrics are
    ``exact_match``, the share of texts that come back whole, in [0, 1], and ``chrf``, sacreBLEU's chrF2 over all of
    them, in [0, 100].

    Args:
        texts: The texts, short ones: the paper finds about 30 tokens to come back whole at most.
        name: Put before the names of the metrics.
        batch_size: Texts at a time.

    Raises:
        ImportError: If sacrebleu is not installed.
        ValueError: If there are no texts.
    """

    def __init__(self, texts: Sequence[str], name: str = "", batch_size: int = 32) -> None:
        super().__init__()
        try:
            from sacrebleu import CHRF
        except ImportError as error:
            raise ImportError("ReconstructionEvaluator needs sacrebleu: pip install sacrebleu") from error
        if not texts:
            raise ValueError("ReconstructionEvaluator needs at least one text.")
        self.texts, self.name, self.batch_size = list(texts), name, batch_size
        self.chrf = CHRF()
        self.primary_metric = f"{name}_chrf" if name else "chrf"

    def measure(self, gem: Any) -> dict[str, float]:
        """What a GEM module writes back of the texts: ``exact_match`` and ``chrf``."""
        copies: list[str] = []
        for start in range(0, len(self.texts), self.batch_size):
            copies += gem.reconstruct(gem.compress(self.texts[start : start + self.batch_size]))
        hits = [copy.strip() == text.strip() for copy, text in zip(copies, self.texts, strict=True)]
        return {
            "exact_match": sum(hits) / len(hits),
            "chrf": self.chrf.corpus_score(copies, [self.texts]).score,
        }
