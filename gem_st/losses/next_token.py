"""The next-token loss, without the logits of positions that have no target."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..modeling.gem_base import Evaluating, GemBase, output_logits
from ..modeling.gem_mask import MASKED_ATTENTION
from ..modeling.gem_probes import require_finite

LOGITS_BUDGET = 2**26
"""Logits above this many elements (256 MiB in float32) are not built at once by :func:`next_token_loss`."""


def next_token_loss(hidden_states: Tensor, labels: Tensor, lm_head: nn.Module, config: Any = None) -> Tensor:
    """Mean next-token cross-entropy in nats, without building logits for positions that have no target.

    Logits are built at once only while they fit comfortably (``LOGITS_BUDGET``); above that
    ``torch.nn.functional.linear_cross_entropy`` computes them in pieces, or, where torch or the head does not allow
    it, and in lower precision, in which it adds up losses with an error of several percent, a chunked loop that
    recomputes them in the backward pass. The value is the same to 1e-5.

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        labels: Token ids, not shifted; -100 is no target. Shape: ``(B, T)``
        lm_head: The output projection, D to V.
        config: The model's config, read for ``final_logit_softcapping``, ``logit_scale`` and ``logits_scaling``.

    Returns:
        Scalar; 0 (with a gradient of 0) if there is no target. Shape: ``()``
    """
    targets = labels[:, 1:]
    is_target = targets != -100
    states, targets = hidden_states[:, :-1][is_target], targets[is_target]
    if len(targets) == 0:
        return hidden_states.sum() * 0.0
    weight: Any = lm_head.weight
    num_logits = len(targets) * weight.shape[0]
    if num_logits <= LOGITS_BUDGET:
        return _token_losses(states, targets, lm_head, config).mean()
    is_exact = states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(states.device.type)
    if is_exact and hasattr(F, "linear_cross_entropy") and type(lm_head) is nn.Linear and _plain_logits(config):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, LOGITS_BUDGET // weight.shape[0]))
        return F.linear_cross_entropy(states, weight, targets, linear_bias=lm_head.bias, options=options)
    num_chunks = math.ceil(num_logits / LOGITS_BUDGET)
    losses = [
        checkpoint(_token_losses, *chunk, lm_head, config, use_reentrant=False)
        for chunk in zip(states.chunk(num_chunks), targets.chunk(num_chunks), strict=True)
    ]
    return torch.cat(losses).mean()


def count_targets(labels: Tensor) -> Tensor:
    """Number of next-token targets, N. Shapes: ``(B, T)`` -> ``()``"""
    return (labels[:, 1:] != -100).sum()


def _token_losses(states: Tensor, targets: Tensor, lm_head: nn.Module, config: Any) -> Tensor:
    """Cross-entropy of each target. Shapes: ``(N, D)``, ``(N,)`` -> ``(N,)``"""
    return F.cross_entropy(output_logits(states, lm_head, config), targets, reduction="none")


def _plain_logits(config: Any) -> bool:
    """True if the logits are the output of the head, with nothing applied to them."""
    return not any(getattr(config, key, None) for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"))


@torch.no_grad()
def check_output_head(base: GemBase) -> None:
    """Make sure that :func:`next_token_loss` computes the model's own next-token loss.

    Raises:
        ValueError: If the model does more to its logits than the head and the known factors and caps.
        FloatingPointError: If hidden states or loss are not finite.
    """
    if base.attention not in MASKED_ATTENTION:
        return
    ids = base.probe(0, 1, 2, 3)
    with Evaluating(base.model):
        expected = base.model(input_ids=ids, labels=ids, use_cache=False).loss
        states = base.states(ids)
        result = next_token_loss(states, ids, base.model.get_output_embeddings(), base.config)
    require_finite(states, expected.to(states.dtype))
    if not torch.allclose(result.float(), expected.float(), rtol=1e-2):
        raise ValueError(
            f"The next-token loss of {base.model.config.model_type} is {expected:.3f} nats by the model itself, "
            f"but {result:.3f} by its output head: it changes its logits in a way that is not supported. Train it "
            "without next-token prediction, by a contrastive loss of Sentence Transformers."
        )
