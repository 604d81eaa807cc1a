"""Embeddings that a base model gives without any training, to compare a GEM model with."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modeling.gem_text import count_around

BASELINES = {
    "mean": "mean of the last hidden states over all tokens",
    "lasttoken": "last hidden state of the last token",
    "echo": "each text read twice, mean over the second reading",
}
"""Names of the baselines, and what they are."""

PLAIN_TEXT: dict[str, Any] = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
"""Read texts as they are: Sentence Transformers makes messages of them where there is a chat template."""


class EchoTransformer(Transformer):
    """Reads every text twice in one row, and lets only the second reading be pooled, which has seen the whole text.

    Echo embeddings, Springer et al. 2024, arXiv 2402.15449, without the words they put around the two readings.
    ``max_seq_length`` counts one reading.
    """

    def preprocess(self, inputs: Any, prompt: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tokenize, and repeat what is not special.

        Args:
            inputs: Texts.
            prompt: Put before each text, in both readings.
            *args: Passed on.
            **kwargs: Likewise.

        Returns:
            ``input_ids``, ``attention_mask`` and ``echo_mask``, True at the second reading, each of Shape: (B, T).
        """
        features = super().preprocess(inputs, prompt, *args, **kwargs)
        assert self.tokenizer is not None
        special = count_around(self.tokenizer)[0]
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
            first = ids[mask.bool()]
            second = first[special:] if len(first) > special else first
            rows.append(torch.cat([first, second]))
            masks.append(torch.cat([torch.zeros_like(first), torch.ones_like(second)]))
        return {
            "modality": features["modality"],
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "echo_mask": pad_sequence(masks, batch_first=True),
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the model, and hand on the second reading's mask.

        Args:
            features: What :meth:`preprocess` returned.
            **kwargs: Passed on.

        Returns:
            The features, with ``token_embeddings``, Shape: (B, T, D).
        """
        echo_mask = features.pop("echo_mask")
        return {**super().forward(features, **kwargs), "attention_mask": echo_mask}


def build_baseline(name: str, base: str, *, max_seq_length: int | None = None, **kwargs: Any) -> SentenceTransformer:
    """A base model as an embedder: stock modules of Sentence Transformers, and of ours only the text read twice.

    Args:
        name: A key of ``BASELINES``.
        base: Folder or Hub id of the base model.
        max_seq_length: Longest text, in tokens; the rest is cut. By default the base's, for ``echo`` half of it.
        **kwargs: Passed to SentenceTransformer's ``Transformer``, e.g. ``model_kwargs``.

    Raises:
        ValueError: If there is no such baseline.
    """
    if name not in BASELINES:
        raise ValueError(f"There is no baseline {name!r}. Known are {', '.join(BASELINES)}.")
    kind = EchoTransformer if name == "echo" else Transformer
    backbone = kind(base, modality_config=PLAIN_TEXT, module_output_name="token_embeddings", **kwargs)
    set_padding_token(backbone.tokenizer)
    longest = [length for length in (max_seq_length, _context(backbone)) if length]
    if longest and name == "echo":
        longest.append(_context(backbone, default=2 * min(longest)) // 2)
    if longest:
        backbone.max_seq_length = min(longest)
    pooling = Pooling(backbone.get_embedding_dimension(), "lasttoken" if name == "lasttoken" else "mean")
    return SentenceTransformer(modules=[backbone, pooling])


def set_padding_token(tokenizer: Any) -> None:
    """Give a tokenizer a token to pad with, if it has none, as most base models'; what pads is not read."""
    if getattr(tokenizer, "pad_token", "") is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _context(backbone: Transformer, default: int = 0) -> int:
    """Tokens that the model can read; ``default`` if its configuration does not tell."""
    return int(getattr(backbone.config.get_text_config(), "max_position_embeddings", None) or default)
