"""Models that are served, where what the server needs is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from gem_st import GemTransformer
from gem_st.cli.serve import check_packages

from ..modeling.test_gem_generator import CHAT

PROMPTS = {"query": "Find: ", "document": "", "title": "Title of "}

try:
    check_packages()
except ImportError:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
    collect_ignore.remove("test_conversations.py")
    # It says so, as it is skipped then.


@pytest.fixture(scope="session")
def make_served_model(make_base) -> Callable[..., SentenceTransformer]:
    """Function that makes a model with prompts, a chat template and a module behind the GEM module."""

    def make(architecture: str = "llama", num_reserved: int = 0, **settings: Any) -> SentenceTransformer:
        base = make_base(architecture, chat_template=CHAT, num_reserved=num_reserved)
        torch.manual_seed(0)
        gem = GemTransformer(str(base), **settings)
        with torch.no_grad():
            for name, weight in gem.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
        return SentenceTransformer(modules=[gem, Normalize()], device="cpu", prompts=PROMPTS)

    return make


@pytest.fixture(scope="session")
def frozen(make_served_model) -> Iterator[Any]:
    """A server of a model beside a frozen base, K = 2."""
    from .served import serving

    model = make_served_model(freeze_base=True, num_gem_tokens=2)
    with serving(model, allow_token_ids=True, allow_truncate=True) as served:
        yield served


@pytest.fixture(scope="session")
def full(make_served_model) -> Iterator[Any]:
    """A server of a model in full mode, K = 1, that keeps no conversations."""
    from .served import serving

    with serving(make_served_model(), cache_bytes=0) as served:
        yield served
