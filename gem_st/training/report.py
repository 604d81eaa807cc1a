"""The report of a training: what is measured before and after, and one HTML file that shows it."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.utils import logging

from .._version import __version__
from ..cards.card_data import describe_hardware
from ..evaluators import PerplexityEvaluator
from ..files import write_json
from ..losses import GemLoss
from ..losses.rows import takes_pairs
from .data import TrainData

logger = logging.get_logger(__name__)

NUM_BINS = 50
"""Bins of the histograms of cosine similarity, over [-1, 1]."""

NUM_SAMPLES = 5
PARAGRAPH = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.3}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; }
"""


# --------------------------------------------------------------------------------------------------------------------
# Measures


def measure(trainer: Any, loss: GemLoss, data: TrainData) -> dict[str, Any]:
    """Measure both sides of a model on rows it is not trained on.

    Args:
        trainer: A SentenceTransformerTrainer, before or after its training.
        loss: Its loss.
        data: Its data.

    Returns:
        ``metrics`` by name; ``positives`` and ``negatives``, histograms of cosine similarity (counts in equal bins over
        [-1, 1]); ``samples``, texts and what the model writes from their GEM tokens; ``paragraph``, a prompt and what
        it writes after it. Those that nothing was held out for are missing.
    """
    model: SentenceTransformer = trainer.model
    result: dict[str, Any] = {"metrics": {}}
    if data.held_out:
        texts = [text for row in data.held_out for text in row.values()]
        name = "perplexity of held-out text"
        result["metrics"][name] = next(iter(PerplexityEvaluator(texts, name="held-out")(model).values()))
        columns = data.columns[:1] if takes_pairs(loss._plan(data.columns).tasks) else data.columns
        result |= measure_similarities(model, loss, [[row[name] for row in data.held_out] for name in columns])
        result["metrics"] |= result.pop("similarity_metrics")
        first = [row[data.columns[0]] for row in data.held_out]
        result["samples"] = reconstruct_samples(model[0], first[:NUM_SAMPLES])
        result["paragraph"] = write_paragraph(model[0], first[0])
    if data.eval_set is not None:
        result["metrics"]["loss on the evaluation set"] = trainer.evaluate()["eval_loss"]
    elif trainer.evaluator is not None:
        metrics = trainer.evaluator(model)
        result["metrics"]["Spearman on the evaluation set"] = metrics[trainer.evaluator.primary_metric]
    return result


@torch.no_grad()
def measure_similarities(model: SentenceTransformer, loss: GemLoss, columns: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Cosine similarities of positives and negatives.

    A positive is the second column's text of the same row or, of one column, the text with tokens deleted, as in the
    training; negatives are those of all other rows.

    Args:
        model: The model.
        loss: Its loss, which deletes the tokens.
        columns: Texts of each column. Shape: ``(N,)`` each

    Returns:
        ``positives`` and ``negatives``, counts of each bin, and ``similarity_metrics``.
    """
    first = encode(model, columns[0])
    second = encode(model, columns[1]) if len(columns) > 1 else encode_views(model, loss, columns[0])
    similarities = first @ second.T
    same = torch.eye(len(similarities), dtype=torch.bool)
    positives, negatives = similarities[same], similarities[~same]
    metrics = {"similarity of positives, mean": positives.mean().item()}
    if len(negatives):
        metrics["similarity of negatives, mean"] = negatives.mean().item()
        hits = similarities.argmax(dim=1) == torch.arange(len(similarities))
        metrics["positives nearer than all negatives, share"] = hits.float().mean().item()
    return {
        "positives": torch.histc(positives, NUM_BINS, -1, 1).int().tolist(),
        "negatives": torch.histc(negatives, NUM_BINS, -1, 1).int().tolist(),
        "similarity_metrics": metrics,
    }


def encode(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Normalised embeddings. Shape: ``(N, D)``"""
    options: dict[str, Any] = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return model.encode(list(texts), **options).float().cpu()


def encode_views(model: SentenceTransformer, loss: GemLoss, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Normalised embeddings of texts with tokens deleted, the same for each call. Shape: ``(N, D)``"""
    gem: Any = model[0]
    was_training = model.training
    model.eval()
    prefixes = [
        torch.tensor(row) for row in gem.base.text.encode(texts, max_tokens=gem.max_seq_length - gem.num_gem_tokens)
    ]
    rows = loss.build_views(prefixes, torch.Generator().manual_seed(0))
    vectors = []
    for start in range(0, len(rows), batch_size):
        features = loss.collate(rows[start : start + batch_size])
        batch = {name: features[name].to(gem.model.device) for name in ("input_ids", "attention_mask")}
        vectors.append(gem(batch)["sentence_embedding"].float().cpu())
    model.train(was_training)
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def reconstruct_samples(gem: Any, texts: Sequence[str]) -> list[dict[str, str]]:
    """Texts, and what the model writes from the keys and values of their GEM tokens; empty if it keeps none."""
    if not gem.facts.can_cache:
        return []
    written = gem.reconstruct(gem.compress(list(texts)))
    return [{"text": text, "written": copy} for text, copy in zip(texts, written, strict=True)]


def write_paragraph(gem: Any, text: str, num_tokens: int = 8) -> dict[str, str]:
    """How the model goes on from the first tokens of a text, decoding greedily."""
    ids = gem.tokenizer(text)["input_ids"][:num_tokens]
    prompt = gem.tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": prompt, "written": gem.generate(prompt, **PARAGRAPH)}


def describe_versions(*more: str) -> dict[str, str]:
    """Versions of what a training or evaluation depends on, and the machine.

    Args:
        *more: Names of packages beside the usual ones.
    """
    packages = ("sentence-transformers", "transformers", "torch", "datasets", "accelerate", "peft", *more)
    return {
        "gem_st": __version__,
        **{name: version(name) for name in packages if find_spec(name.replace("-", "_"))},
        "python": platform.python_version(),
        "hardware": describe_hardware(),
    }


# --------------------------------------------------------------------------------------------------------------------
# Pictures


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


# --------------------------------------------------------------------------------------------------------------------
# Files


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
