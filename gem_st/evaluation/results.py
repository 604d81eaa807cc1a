"""Results of an evaluation, as JSON, as a table, as a picture and as a section of a model card."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..files import write_text

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


# --------------------------------------------------------------------------------------------------------------------
# Table


def render_markdown(results: EvalResults) -> str:
    """Tables of all results.

    Args:
        results: Results, of which some may be missing.
    """
    parts = [f"# {results.name}\n", render_row(results), _render_tasks(results), _render_generation(results)]
    if results.health:
        parts.append("## Health of the vectors\n\n" + _render_health(results.health))
    parts.append(_render_config(results.config))
    return "\n".join(part for part in parts if part)


def render_row(results: EvalResults) -> str:
    """The paper's table: a line for each baseline and for the checkpoint, with the difference."""
    own, knowledge = results.groups(), results.generation
    rows = [(f"{name} pooling" if name == "mean" else name, results.groups(name)) for name in results.baselines]
    if not rows and any(entry["baseline"] is not None for entry in knowledge.values()):
        rows.append(("base", {}))
    rows.append((f"**{results.name}**", own))
    lines = []
    for number, (title, scores) in enumerate(rows, start=1):
        key = "main_score" if number == len(rows) else "baseline" if number == 1 else None
        cells = [f"{scores[column]:.2f}" if column in scores else "" for column in own]
        cells += [_format_score(entry, entry.get(key) if key else None) for entry in knowledge.values()]
        lines.append([title, *cells])
    if len(rows) > 1:
        first = rows[0][1]
        cells = [f"{own[column] - first[column]:+.2f}" if column in first else "" for column in own]
        cells += [_format_score(entry, entry.get("difference"), "+") for entry in knowledge.values()]
        lines.append(["difference", *cells])
    notes = [f"Lower than {name} in {', '.join(lost)}." for name, lost in losses(results).items()]
    if results.retention:
        notes.append(results.retention["sentence"])
    notes += [f"{task} failed: {error}" for task, error in results.errors.items()]
    return _table(["", *own, *knowledge], lines) + "".join(f"\n{note}\n" for note in notes)


def losses(results: EvalResults) -> dict[str, list[str]]:
    """Task types in which the checkpoint scores less than a baseline, by baseline."""
    own = results.groups()
    lost = {
        name: [group for group, score in results.groups(name).items() if group in own and own[group] < score]
        for name in results.baselines
    }
    return {name: groups for name, groups in lost.items() if groups}


def _format_score(entry: Mapping[str, Any], value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    if entry["type"] == "perplexity" or entry.get("metric") in PERPLEXITIES:
        return f"{value:{sign}.2f}"
    return f"{100 * value:{sign}.2f}"


def _render_tasks(results: EvalResults) -> str:
    if not results.embedding:
        return ""
    names = results.baselines
    rows = []
    for task, entry in results.embedding.items():
        scores = [entry["baselines"].get(name) for name in names]
        cells = ["" if score is None else f"{100 * score:.2f}" for score in [*scores, entry["main_score"]]]
        best = max((score for score in scores if score is not None), default=None)
        lost = best is not None and entry["main_score"] is not None and entry["main_score"] < best
        rows.append(
            [task, entry["type"], f"`{entry['metric']}`", *cells[:-1], cells[-1] + (" (lower)" if lost else "")]
        )
    return "## Embedding\n\n" + _table(["task", "type", "metric", *names, results.name], rows)


def _render_generation(results: EvalResults) -> str:
    if not results.generation:
        return ""
    rows = []
    tasks = (results.retention or {}).get("tasks", {})
    for task, entry in results.generation.items():
        interval = tasks.get(task) or {}
        bounds = _format_interval(interval)
        cut = f"{100 * entry['truncated']:.0f} %" if entry.get("truncated") is not None else ""
        cells = (_format_score(entry, entry.get(key)) for key in ("baseline", "main_score"))
        rows.append(
            [task, f"`{entry.get('metric')}`", *cells, _format_score(entry, entry.get("difference"), "+"), bounds, cut]
        )
    header = ["task", "metric", "base", results.name, "difference", "95 % CI", "prompts cut"]
    subjects = "".join(_render_subjects(task, entry.get("subjects") or {}) for task, entry in tasks.items())
    return "## Generation\n\n" + _table(header, rows) + subjects


def _render_subjects(task: str, subjects: Mapping[str, Mapping[str, Any]]) -> str:
    """Differences by subject, in a fold."""
    rows = []
    for subject, entry in subjects.items():
        scores = (f"{100 * entry[key]:.1f}" for key in ("base", "score"))
        cells = (f"{100 * entry['difference']:+.1f}", _format_interval(entry), entry["verdict"])
        rows.append([subject, entry["num_samples"], *scores, *cells])
    header = ["subject", "questions", "base", "checkpoint", "difference", "95 % CI", ""]
    table = _table(header, rows)
    return f"\n<details><summary>{task} by subject</summary>\n\n{table}\n</details>\n" if rows else ""


def _format_interval(entry: Mapping[str, Any]) -> str:
    """Confidence interval of a difference, in points; nothing where there is none."""
    return "" if entry.get("low") is None else f"{100 * entry['low']:+.2f} to {100 * entry['high']:+.2f}"


def _render_health(health: Mapping[str, Any]) -> str:
    verdicts = {True: "ok", False: "**look at it**", None: "-"}
    rows = [[c["name"], c["value"], c["expected"] or "-", verdicts[c["is_ok"]]] for c in health["checks"]]
    return _table(["measured", "value", "expected", "verdict"], rows)


def _render_config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    versions = ", ".join(f"{name} {value}" for name, value in config.get("versions", {}).items())
    parts = {
        "suite": _name_of(config.get("suite")),
        "limit": config.get("limit"),
        "baseline": _name_of(config.get("baseline")),
        "tokens read of a text": config.get("max_seq_length"),
        "prompts": config.get("prompts") or None,
        "dtype": config.get("dtype"),
    }
    settings = ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    return f"{settings}; {versions}.\n"


def _name_of(place: str | None) -> str | None:
    """A file or folder without where it lies on this machine, which is nobody's business; a Hub id as it is."""
    return Path(place).expanduser().resolve().name if place and Path(place).expanduser().exists() else place


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)


# --------------------------------------------------------------------------------------------------------------------
# Picture


def draw_bars(results: EvalResults, path: Path) -> None:
    """Bars of each embedding task, the checkpoint beside its baselines.

    Args:
        results: The results; without embedding tasks nothing is drawn.
        path: A png file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if not results.embedding:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'gem-st[eval]'") from error
    series = [(name, [e["baselines"].get(name) for e in results.embedding.values()]) for name in results.baselines]
    series.append((results.name, [entry["main_score"] for entry in results.embedding.values()]))
    figure = Figure(figsize=(max(6.0, 1.1 * len(results.embedding)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, scores) in enumerate(series):
        places = [task + (number - (len(series) - 1) / 2) * width for task in range(len(scores))]
        axes.bar(places, [100 * (score or 0) for score in scores], width, label=name)
    axes.set_xticks(range(len(results.embedding)), list(results.embedding), rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("main score, percent")
    axes.legend(fontsize=8)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(path)


# --------------------------------------------------------------------------------------------------------------------
# Model card


def update_card(path: Path, results: EvalResults) -> None:
    """Put the results into a model card: tables in its Evaluation section, scores in its metadata.

    Args:
        path: README.md of a checkpoint; made if there is none.
        results: The results; those of an earlier evaluation are replaced.
    """
    from huggingface_hub import ModelCard

    try:
        text = path.read_text(encoding="utf-8") if path.exists() else f"---\n{{}}\n---\n\n# {results.name}\n"
        card: Any = ModelCard(text, ignore_metadata_errors=True)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read, so that the results are not in it: {error}") from error
    card.text = insert_section(card.text, render_card_section(results))
    others = [result for result in card.data.eval_results or [] if not result.dataset_type.startswith(DATASETS)]
    card.data.eval_results = others + to_eval_results(results)
    card.data.model_name = card.data.model_name or results.name
    write_text(path, str(card))


def render_card_section(results: EvalResults) -> str:
    """What stands in a model card: the row, and all tasks in a fold."""
    tables = "\n".join(part for part in (_render_tasks(results), _render_generation(results)) if part)
    health = f"\nHealth of the vectors:\n\n{_render_health(results.health)}" if results.health else ""
    tables = (
        tables.replace("## ", "**").replace("Embedding\n", "Embedding**\n").replace("Generation\n", "Generation**\n")
    )
    return (
        f"{START}\nMeasured by `gem-st eval`: {_render_config(results.config)}\n{render_row(results)}{health}\n"
        f"<details><summary>All tasks</summary>\n\n{tables}\n</details>\n{END}"
    )


def insert_section(text: str, section: str) -> str:
    """Put a section into the text of a card: in place of the last one, otherwise below its heading Evaluation.

    Args:
        text: Text of a card without its metadata.
        section: What stands between ``START`` and ``END``, both included.
    """
    if START in text and END in text:
        head, _, rest = text.partition(START)
        return f"{head}{section}{rest.partition(END)[2]}"
    heading = re.search(r"^## Evaluation\n", text, flags=re.MULTILINE)
    if heading is None:
        return f"{text.rstrip()}\n\n## Evaluation\n\n{section}\n"
    rest = text[heading.end() :].lstrip("\n").removeprefix("Not evaluated yet.\n").lstrip("\n")
    return f"{text[: heading.end()]}\n{section}\n\n{rest}"


def to_eval_results(results: EvalResults) -> list[Any]:
    """Scores of embedding tasks as the Hub's metadata has them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=entry["type"],
            dataset_type=f"{DATASETS}{task}",
            dataset_name=task,
            metric_type=entry["metric"],
            metric_value=round(100 * entry["main_score"], 4),
        )
        for task, entry in results.embedding.items()
        if entry["main_score"] is not None
    ]
