"""Which module of a model is the GEM module, and which of its prompts are for queries and documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def find_gem(model: Any) -> Any:
    """The GEM module of a model; None if it has none.

    It may be of a class that a checkpoint brought.
    """
    gem = model[0] if isinstance(model, nn.Sequential) and len(model) else None
    return gem if hasattr(gem, "gem_token_ids") else None


def require_gem(model: Any, needed_by: str = "This") -> Any:
    """The GEM module of a model.

    Args:
        model: The model.
        needed_by: Who needs one, for the error.

    Raises:
        ValueError: If it has none.
    """
    gem = find_gem(model)
    if gem is None:
        first = model[0] if isinstance(model, nn.Sequential) and len(model) else None
        raise ValueError(
            f"{needed_by} needs a SentenceTransformer whose first module is a GemTransformer, got "
            f"{type(first).__name__}. Build it as SentenceTransformer(modules=[GemTransformer('your/base-model')])."
        )
    if not hasattr(gem, "mode"):
        raise ValueError(
            f"{needed_by} needs a module of today's code, and this one is of the code of version 0.1, which its "
            "checkpoint carries. Load it with gem_st.hub.load(...), which reads it by the installed gem_st."
        )
    return gem


def find_prompt_name(prompts: Mapping[str, Any], task: str) -> str | None:
    """Name of the prompt that ``encode_query`` or ``encode_document`` takes; None if there is none.

    Args:
        prompts: Of the model.
        task: ``"query"`` or ``"document"``.
    """
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    return next((name for name in names if name in prompts), None)
