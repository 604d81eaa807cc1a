"""A tokenizer for ourselves, of the same vocabulary: what others set on theirs meanwhile does not reach it."""

from __future__ import annotations

import copy
import math
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

PARTS = ("normalizer", "pre_tokenizer", "post_processor")
"""What the backend of a fast tokenizer is made of, beside its model and the added tokens."""

MAX_COMPARED = 1024
"""Added tokens that are compared one by one; of more, which takes milliseconds, only ids that are new are seen."""


class Watch(NamedTuple):
    """What is looked at to see that a backend was changed.

    Attributes:
        next_ids: Ids one of which a new token gets: behind the vocabulary, or where it has a gap.
        compares_all: Whether there are few enough added tokens to compare all.
    """

    next_ids: tuple[int, ...]
    compares_all: bool


class OwnTokenizer:
    """Gives a tokenizer that neither truncates nor pads.

    A call with ``truncation=True`` or ``padding=True`` sets the backend of a fast tokenizer, which all callers share:
    a row of another thread is cut by it. The backend is therefore one of our own. Other tokenizers keep no such state.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, Watch, Any, Any] | None = None

    def of(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The tokenizer as it is now, with a backend of our own, which is made again when theirs has changed."""
        shared = getattr(tokenizer, "backend_tokenizer", None)
        if shared is None:
            return tokenizer
        made = self._made
        if made is None or made[0] is not shared or made[2] != state_of(tokenizer, made[1]):
            watch = watch_for(shared)
            self._made = made = (shared, watch, state_of(tokenizer, watch), copy_backend(shared))
        return with_backend(tokenizer, made[3])

    def __getstate__(self) -> dict[str, Any]:
        """Nothing that could not be made again."""
        return {"_made": None}


def copy_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A tokenizer of the same vocabulary, to be called with truncation and padding; see :class:`OwnTokenizer`."""
    return OwnTokenizer().of(tokenizer)


def with_backend(tokenizer: PreTrainedTokenizerBase, backend: Any) -> Any:
    """The tokenizer, whose class may do more than its backend, with another one."""
    own: Any = copy.copy(tokenizer)
    own._tokenizer = backend
    return own


def watch_for(backend: Any) -> Watch:
    """How to see later that a backend was changed."""
    added = backend.get_added_tokens_decoder()
    next_ids = backend.get_vocab_size(), backend.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1
    return Watch(next_ids, len(added) <= MAX_COMPARED)


def state_of(tokenizer: Any, watch: Watch) -> tuple[Any, ...]:
    """What tells that a tokenizer was changed; its truncation and padding do not count."""
    backend = tokenizer.backend_tokenizer
    parts = [_state_of_part(getattr(backend, name)) for name in PARTS]
    new = [backend.id_to_token(token_id) for token_id in watch.next_ids]
    added = backend.get_added_tokens_decoder() if watch.compares_all else {}
    return new, tokenizer.all_special_tokens, sorted((key, repr(token)) for key, token in added.items()), parts


def _state_of_part(part: Any) -> Any:
    try:
        return None if part is None else part.__getstate__()
    except Exception:  # tokenizers raises no other; a part written in Python has no state that could be read
        return "custom"


def copy_backend(backend: Any, num_rows: float = math.inf) -> Any:
    """A backend of the same model and parts, which are shared, without truncation and padding.

    Args:
        backend: Another tokenizer's.
        num_rows: Added tokens of this id and beyond are left out.
    """
    own = type(backend)(backend.model)
    for name in (*PARTS, "decoder"):
        setattr(own, name, getattr(backend, name))
    own.encode_special_tokens = backend.encode_special_tokens
    decoder = sorted(backend.get_added_tokens_decoder().items())  # ids are given in this order
    added = [token for token_id, token in decoder if token_id < num_rows]
    for is_special, tokens in groupby(added, key=lambda token: token.special):
        (own.add_special_tokens if is_special else own.add_tokens)(list(tokens))
    return own
