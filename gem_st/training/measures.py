"""What is measured before and after a training: similarities, perplexity, what comes back, a paragraph."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from .._version import __version__
from ..cards.card_data import describe_hardware
from ..evaluators import PerplexityEvaluator
from ..losses import GemLoss
from ..losses.rows import takes_pairs
from .data import TrainData

NUM_BINS = 50
"""Bins of the histograms of cosine similarity, over [-1, 1]."""


NUM_SAMPLES = 5


PARAGRAPH = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.3}


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
        if data.targets is not None:
            vectors = encode(model, [row[data.columns[0]] for row in data.held_out])
            near = torch.nn.functional.cosine_similarity(vectors, data.targets)
            result["metrics"]["similarity to the teacher's vector, mean"] = near.mean().item()
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
        vectors.append(model(batch)["sentence_embedding"].float().cpu())
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
    ids = gem.base.text.encode([text])[0][:num_tokens]
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
