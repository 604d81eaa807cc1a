"""RowObjective: what GemLoss computes inside the wrapped model's forward pass, where DDP, FSDP and ZeRO see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modeling.gem_mask import Rows
from .next_token import count_targets, next_token_loss


@dataclass
class RowObjective:
    """Embeddings and next-token loss of a batch of rows.

    Args:
        labels: Token ids, -100 for no target, where the token ids stand. Shape: ``(B, T)``
        mini_batch_size: Rows whose activations are held at a time; each is computed once more in the backward pass
            (GradCache, https://arxiv.org/abs/2101.06983). All by default.
    """

    labels: Tensor
    mini_batch_size: int | None = None

    def __call__(self, gem: Any, rows: Rows) -> dict[str, Tensor]:
        """Compute both.

        Args:
            gem: The :class:`gem_st.GemTransformer`.
            rows: Padded on the right.

        Returns:
            ``sentence_embedding``, shape ``(B, D)``, or ``(B, K * D)`` for concat; ``ntp_loss`` in nats a token, shape
            ``()``; ``num_targets``, shape ``()``; and ``logit_scale``, the factor itself, shape ``(1,)``.
        """
        labels = rows.arrange(self.labels)
        if self.mini_batch_size is None:
            embeddings, loss = _compute(gem, rows, labels)
        else:
            embeddings, loss = self._compute_in_parts(gem, rows, labels, self.mini_batch_size)
        return {
            "sentence_embedding": embeddings,
            "ntp_loss": loss,
            "num_targets": count_targets(labels),
            "logit_scale": gem.logit_scale.exp(),
        }

    @staticmethod
    def _compute_in_parts(gem: Any, rows: Rows, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """As :func:`_compute`, holding the activations of ``size`` rows of like length at a time."""

        def run(part: Rows, part_labels: Tensor) -> tuple[Tensor, Tensor]:
            embeddings, loss = _compute(gem, part, part_labels)
            return embeddings, loss * count_targets(part_labels)

        lengths = rows.lengths
        order = lengths.argsort(descending=True, stable=True)
        parts = []
        for index in order.split(size):
            width = int(lengths[index[0]])
            parts.append(checkpoint(run, rows.take(index, width), labels[index, :width], use_reentrant=False))
        embeddings, losses = zip(*parts, strict=True)
        return torch.cat(embeddings)[order.argsort()], sum(losses) / count_targets(labels).clamp(min=1)


def _compute(gem: Any, rows: Rows, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and mean next-token loss of rows, by one pass. Shapes: ``(B, T)`` -> ``(B, D)``, ``()``"""
    states = gem.embedder.states(rows)
    loss = next_token_loss(states, labels, gem.model.get_output_embeddings(), gem.base.config)
    return gem.gem_tokens.pool(states, rows.segments), loss
