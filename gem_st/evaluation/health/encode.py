"""A model as the measures use it: texts to vectors, and what can be asked of any SentenceTransformer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import nn
from transformers import PreTrainedTokenizerBase

from .vectors import Vectors

REFUSALS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model that cannot do something raises; out of memory is a RuntimeError."""


class Encoder:
    """Encodes with one model, prompt and batch size, to float64 on the CPU."""

    def __init__(self, model: SentenceTransformer, prompt: str | None, batch_size: int) -> None:
        self.model, self.prompt, self.batch_size = model, prompt, batch_size

    def __call__(self, texts: Sequence[str], batch_size: int | None = None) -> Vectors:
        """Vectors of texts, batched by length as `encode` does. Shape: ``(N, D)``"""
        vectors: Any = self.model.encode(
            list(texts),
            prompt=self.prompt,
            batch_size=batch_size or self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu().double().numpy()

    def in_order(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, batched as they come, so that long and short ones are padded to each other."""
        starts = range(0, len(texts), self.batch_size)
        return np.concatenate([self(texts[start : start + self.batch_size]) for start in starts])


class NotMeasuredError(Exception):
    """Why something is not measured."""


@contextlib.contextmanager
def reporting(problem: str) -> Iterator[None]:
    """Turn what a model raises into a reason why something is not measured."""
    try:
        yield
    except (ImportError, *REFUSALS) as error:
        raise NotMeasuredError(f"{problem}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Type and first line of an error, at most 200 characters."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@contextlib.contextmanager
def unchanged(model: SentenceTransformer) -> Iterator[None]:
    """Put every module back into training mode, or out of it, at the end; `encode` switches all of them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def recorded_norms(model: SentenceTransformer) -> Iterator[list[float]]:
    """Norms of the vectors that reach the first module that normalises; empty for a model without one."""
    norms: list[float] = []

    def record(module: nn.Module, inputs: tuple[dict[str, torch.Tensor], ...]) -> None:
        norms.extend(inputs[0]["sentence_embedding"].float().norm(dim=-1).tolist())

    first = next((module for module in model if _normalizes_vectors(module)), None)
    handles = [] if first is None else [first.register_forward_pre_hook(record)]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _normalizes_vectors(module: nn.Module) -> bool:
    return isinstance(module, Normalize) and module.module_input_name == "sentence_embedding"


def tokenizer_of(model: SentenceTransformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; without one, what needs it is not measured."""
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise NotMeasuredError("the model has no tokenizer of transformers")
    return tokenizer


def weights_dtype(model: SentenceTransformer) -> torch.dtype:
    """The data type of most of a model's floating-point weights; float32 if it has none."""
    counts: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            counts[weight.dtype] += weight.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def is_quantized(model: SentenceTransformer) -> bool:
    """True if some weights are not floating-point numbers, or a transformers model says that it is quantised."""
    if any(getattr(module, "is_quantized", False) is True for module in model.modules()):
        return True
    return any(not weight.is_floating_point() for weight in model.parameters())
