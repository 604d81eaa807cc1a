"""GemTokens: which vocabulary rows the GEM tokens are, their embeddings, and the pooling of their states."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .gem_base import GemBase, configured_ids
from .gem_mask import GEM
from .gem_text import ids_around

POOLING_MODES = ("mean", "concat")
RESERVED, TRAINED = "reserved", "trained"
RESERVED_TOKEN = re.compile(r"^[<\[>{]\W*(reserved|unused|place.?holder).*\d\W*$", re.IGNORECASE)
"""Names of vocabulary entries set aside by a model's authors, such as ``<|reserved_special_token_9|>``."""

LEAST_SIZE = 0.1
"""Rows that are shorter than this share of the median row were never trained, and are taken by name only."""


class GemTokens:
    """The K GEM tokens.

    Args:
        ids: Their ids in rows of tokens.
        source: Where these come from, see :func:`choose_gem_token_ids`; ``"adapter"`` beside a frozen base.
        pooling: ``"mean"`` or ``"concat"``.
        base: The base, whose embedding matrix holds their rows.
        holder: The module whose ``gem_embeddings`` are their rows instead, beside a frozen base.
        names: Tokens of the base's vocabulary whose rows are theirs, beside a frozen base.

    Attributes, beside these:
        row_ids: Vocabulary rows that their embeddings are, where they are such.
    """

    def __init__(
        self,
        ids: list[int],
        source: str,
        pooling: str,
        base: GemBase,
        holder: Any = None,
        names: list[str] | None = None,
    ) -> None:
        self.ids = ids
        self.source = source
        self.pooling = pooling
        self.base = base
        self.holder = holder
        self.names = names
        self.row_ids = ids
        if names:
            vocabulary = base.text.tokenizer.get_vocab()
            if missing := [name for name in names if name not in vocabulary]:
                raise ValueError(f"The tokenizer lacks {missing}, whose rows the GEM tokens have: it is another one.")
            self.row_ids = [vocabulary[name] for name in names]

    def __len__(self) -> int:
        """K."""
        return len(self.ids)

    @property
    def rows(self) -> Tensor:
        """Embeddings of the GEM tokens. Shape: ``(K, D)``"""
        model = self.base.model
        if self.holder is not None:
            return self.holder.gem_embeddings.to(model.dtype)
        return model.get_input_embeddings()(torch.tensor(self.row_ids, device=model.device))

    def pool(self, hidden_states: Tensor, segments: Tensor) -> Tensor:
        """See :func:`pool_gem_tokens`. Shapes: ``(B, T, D)``, ``(B, T)`` -> ``(B, D)`` or ``(B, K * D)``"""
        return pool_gem_tokens(hidden_states, segments, len(self), self.pooling)


def claim_gem_tokens(base: GemBase, num_gem_tokens: int, is_frozen: bool) -> tuple[list[int], str]:
    """Ids for new GEM tokens and where they come from; beside a frozen base they lie beyond its vocabulary."""
    num_rows = base.model.get_input_embeddings().weight.shape[0]
    if is_frozen:
        return list(range(num_rows, num_rows + num_gem_tokens)), "adapter"
    return choose_gem_token_ids(base.text.tokenizer, num_rows, num_gem_tokens, configured_ids(base.model))


def find_existing_tokens(base: GemBase, asked: str | Sequence[str] | None, num_gem_tokens: int) -> list[str] | None:
    """Tokens of a vocabulary that can serve as GEM tokens with their rows as they are; None for rows of their own.

    Their ids in rows of tokens are others, beyond the vocabulary, so that a text may spell their names.

    Args:
        base: The base.
        asked: ``"reserved"``, for those set aside by the model's authors or, where there are too few, other special
            tokens that nothing uses, last ones first; or the names; or ``"trained"``. By default reserved ones, if
            there are enough whose rows were trained.
        num_gem_tokens: K.

    Raises:
        ValueError: If there are not K, or one is a token that the model, its tokenizer or its chat template uses.
    """
    if asked == TRAINED:
        return None
    if isinstance(asked, str) and asked != RESERVED:
        raise ValueError(f"gem_tokens is {RESERVED!r}, {TRAINED!r} or {num_gem_tokens} names of tokens, got {asked!r}.")
    free = free_special_tokens(base)
    if asked is None:
        names = [name for name, is_trained in free.items() if is_trained][:num_gem_tokens]
        return names if len(names) == num_gem_tokens else None
    names = [*free][:num_gem_tokens] if isinstance(asked, str) else [*asked]
    if not {*names} <= {*free} or not len({*names}) == len(names) == num_gem_tokens:
        raise ValueError(
            f"num_gem_tokens={num_gem_tokens} needs as many special tokens that differ, and that neither the model nor "
            f"its tokenizer nor its chat template uses, but gem_tokens={asked!r} gives {names}. There are {len(free)}: "
            f"{[*free][:8]}. With gem_tokens={TRAINED!r}, rows of their own are trained."
        )
    return names


def free_special_tokens(base: GemBase) -> dict[str, bool]:
    """Special tokens whose rows differ and that nothing uses: trained ones first, then reserved ones, then the last.

    The model's configurations, the tokenizer and the chat template may use them.

    Returns:
        Whether a row is of the size of others, by name; one of nearly nothing was never trained
    """
    tokenizer: Any = base.text.tokenizer
    rows, template = base.model.get_input_embeddings().weight.detach(), str(tokenizer.chat_template or "")
    before, behind = ids_around(base.text.own_tokenizer)
    used = {*configured_ids(base.model), *before, *behind}
    named = {str(getattr(tokenizer, role)) for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    free = {
        name: row
        for name, row in tokenizer.get_vocab().items()
        if (name in special or RESERVED_TOKEN.match(name))
        and (row < len(rows) and row not in used and name not in named and name not in template)
    }
    if not free:
        return {}
    sizes = torch.cat([part.float().norm(dim=-1) for part in rows.split(4096)])
    least = LEAST_SIZE * float(sizes.median())
    found = [(float(sizes[row]) >= least, bool(RESERVED_TOKEN.match(name)), row, name) for name, row in free.items()]
    different: dict[bytes, tuple[str, bool]] = {}  # rows that were never trained may be alike
    for is_trained, _, row, name in sorted(found, reverse=True):
        different.setdefault(rows[row].float().cpu().numpy().tobytes(), (name, is_trained))
    return dict(different.values())


def make_gem_rows(base: GemBase, num_gem_tokens: int, is_new: bool) -> Tensor:
    """Embeddings of GEM tokens beside a frozen base: drawn, or zeros to be loaded into. Shape: ``(K, D)``"""
    embeddings, device = base.model.get_input_embeddings(), base.model.device
    if not is_new:
        return torch.zeros(num_gem_tokens, embeddings.weight.shape[1], device=device)
    num_used = min(max(base.text.tokenizer.get_vocab().values()) + 1, len(embeddings.weight))
    return draw_gem_rows(embeddings(torch.arange(num_used, device=device)), num_gem_tokens).to(device)


def write_gem_rows(base: GemBase, ids: list[int], source: str) -> None:
    """Draw the rows of new GEM tokens in the base's embedding and output matrix, which grow where they have to."""
    if source == "grown":
        base.model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for weight in base.vocabulary_matrices():
        is_used = torch.arange(len(weight), device=weight.device) <= max(base.text.tokenizer.get_vocab().values())
        is_used[ids] = False
        rows = draw_gem_rows(weight[is_used], len(ids))
        with torch.no_grad():
            weight[ids] = rows.to(weight)


def choose_gem_token_ids(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, num_gem_tokens: int, used_ids: Collection[int] = ()
) -> tuple[list[int], str]:
    """Find vocabulary rows for the GEM tokens, preferring rows that nothing else uses.

    Args:
        tokenizer: The base model's tokenizer.
        num_rows: V, rows of the embedding matrix.
        num_gem_tokens: K.
        used_ids: Rows that the model's configuration gives a meaning, e.g. for padding.

    Returns:
        The K ids and where they come from: ``"padding"`` (rows beyond the tokenizer's last id), ``"reserved"`` (the
        last tokens named reserved, unused or placeholder) or ``"grown"`` (rows to be added after the last).
    """
    vocabulary = tokenizer.get_vocab()
    padding = [row for row in range(max(vocabulary.values()) + 1, num_rows) if row not in used_ids]
    if len(padding) >= num_gem_tokens:
        return padding[:num_gem_tokens], "padding"
    used_ids = {*used_ids, *tokenizer.all_special_ids}
    reserved = sorted(row for token, row in vocabulary.items() if RESERVED_TOKEN.match(token) and row not in used_ids)
    if len(reserved) >= num_gem_tokens:
        return reserved[-num_gem_tokens:], "reserved"
    return list(range(num_rows, num_rows + num_gem_tokens)), "grown"


@torch.no_grad()
def draw_gem_rows(vectors: Tensor, num_gem_tokens: int, noise: float = 0.1) -> Tensor:
    """Draw new embeddings near the mean of existing ones, from torch's global generator.

    Args:
        vectors: Embeddings of tokens in use. Shape: ``(at most V, D)``
        num_gem_tokens: K.
        noise: Standard deviation around the mean, in units of that of the vectors in each dimension.

    Returns:
        Shape: ``(K, D)``, in float32 on the CPU
    """
    mean, std = vectors.mean(dim=0, dtype=torch.float32), vectors.std(dim=0).float()
    return mean.cpu() + noise * std.cpu() * torch.randn(num_gem_tokens, vectors.shape[1])


def pool_gem_tokens(hidden_states: Tensor, segments: Tensor, num_gem_tokens: int, pooling: str) -> Tensor:
    """The embedding of each row: its hidden states at the GEM tokens, averaged or concatenated (paper, section 3).

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        num_gem_tokens: K.
        pooling: ``"mean"`` or ``"concat"``.

    Returns:
        Shape: ``(B, D)`` for mean, ``(B, K * D)`` for concat

    Raises:
        ValueError: If a row does not hold exactly K GEM tokens.
    """
    is_gem = segments == GEM
    counts = is_gem.sum(dim=1)
    if not bool((counts == num_gem_tokens).all()):
        raise ValueError(
            f"Every row needs exactly {num_gem_tokens} GEM token(s) to be embedded, but the rows of this batch hold "
            f"{counts.tolist()}. Build the batch with `preprocess`, and do not truncate it afterwards."
        )
    gem_states = hidden_states[is_gem].view(len(hidden_states), num_gem_tokens, -1)
    return gem_states.mean(dim=1) if pooling == "mean" else gem_states.flatten(1)
