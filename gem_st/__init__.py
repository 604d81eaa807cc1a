"""GEM for Sentence Transformers: one decoder-only LLM that embeds text and keeps generating (arXiv 2506.04344)."""

from ._version import __version__
from .losses import GemLoss
from .model_card import GemModelCardData
from .modeling_gem import GemCache, GemMemory, GemTransformer, gem_attention_mask
from .training import AlphaSchedule, TwoPhaseLearningRate, last_checkpoint

# The public name of the class, as numpy does it: checkpoints name `gem_st.GemTransformer`, and carry its file as
# `gem_st.py`, so that they load alike with and without this package.
GemTransformer.__module__ = "gem_st"

__all__ = [
    "AlphaSchedule",
    "GemCache",
    "GemLoss",
    "GemMemory",
    "GemModelCardData",
    "GemTransformer",
    "TwoPhaseLearningRate",
    "__version__",
    "gem_attention_mask",
    "last_checkpoint",
]
