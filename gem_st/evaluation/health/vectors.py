"""Measures of vectors alone. Shapes: ``N`` texts, ``D`` elements of a vector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]


class Agreement(NamedTuple):
    """How far two sets of vectors of the same texts agree.

    Attributes:
        max_difference: Largest absolute difference of an element of the unit vectors.
        min_cosine: Smallest cosine of a text's two vectors.
        mean_cosine: Their mean.
    """

    max_difference: float
    min_cosine: float
    mean_cosine: float


class Isotropy(NamedTuple):
    """How vectors of different texts fill their space.

    Attributes:
        mean_cosine: Of all pairs of different texts (Ethayarajh 2019, https://arxiv.org/abs/1909.00512).
        std_cosine: Their standard deviation.
        low_cosine: Their 1st percentile.
        high_cosine: Their 99th percentile.
        effective_rank: Of the centred unit vectors (Roy and Vetterli 2007, "The effective rank").
        max_rank: What it could be at most, ``min(N - 1, D)``.
        first_component: Share of their variance along the first principal component, in [0, 1] (Mu and Viswanath 2018,
            https://arxiv.org/abs/1702.01417).
        uniformity: Wang and Isola 2020, https://arxiv.org/abs/2005.10242; 0 for equal vectors, near -4 for ones
            spread over a sphere.
    """

    mean_cosine: float
    std_cosine: float
    low_cosine: float
    high_cosine: float
    effective_rank: float
    max_rank: int
    first_component: float
    uniformity: float


class LengthHealth(NamedTuple):
    """What becomes of vectors at one length.

    Attributes:
        num_tokens: Tokens in a row, special tokens, GEM tokens and prompt included.
        norm: Mean norm of a vector before any normalisation.
        repeated: Mean cosine of a text of half as many tokens with the same text twice.
        half: Mean cosine of a text with its first half.
        pairs: Mean cosine of pairs of different texts; None where the texts given are too short in all to make
            different ones of this length.
        is_finite: Whether no vector holds NaN or infinity.
    """

    num_tokens: int
    norm: float
    repeated: float
    half: float
    pairs: float | None
    is_finite: bool


class Reconstruction(NamedTuple):
    """What comes back of texts from their GEM tokens, by :class:`gem_st.evaluation.ReconstructionEvaluator`.

    Attributes:
        min_tokens: Tokens in the shortest texts of the group, without special ones.
        max_tokens: In the longest.
        num_texts: Texts in the group.
        exact_match: Share that comes back whole, in [0, 1].
        chrf: sacreBLEU's chrF2, in [0, 100].
    """

    min_tokens: int
    max_tokens: int
    num_texts: int
    exact_match: float
    chrf: float


def unit_vectors(vectors: Vectors) -> Vectors:
    """Vectors of length 1; zero vectors stay zero. Shapes: ``(N, D)`` -> ``(N, D)``"""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def row_cosines(first: Vectors, second: Vectors) -> Vectors:
    """Cosine of each row with its counterpart. Shapes: ``(N, D)``, ``(N, D)`` -> ``(N,)``"""
    return (unit_vectors(first) * unit_vectors(second)).sum(axis=1)


def compare(first: Vectors, second: Vectors) -> Agreement:
    """How far two sets of vectors of the same texts agree. Shapes: ``(N, D)``, ``(N, D)``"""
    cosines = row_cosines(first, second)
    difference = np.abs(unit_vectors(first) - unit_vectors(second)).max()
    return Agreement(float(difference), float(cosines.min()), float(cosines.mean()))


def pair_cosines(vectors: Vectors) -> Vectors:
    """Cosine of each of the M = N (N - 1) / 2 pairs of rows. Shapes: ``(N, D)`` -> ``(M,)``"""
    unit = unit_vectors(vectors)
    return (unit @ unit.T)[np.triu_indices(len(unit), k=1)]


def singular_values(vectors: Vectors) -> Vectors:
    """Of the centred vectors, largest first; zeros if they are equal but for rounding. Shape: ``(min(N, D),)``"""
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    return values if values[0] > 1e-6 * np.linalg.norm(vectors) else np.zeros_like(values)


def effective_rank(values: Vectors) -> float:
    """exp of the entropy of singular values that sum to 1 (Roy and Vetterli 2007); 0 if all are 0. Shape: ``(S,)``"""
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def first_component_share(values: Vectors) -> float:
    """Share of the variance along the first principal component; 1 if there is none. Shape: ``(S,)``"""
    return float(values[0] ** 2 / (values**2).sum()) if values.any() else 1.0


def uniformity(cosines: Vectors) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit vectors (Wang and Isola 2020), given their cosines."""
    return float(np.log(np.exp(-2 * (2 - 2 * cosines)).mean()))


def measure_isotropy(vectors: Vectors) -> Isotropy:
    """How vectors of different texts fill their space, all pairs considered.

    Args:
        vectors: Finite and not zero. Shape: ``(N, D)``, N of 2 or more
    """
    cosines, values = pair_cosines(vectors), singular_values(unit_vectors(vectors))
    low, high = np.percentile(cosines, [1, 99])
    return Isotropy(
        mean_cosine=float(cosines.mean()),
        std_cosine=float(cosines.std()),
        low_cosine=float(low),
        high_cosine=float(high),
        effective_rank=effective_rank(values),
        max_rank=min(len(vectors) - 1, vectors.shape[1]),
        first_component=first_component_share(values),
        uniformity=uniformity(cosines),
    )


def is_bad(vectors: Vectors) -> NDArray[np.bool_]:
    """True for vectors that hold NaN or infinity, or are zero. Shapes: ``(N, D)`` -> ``(N,)``"""
    return np.logical_not(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
