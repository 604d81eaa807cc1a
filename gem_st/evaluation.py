"""Measures of the two sides of a GEM model that Sentence Transformers' own evaluators do not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 16,
) -> float:
    """Perplexity of a causal language model on texts: exp of the mean loss over all tokens but the first of each.

    Args:
        model: A ``*ForCausalLM``: ``model[0].model`` of a GEM model, or any base.
        tokenizer: Its tokenizer.
        texts: The texts; longer ones are truncated.
        max_length: Tokens read of each text.
        batch_size: Texts in a forward pass.

    Returns:
        Perplexity, per token.

    Raises:
        ValueError: If no text has two tokens.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    rows = sorted((torch.tensor(row) for row in ids if len(row) > 1), key=len)
    if not rows:
        raise ValueError("Perplexity needs at least one text of two tokens or more.")
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        labels = pad_sequence(batch, batch_first=True, padding_value=-100).to(model.device)
        num_targets = sum(len(row) - 1 for row in batch)
        # Padding on the right of a causal model needs no mask: no real token sees it.
        loss = model(input_ids=labels.clamp(min=0), labels=labels, use_cache=False).loss
        total, count = total + loss.item() * num_targets, count + num_targets
    model.train(was_training)
    return math.exp(total / count)
