"""InfoNCE on scaled cosine similarities, and which texts are no negatives of each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    logit_scale: Tensor | float,
    same_text: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """InfoNCE on scaled cosine similarities: ``offset + i`` is the positive of anchor ``i``, all others negatives.

    Args:
        anchors: Embeddings. Shape: ``(B, D)``
        candidates: Embeddings of the positives, then of any further negatives. Shape: ``(at least B, D)``
        logit_scale: Factor on the similarities (not its log). Shape: ``()`` or ``(1,)``
        same_text: True where a candidate is no negative, from :func:`find_same_texts`. Shape: ``(B, at least B)``
        offset: Index of the first anchor's positive.

    Returns:
        Mean loss in nats. Shape: ``()``
    """
    similarities = F.normalize(anchors.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T
    logits = similarities * logit_scale
    if same_text is not None:
        logits = logits.masked_fill(same_text, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device) + offset)


def text_keys(texts: Sequence[Tensor]) -> Tensor:
    """A number for each text, the same in every process for the same token ids. Shapes: ``(T_i,)`` each -> ``(B,)``"""
    return torch.tensor([hash(tuple(text.tolist())) for text in texts])


def find_same_texts(keys: Tensor, num_anchors: int, offset: int = 0) -> Tensor:
    """Which candidates spell the same text as an anchor's positive, and are therefore no negatives of it.

    Args:
        keys: Of each candidate, from :func:`text_keys`, positives first. Shape: ``(number of candidates,)``
        num_anchors: B.
        offset: Index of the first anchor's positive.

    Returns:
        True for the same text, except for the positive itself. Shape: ``(B, number of candidates)``
    """
    positives = torch.arange(num_anchors, device=keys.device) + offset
    same = keys[positives, None] == keys
    same[torch.arange(num_anchors), positives] = False
    return same
