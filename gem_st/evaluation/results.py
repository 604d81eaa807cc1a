"""Results of an evaluation, and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

GROUPS = {
    "Clustering": "Clust",
    "Reranking": "Rerank",
    "PairClassification": "Pair",
    "STS": "STS",
    "Retrieval": "Retr",
    "Summarization": "Summ",
    "Classification": "Cls",
}
"""Task types of mteb, in the order of the paper's table (arXiv 2506.04344), and their names there."""


START, END = "<!-- gem-st eval: start -->", "<!-- gem-st eval: end -->"


DATASETS = "gem-st-eval/"
"""Data sets of this evaluation, in the metadata of a card, start with it."""


PERPLEXITIES = ("perplexity", "word_perplexity", "token_perplexity")


@dataclass
class EvalResults:
    """Results of :func:`gem_st.evaluation.run.evaluate`.

    Attributes:
        name: The checkpoint.
        embedding: By task: ``main_score``, ``type``, ``metric``, ``baseline`` (the first one's, or None), with
            its ``difference``, ``baselines``, all of them by name, and mteb's other ``metrics``.
        generation: By task: ``main_score``, ``type``, ``metric``, ``baseline`` (the base's) with its ``difference``,
            ``base``, and more of :func:`gem_st.evaluation.lm_eval_tasks.evaluate_generation`.
        retention: :class:`gem_st.evaluation.retention.Retention` as a dict, or None.
        health: :class:`gem_st.evaluation.health.Health` as a dict, or None.
        config: What was evaluated, how, with which versions.
        errors: What went wrong in tasks that have no result, by task.
    """

    name: str
    embedding: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation: dict[str, dict[str, Any]] = field(default_factory=dict)
    retention: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add_embedding(self, task: str, score: Mapping[str, Any], baseline: str | None) -> None:
        """Take the score of an embedding task.

        Args:
            task: Name of the task.
            score: As :func:`gem_st.evaluation.mteb_scores.score_task` returns it.
            baseline: Name of the baseline that got it; None for the checkpoint.
        """
        kept = {key: score[key] for key in ("type", "metric")}
        entry = self.embedding.setdefault(task, {"main_score": None, **kept, "baseline": None, "baselines": {}})
        if baseline is None:
            entry["main_score"] = score["main_score"]
            entry["metrics"] = score["metrics"]
        else:
            entry["baselines"][baseline] = score["main_score"]
        first = next(iter(entry["baselines"].values()), None)
        entry["baseline"], entry["difference"] = first, _difference(entry["main_score"], first)

    def add_generation(self, task: str, result: Mapping[str, Any], *, is_base: bool) -> None:
        """Take the result of a generation task.

        Args:
            task: Name of the task.
            result: As :func:`gem_st.evaluation.lm_eval_tasks.evaluate_generation` returns it.
            is_base: Whether it is the base's.
        """
        entry = self.generation.setdefault(task, {"main_score": None, "type": result["type"], "baseline": None})
        if is_base:
            entry["baseline"], entry["base"] = result["main_score"], dict(result)
        else:
            entry |= result
        entry["difference"] = _difference(entry["main_score"], entry["baseline"])

    def copy_generation(self) -> None:
        """Take the checkpoint's results as those of its base, which is the same model."""
        for task, entry in list(self.generation.items()):
            own = {key: value for key, value in entry.items() if key not in ("baseline", "base", "difference")}
            self.add_generation(task, own, is_base=True)

    def generation_records(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Results of tasks that both have answered: the checkpoint's, and its base's."""
        both = {task: entry for task, entry in self.generation.items() if "base" in entry and "correct" in entry}
        return both, {task: entry["base"] for task, entry in both.items()}

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines."""
        return list(dict.fromkeys(name for entry in self.embedding.values() for name in entry["baselines"]))

    def groups(self, baseline: str | None = None) -> dict[str, float]:
        """Mean main score by task type, in percent, and the mean over types as ``Avg``.

        Args:
            baseline: Whose; None for the checkpoint's.
        """
        scores: dict[str, list[float]] = defaultdict(list)
        for entry in self.embedding.values():
            score = entry["main_score"] if baseline is None else entry["baselines"].get(baseline)
            if score is not None:
                scores[entry["type"]].append(100 * score)
        order = [*GROUPS, *sorted(set(scores) - set(GROUPS))]
        means = {GROUPS.get(kind, kind): fmean(scores[kind]) for kind in order if kind in scores}
        return {**means, "Avg": fmean(means.values())} if means else {}

    def to_dict(self) -> dict[str, Any]:
        """What `json` can write."""
        groups = {"checkpoint": self.groups(), **{name: self.groups(name) for name in self.baselines}}
        return {
            "name": self.name,
            "embedding": self.embedding,
            "generation": self.generation,
            "groups": groups,
            "retention": self.retention,
            "health": self.health,
            "errors": self.errors,
            "config": self.config,
        }


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
