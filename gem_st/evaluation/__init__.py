"""Evaluation: suites, scores, retention and health; and evaluators of Sentence Transformers."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from ..evaluators import PerplexityEvaluator, ReconstructionEvaluator, perplexity

__all__ = ["PerplexityEvaluator", "ReconstructionEvaluator", "perplexity"]
__getattr__ = lazy(__name__, {"evaluators": ["PerplexityEvaluator", "ReconstructionEvaluator", "perplexity"]})
