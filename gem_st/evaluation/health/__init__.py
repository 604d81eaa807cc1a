"""Health of the vectors of a SentenceTransformer: whether they depend on the text alone, and how they fill their space.

Nothing here needs labels: texts of the kind that the model is to embed are enough. Works for any SentenceTransformer;
reconstruction is measured of models that can write a text back from its GEM tokens.
"""

from .examine import measure_health
from .report import Health, HealthRow

__all__ = ["Health", "HealthRow", "measure_health"]
