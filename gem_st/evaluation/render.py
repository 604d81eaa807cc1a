"""Results of an evaluation as a table, as a picture and as a section of a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from .results import DATASETS, END, PERPLEXITIES, START, EvalResults


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
    notes = [f"Lower than {name} in {', '.join(lost)}." for name, lost in lost_groups(results).items()]
    if results.retention:
        notes.append(results.retention["sentence"])
    notes += [f"{task} failed: {error}" for task, error in results.errors.items()]
    return _table(["", *own, *knowledge], lines) + "".join(f"\n{note}\n" for note in notes)


def lost_groups(results: EvalResults) -> dict[str, list[str]]:
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
