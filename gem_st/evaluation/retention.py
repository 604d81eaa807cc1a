"""Whether a generator is still its base's: same logits, same tokens, same answers, and how far off if not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDING = 1e-6
"""Mean KL in nats per token up to which a model that picks the same tokens differs by rounding alone."""


@dataclass(frozen=True)
class Difference:
    """A score of a model less its base's.

    Args:
        score: The model's.
        base: The base's.
        difference: The first less the second.
        low: Lower end of the 95 % confidence interval of the difference; None without a record of answers.
        high: Upper end.
        num_samples: Questions.
        higher_is_better: False for a perplexity.
        metric: Name of the score.
        subjects: The same for each subject of the task.
    """

    score: float
    base: float
    difference: float
    low: float | None
    high: float | None
    num_samples: int
    higher_is_better: bool = True
    metric: str = "acc"
    subjects: dict[str, Difference] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``equal``, ``within noise``, ``a loss``, ``a gain``, or nothing where there is no interval."""
        if self.low is None or self.high is None:
            return ""
        if self.low == self.high == 0:
            return "equal"
        if self.low <= 0 <= self.high:
            return "within noise"
        return "a gain" if (self.difference > 0) == self.higher_is_better else "a loss"


@dataclass(frozen=True)
class Retention:
    """How a generator compares with its base.

    Args:
        identical: True if all logits are equal to the bit.
        num_texts: Texts read.
        num_tokens: Tokens predicted on them, all but the first of each text.
        disagreement: Share of these at which the two models find another token most probable.
        kl: Mean of KL(base || model) over these, in nats.
        max_logit_difference: Largest absolute difference of two logits.
        perplexity: The model's, per token, over the tokens compared.
        base_perplexity: The base's.
        perplexity_ratio: The first over the second.
        ratio_low: Lower end of the ratio's 95 % confidence interval, over texts.
        ratio_high: Upper end.
        tasks: Differences in the tasks of which results were given, by name.
    """

    identical: bool
    num_texts: int
    num_tokens: int
    disagreement: float
    kl: float
    max_logit_difference: float
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float
    ratio_low: float
    ratio_high: float
    tasks: dict[str, Difference] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """One sentence that says whether the generator changed."""
        if self.identical:
            return self._identical_sentence()
        tasks = "".join(f", {_describe(name, task)}" for name, task in self.tasks.items())
        ratio = f"perplexity x {self.perplexity_ratio:.4g}"
        if self.disagreement == 0 and self.kl < ROUNDING:
            return (
                f"The generator is the base's but for rounding: logits differ by {self.max_logit_difference:.1g} at "
                f"most, and it picks the same token at all {self.num_tokens:,} positions, {ratio}{tasks}."
            )
        interval = f" (95 % CI {self.ratio_low:.4g} to {self.ratio_high:.4g})"
        share = f"{100 * self.disagreement:.2g} %" if self.disagreement < 0.995 else "all"
        return f"The generator changed: it picks another token at {share} of positions, {ratio}{interval}{tasks}."

    def _identical_sentence(self) -> str:
        start = f"The generator is the base's, to the bit: all logits at {self.num_tokens:,} tokens of text are equal"
        moved = {name: task for name, task in self.tasks.items() if task.score != task.base}
        if moved:
            listed = ", ".join(_describe(name, task) for name, task in moved.items())
            return f"{start}; the scores given are not ({listed}), so they were not measured in the same way."
        return f"{start}{', and so are its scores in ' + ', '.join(self.tasks) if self.tasks else ''}."

    def to_dict(self) -> dict[str, Any]:
        """What `json` can write, the sentence and the verdicts included."""
        values = asdict(self)
        for name, task in self.tasks.items():
            values["tasks"][name]["verdict"] = task.verdict
            for subject, part in task.subjects.items():
                values["tasks"][name]["subjects"][subject]["verdict"] = part.verdict
                del values["tasks"][name]["subjects"][subject]["subjects"]
        return {**values, "sentence": self.sentence}


def _describe(name: str, task: Difference) -> str:
    """A task's difference in words; accuracies in points of 100."""
    if task.low is None or task.high is None:
        return f"{name} {task.metric} {task.base:.4g} to {task.score:.4g}"
    if task.verdict == "equal":
        return f"{name} {_points(0)} points (equal)"
    interval = f"95 % CI {_points(task.low)} to {_points(task.high)}"
    return f"{name} {_points(task.difference)} points ({interval}, {task.verdict})"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def compare_generators(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    base_results: Mapping[str, Mapping[str, Any]] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    max_length: int = 256,
    batch_size: int = 16,
) -> Retention:
    """Compare a generator with its base, on texts and by the answers they gave.

    Logits are compared over the tokens that both have and that can be written: the tokenizer's, without those that the
    model's ``generation_config`` suppresses. So GEM rows, appended or in place of padding, do not count. Both models
    read the same batches, because a row's last digits depend on what it is padded to.

    Args:
        model: A ``*ForCausalLM``: ``model[0].model`` of a GEM model.
        base: Its base.
        tokenizer: Their tokenizer.
        texts: Texts, of the kind that the base is good at.
        results: The model's results by task, from
            :func:`gem_st.evaluation.lm_eval_tasks.evaluate_generation`.
        base_results: The base's, of the same tasks; tasks that only one of them has are left out.
        num_resamples: Draws of the bootstrap.
        seed: Of the bootstrap.
        max_length: Tokens read of each text.
        batch_size: Texts in a forward pass. One batch of logits of each model is in memory at a time.

    Returns:
        The comparison.

    Raises:
        ValueError: If no text has two tokens, or results are of different questions.
    """
    random = np.random.default_rng(seed)
    tasks = {
        name: compare_results(result, (base_results or {})[name], num_resamples=num_resamples, random=random, name=name)
        for name, result in (results or {}).items()
        if name in (base_results or {})
    }
    sums = _compare_logits(model, base, tokenizer, texts, max_length, batch_size)
    num_tokens = int(sums.counts.sum())
    log_ratios = sums.losses - sums.base_losses
    low, high = _interval(_resample_ratios(log_ratios, sums.counts, num_resamples, random))
    return Retention(
        identical=sums.identical,
        num_texts=len(sums.counts),
        num_tokens=num_tokens,
        disagreement=sums.num_other / num_tokens,
        kl=sums.kl / num_tokens,
        max_logit_difference=sums.max_difference,
        perplexity=math.exp(sums.losses.sum() / num_tokens),
        base_perplexity=math.exp(sums.base_losses.sum() / num_tokens),
        perplexity_ratio=math.exp(log_ratios.sum() / num_tokens),
        ratio_low=math.exp(low),
        ratio_high=math.exp(high),
        tasks=tasks,
    )


# --------------------------------------------------------------------------------------------------------------------
# Texts


@dataclass
class _Sums:
    """What is added up over texts; losses and counts are kept for each text, in nats and tokens."""

    losses: np.ndarray
    base_losses: np.ndarray
    counts: np.ndarray
    identical: bool = True
    num_other: int = 0
    kl: float = 0.0
    max_difference: float = 0.0


@torch.inference_mode()
def _compare_logits(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_size: int,
) -> _Sums:
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    rows = sorted((torch.tensor(row) for row in ids if len(row) > 1), key=len)
    if not rows:
        raise ValueError("Comparing generators needs at least one text of two tokens or more.")
    training = [each for each in (model, base) if each.training]
    columns = _shared_tokens(model, base, tokenizer, torch.cat(rows).unique().tolist()).to(base.device)
    sums = _Sums(np.zeros(len(rows)), np.zeros(len(rows)), np.array([len(row) - 1 for row in rows]))
    for each in training:
        each.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # Padding on the right of a causal model needs no mask: no real token sees it.
        inputs = pad_sequence(batch, batch_first=True)
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
        base_logits = base(input_ids=inputs.to(base.device), use_cache=False).logits
        for i, row in enumerate(batch):
            parts = [part[i, : len(row) - 1].to(base.device)[:, columns] for part in (logits, base_logits)]
            targets = torch.searchsorted(columns, row[1:].to(base.device))
            _add_row(sums, start + i, parts[0], parts[1], targets)
    for each in training:
        each.train()
    return sums


def _add_row(sums: _Sums, index: int, logits: Tensor, base_logits: Tensor, targets: Tensor) -> None:
    """Add one text.

    Args:
        sums: To be added to.
        index: The text's place.
        logits: The model's, over the shared tokens. Shape: ``(T, V)``
        base_logits: The base's. Shape: ``(T, V)``
        targets: The token that comes next at each position. Shape: ``(T,)``
    """
    sums.identical &= logits.dtype == base_logits.dtype and torch.equal(logits, base_logits)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    logits, base_logits = logits.to(wide), base_logits.to(wide)
    sums.max_difference = max(sums.max_difference, (logits - base_logits).abs().max().item())
    sums.num_other += int((logits.argmax(-1) != base_logits.argmax(-1)).sum())
    log_p, base_log_p = logits.log_softmax(-1), base_logits.log_softmax(-1)
    sums.kl += (base_log_p.exp() * (base_log_p - log_p)).sum().item()
    sums.losses[index] = -log_p.gather(-1, targets[:, None]).sum().item()
    sums.base_losses[index] = -base_log_p.gather(-1, targets[:, None]).sum().item()


def _shared_tokens(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: Sequence[int]
) -> Tensor:
    """Ids of the tokens that can be written, or are used, and that both models have, in order. Shape: ``(V,)``"""
    num_rows = min(each.get_output_embeddings().weight.shape[0] for each in (model, base))
    config = getattr(model, "generation_config", None)
    suppressed = set(getattr(config, "suppress_tokens", None) or ())
    writable = {row for row in tokenizer.get_vocab().values() if row < num_rows} - suppressed
    return torch.tensor(sorted(writable.union(used)))


def _resample_ratios(
    log_ratios: np.ndarray, counts: np.ndarray, num_resamples: int, random: np.random.Generator
) -> np.ndarray:
    """Logarithm of the perplexity ratio in draws of texts with replacement. Shape: ``(num_resamples,)``"""
    draws = (random.integers(len(counts), size=len(counts)) for _ in range(num_resamples))
    return np.array([log_ratios[draw].sum() / counts[draw].sum() for draw in draws])


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------------------------
# Tasks


def compare_results(
    result: Mapping[str, Any],
    base_result: Mapping[str, Any],
    *,
    num_resamples: int = 1000,
    random: np.random.Generator | None = None,
    name: str = "task",
) -> Difference:
    """Compare two models' results in a task, question by question.

    The interval is that of a paired bootstrap: questions are drawn with replacement, within each subject, and both
    models' answers to them are kept together. Of many subjects, one in twenty leaves its interval by chance.

    Args:
        result: The model's, as :func:`gem_st.evaluation.lm_eval_tasks.evaluate_generation` returns it.
        base_result: The base's.
        num_resamples: Draws of the bootstrap.
        random: Where draws come from; a generator seeded with 0 if not given.
        name: The task's, for messages.

    Returns:
        The difference of the main scores, and for MMLU of each subject.

    Raises:
        ValueError: If the two are not of the same questions.
    """
    random = random or np.random.default_rng(0)
    _check_same_task(name, result, base_result)
    score, base = float(result["main_score"]), float(base_result["main_score"])
    more = {"higher_is_better": result["higher_is_better"], "metric": result["metric"]}
    if not result.get("correct"):
        return Difference(score, base, score - base, None, None, result["num_samples"], **more)
    draws, subjects = [], {}
    for subject, answers in result["correct"].items():
        pair = _answers(answers), _answers(base_result["correct"][subject])
        draws.append(_resample_means(pair[0] - pair[1], num_resamples, random))
        means = float(pair[0].mean()), float(pair[1].mean())
        change = float((pair[0] - pair[1]).mean())
        subjects[subject] = Difference(*means, change, *_interval(draws[-1]), len(answers), **more)
    interval = _interval(np.mean(draws, axis=0))
    parts = subjects if "subjects" in result else {}
    return Difference(score, base, score - base, *interval, result["num_samples"], **more, subjects=parts)


def _check_same_task(name: str, result: Mapping[str, Any], base_result: Mapping[str, Any]) -> None:
    for key in ("type", "metric", "num_samples"):
        if result[key] != base_result[key]:
            raise ValueError(
                f"{name}: {key} is {result[key]!r} for the model and {base_result[key]!r} for its base. Measure both "
                "on the same task with the same limit."
            )
    records = [
        {subject: len(answers) for subject, answers in each.get("correct", {}).items()}
        for each in (result, base_result)
    ]
    if records[0] != records[1]:
        raise ValueError(f"{name}: the two results are not of the same questions. Measure both on the same files.")


def _answers(record: str) -> np.ndarray:
    return np.array([int(answer) for answer in record])


def _resample_means(changes: np.ndarray, num_resamples: int, random: np.random.Generator) -> np.ndarray:
    """Mean change over questions drawn with replacement.

    Args:
        changes: 1 for each question gained, -1 lost, 0 as before. Shape: ``(N,)``
        num_resamples: Draws.
        random: Where they come from.

    Returns:
        Shape: ``(num_resamples,)``
    """
    shares = np.array([(changes == value).mean() for value in (-1, 0, 1)])
    drawn = random.multinomial(len(changes), shares / shares.sum(), size=num_resamples)
    return (drawn[:, 2] - drawn[:, 0]) / len(changes)
