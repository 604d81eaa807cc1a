"""The report of a training: one HTML file that shows what was measured before and after it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import write_json
from .measures import NUM_BINS

logger = logging.get_logger(__name__)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; }
"""


def draw_pictures(content: Mapping[str, Any]) -> dict[str, str]:
    """Loss curves, schedules and histograms, as PNG in base64 by their titles; empty without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        logger.warning('The report has no pictures, which need matplotlib: pip install "gem-st[report]"')
        return {}
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        pictures = {
            "Losses": _draw(_draw_losses, content["log_history"], 1),
            "Alpha, scale and learning rate": _draw(_draw_schedules, content["log_history"], 3),
        }
        sides = {name: content[name] for name in ("before", "after") if (content.get(name) or {}).get("positives")}
        if sides:
            pictures["Similarities"] = _draw(_draw_histograms, sides, len(sides))
    return pictures


def _draw(draw: Callable[[Any, Any], None], content: Any, num_axes: int) -> str:
    """A figure of axes side by side. Returns PNG in base64."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    draw(figure.subplots(1, num_axes, squeeze=False)[0], content)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return base64.b64encode(buffer.getvalue()).decode()


def curve(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of what a trainer logged under a name; the last value of a step that has several."""
    points = {entry["step"]: entry[key] for entry in log_history if key in entry}
    return list(points), list(points.values())


def _draw_losses(axes: Any, log_history: Any) -> None:
    for key, style in (("loss", "-"), ("ntp", ":"), ("contrastive", "--"), ("eval_loss", "o-")):
        steps, values = curve(log_history, key)
        if any(values):
            axes[0].plot(steps, values, style, label=key)
    axes[0].set(xlabel="step", ylabel="nats", ylim=(0, None))
    if axes[0].lines:
        axes[0].legend()


def _draw_schedules(axes: Any, log_history: Any) -> None:
    for axis, key in zip(axes, ("alpha", "scale", "learning_rate"), strict=True):
        axis.plot(*curve(log_history, key), color="black")
        axis.set(title=key.replace("_", " "), xlabel="step")
    axes[0].set(ylim=(-0.05, 1.05))


def _draw_histograms(axes: Any, sides: Mapping[str, Mapping[str, Any]]) -> None:
    width = 2 / NUM_BINS
    centers = [-1 + width * (index + 0.5) for index in range(NUM_BINS)]
    for axis, (name, side) in zip(axes, sides.items(), strict=True):
        for key in ("negatives", "positives"):
            total = max(1, sum(side[key]))
            axis.bar(centers, [count / total for count in side[key]], width, alpha=0.6, label=key)
        axis.set(title=name, xlabel="cosine similarity", ylabel="share", xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
    axes[0].legend()


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``report.html``, one file without links, and its numbers as ``report.json``.

    Args:
        folder: Where to.
        content: Settings, versions, measures and the trainer's log, put together by
            :func:`gem_st.training.run.train`.
    """
    write_json(folder / "report.json", content)
    text = render_report(content, draw_pictures(content))
    (folder / "report.html").write_text(text, encoding="utf-8")


def render_report(content: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The HTML; every text in it is escaped."""
    settings, before, after = (content.get(name) or {} for name in ("settings", "before", "after"))
    title = f"GEM on {settings.get('base', 'a base')}"
    parts = [f"<h1>{_escape(title)}</h1>", f"<p>{_escape(_summary(content))}</p>"]
    parts += ["<h2>Before and after</h2>", _comparison(before.get("metrics", {}), after.get("metrics", {}))]
    for name, picture in pictures.items():
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{picture}">')
    parts += [_samples(settings, after), _paragraphs(before, after)]
    for name in ("settings", "versions"):
        rows = ((key, _text(value)) for key, value in (content.get(name) or {}).items())
        parts.append(f"<h2>{name.capitalize()}</h2>{_table(rows)}")
    head = f'<meta charset="utf-8"><title>{_escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _summary(content: Mapping[str, Any]) -> str:
    settings, num_rows = content["settings"], content["num_rows"]
    rows = "a stream" if num_rows is None else f"{num_rows:,} rows"
    columns = ", ".join(content["columns"])
    return f"{settings['steps']:,} steps on {rows} ({columns}), mode {settings['mode']}, {content['seconds']:,} s."


def _comparison(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if not after:
        return "<p>No rows were held out, and there was no evaluation set.</p>"
    rows = [(name, _text(before.get(name)), _text(value)) for name, value in after.items()]
    return _table(rows, ("", "before", "after"))


def _samples(settings: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    samples = after.get("samples")
    if not samples:
        return ""
    trained = "reconstruction" in settings.get("tasks", ())
    note = "" if trained else "<p>This training had no reconstruction task, so that nothing is to be expected here.</p>"
    rows = [(sample["text"], sample["written"]) for sample in samples]
    return f"<h2>Text written back from GEM tokens alone</h2>{note}{_table(rows, ('text', 'written'))}"


def _paragraphs(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    sides = {name: side["paragraph"] for name, side in (("before", before), ("after", after)) if "paragraph" in side}
    texts = [f"<h3>{name}</h3><pre>{_escape(side['prompt'] + side['written'])}</pre>" for name, side in sides.items()]
    return f"<h2>What it still writes</h2>{''.join(texts)}" if texts else ""


def _table(rows: Any, header: Sequence[str] = ()) -> str:
    head = f"<tr>{''.join(f'<th>{_escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _escape(text: Any) -> str:
    return html.escape(str(text))
