"""The fingerprint beside the vectors: all that they depend on, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, cast

from sentence_transformers import SentenceTransformer

from .._version import __version__
from ..evaluation.identity import describe_settings, describe_tokenizer, update_digest, update_settings
from ..finding import find_prompt_name


def document_prompt(model: SentenceTransformer, prompt_name: str | None) -> str:
    """The prompt that texts get: of that name, or as ``encode_document`` chooses it.

    Raises:
        ValueError: If the model has no prompt of that name.
    """
    if prompt_name is not None and prompt_name not in model.prompts:
        raise ValueError(f"The model has no prompt {prompt_name!r}. It has: {sorted(model.prompts)}.")
    name = prompt_name or find_prompt_name(model.prompts, "document") or model.default_prompt_name
    return model.prompts.get(name) or "" if name else ""


def describe_model(
    model: SentenceTransformer, *, prompt_name: str | None, precision: str, truncate_dim: int | None
) -> dict[str, Any]:
    """What vectors depend on: weights and tokenizer as digests, all else as it is.

    Args:
        model: The model.
        prompt_name: Of the prompt that texts get; None for that of documents.
        precision: Of the vectors.
        truncate_dim: Elements of them that are kept; None for all.

    Raises:
        ValueError: If the model has no such prompt, or vectors of fewer elements.
    """
    width = model.get_embedding_dimension()
    if truncate_dim is not None and width is not None and truncate_dim > width:
        raise ValueError(f"truncate_dim is {truncate_dim}, but the vectors have {width} elements.")
    weights = hashlib.sha256()
    update_digest(weights, model.state_dict())
    modules = [
        next((getattr(module, name)() for name in ("settings", "get_config_dict") if hasattr(module, name)), None)
        for module in cast("Iterable[Any]", model)
    ]
    return {
        "weights": weights.hexdigest()[:16],
        "tokenizer": _digest(describe_tokenizer(getattr(model, "tokenizer", None))),
        "modules": _digest([[type(module).__name__ for module in model], modules, describe_settings(model)]),
        "prompts": {name: text for name, text in model.prompts.items() if text},
        "prompt": document_prompt(model, prompt_name),
        "max_seq_length": model.max_seq_length,
        "dtype": describe_dtypes(model),
        "precision": precision,
        "dimension": truncate_dim or width,
        "gem_st": __version__,
    }


def describe_dtypes(model: SentenceTransformer) -> str:
    """Data types of all weights."""
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))


def _digest(settings: Any) -> str:
    digest = hashlib.sha256()
    update_settings(digest, settings)
    return digest.hexdigest()[:16]
