"""Text and chat messages <-> token ids: the base's tokenizer, of which encoding takes a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .gem_own_tokenizer import OwnTokenizer

logger = logging.get_logger(__name__)

Prompts = str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]]
"""A text, texts, the messages of a conversation, or conversations."""

CONTAINERS = (
    "many texts are a list, tuple, numpy array or column of `datasets`. Make a list of others, such as a pandas Series "
    "(.tolist()), an Arrow array (.to_pylist()) or a generator (list(...))."
)
"""What `encode` of Sentence Transformers takes for a batch, and everything else here with it."""

NOT_UNICODE = (
    "half of a surrogate pair, which is no text. Mend it with "
    "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), or drop it."
)
"""What is wrong with a text that was cut within an emoji, or decoded with ``surrogateescape``, and what to do."""


class TextCodec:
    """Turns texts into token ids and back.

    Args:
        tokenizer: The base model's.
        hidden_names: Names of tokens that a text may not spell out, such as those of GEM tokens.

    Attributes, set once they are known:
        gem_token_ids: Ids that no token of a text may have.
        model_config: Its ``vocab_size`` is the number of rows that ids of a text may name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden_names: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.hidden_names = tuple(hidden_names)
        self.gem_token_ids: frozenset[int] = frozenset()
        self.model_config: Any = None
        self._own = OwnTokenizer()

    @property
    def own_tokenizer(self) -> Any:
        """The tokenizer with a backend of our own, which other threads do not set to truncate or pad."""
        return self._own.of(self.tokenizer)

    def encode(
        self,
        texts: Sequence[str],
        prompt: str = "",
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Token ids of each text as the base's tokenizer gives them, truncated to ``max_tokens``.

        Raises:
            ValueError: If an input is not a string of valid Unicode, or holds a token that the model has no row for.
        """
        check_texts(texts)
        texts = [self._defuse(prompt + text) for text in texts]
        check_unicode(texts)
        if not texts:
            return []
        options = {"add_special_tokens": add_special_tokens, "padding": False, "return_attention_mask": False}
        tokenizer = self.own_tokenizer
        rows = tokenizer(texts, verbose=False, **options)["input_ids"]
        self._check_ids(rows)
        if add_special_tokens:
            warn_of_second_bos(tokenizer, rows)
        if max_tokens is None or all(len(row) <= max_tokens for row in rows):
            return rows
        around = count_around(tokenizer) if add_special_tokens else (0, 0)
        return [self._truncate(row, max_tokens, *around) for row in rows]

    def is_readable(self, token_id: int) -> bool:
        """True if the model has a row for a token, and it is no GEM token's."""
        num_rows = getattr(self.model_config, "vocab_size", math.inf)
        return token_id < num_rows and token_id not in self.gem_token_ids

    def _check_ids(self, rows: list[list[int]]) -> None:
        """Raise if a text holds a token whose row is missing or a GEM token's: one that was added too late."""
        for index, row in enumerate(rows):
            if all(map(self.is_readable, (max(row, default=0), *self.gem_token_ids.intersection(row)))):
                continue
            token_id = next(token_id for token_id in row if not self.is_readable(token_id))
            what = "that of a GEM token" if token_id in self.gem_token_ids else "beyond the model's vocabulary"
            raise ValueError(
                f"Input {index} of {len(rows)} holds the token {self.tokenizer.convert_ids_to_tokens(token_id)!r}, "
                f"whose id {token_id} is {what}: it was added to the tokenizer after the model was made. Add tokens "
                "to the base, and resize its embeddings, before GemTransformer reads it; or leave them out of texts."
            )

    def _truncate(self, row: list[int], max_tokens: int, num_before: int, num_after: int) -> list[int]:
        """Cut the text and keep what the tokenizer puts around it; its own truncation would change its state."""
        if len(row) <= max_tokens:
            return row
        end = len(row) - num_after
        body, room = row[num_before:end], max(0, max_tokens - num_before - num_after)
        is_left = self.tokenizer.truncation_side == "left"
        return [*row[:num_before], *(body[len(body) - room :] if is_left else body[:room]), *row[end:]]

    def _defuse(self, text: str) -> str:
        """Break up hidden names in a text, with a zero-width space, so that they are not matched."""
        for name in self.hidden_names:
            text = text.replace(name, f"{name[0]}\u200b{name[1:]}")
        return text

    def encode_prompts(
        self,
        prompts: Prompts,
        prefix: str = "",
        max_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether a single one was given.

        They end where the text ends, so that it can be continued: without the tokens that some tokenizers put behind
        every text, which :attr:`end_ids` are. The place of these counts in ``max_tokens``.
        """
        is_single = isinstance(prompts, str) or is_conversation(prompts)
        batch: list[Any] = [prompts] if is_single else list_of(prompts)
        if not batch:
            return [], is_single
        if len({is_conversation(prompt) for prompt in batch}) == 2:
            raise ValueError("Prompts are all texts or all messages, but these are of both kinds.")
        num_end = len(self.end_ids)
        if is_conversation(batch[0]):
            if prefix:
                raise ValueError(f"prompt={prefix!r} is put before texts. Give messages a system message instead.")
            room = None if max_tokens is None else max_tokens - num_end
            texts = self._render_chat(batch, chat_template_kwargs or {})
            return self.encode(texts, "", room, add_special_tokens=False), is_single
        if chat_template_kwargs:
            raise ValueError("chat_template_kwargs were given, but plain text, which goes through no chat template.")
        return [row[: len(row) - num_end] for row in self.encode(batch, prefix, max_tokens)], is_single

    def _render_chat(self, conversations: list[Any], options: dict[str, Any]) -> list[str]:
        """The chat template's text of each conversation, up to the start of the answer unless told otherwise."""
        if self.tokenizer.chat_template is None and options.get("chat_template") is None:
            raise ValueError(
                "Chat messages were given, but the tokenizer has no chat template. Pass plain text to `generate`, or "
                "use an instruction-tuned base."
            )
        start = {"add_generation_prompt": not options.get("continue_final_message", False)}
        batch: Any = [list(messages) for messages in conversations]
        rendered: Any = self.tokenizer.apply_chat_template(batch, **{**start, **options, "tokenize": False})
        return rendered

    def decode_continuation(self, sequence: Tensor, prompt_length: int) -> str:
        """Text of the tokens behind a prompt; decoded with it, since some tokenizers drop the first space of a text."""
        decode: Any = partial(self.tokenizer.decode, skip_special_tokens=True)
        prompt, whole = decode(sequence[:prompt_length]), decode(sequence)
        return whole[len(prompt) :] if whole.startswith(prompt) else decode(sequence[prompt_length:])

    def pad(self, rows: list[Tensor], padding_side: str | None = None) -> dict[str, Tensor]:
        """Pad rows of token ids to one length.

        Args:
            rows: Token ids. Shape: ``(T_i,)`` each
            padding_side: ``"left"`` or ``"right"``; defaults to the tokenizer's.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens). Shape: ``(B, T)`` each
        """
        side = padding_side or self.tokenizer.padding_side
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side=side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
        }

    @property
    def pad_token_id(self) -> int:
        """Id written into padding; it is never attended to, so that any id does for which the model has a row."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in candidates if token_id is not None and self.is_readable(token_id))

    @property
    def num_special_tokens(self) -> int:
        """Special tokens, BOS in most models, that the tokenizer puts before a text."""
        return count_around(self.own_tokenizer)[0]

    @property
    def end_ids(self) -> list[int]:
        """Special tokens, none in most models, that the tokenizer puts behind a text that is embedded."""
        return ids_around(self.own_tokenizer)[1]


def list_of(texts: Any) -> list[Any]:
    """The list of what `encode` of Sentence Transformers takes for a batch.

    Raises:
        ValueError: If it would take it for a single input.
    """
    is_single: Any = BaseModel.is_singular_input
    if is_single(None, texts):
        raise ValueError(f"Prompts are a text, messages, or a list of either, got {type(texts).__name__}: {CONTAINERS}")
    return texts.tolist() if hasattr(texts, "tolist") else list(texts)


def is_conversation(prompt: Any) -> bool:
    """True for the messages of a conversation."""
    is_sequence = isinstance(prompt, list | tuple) or getattr(prompt, "ndim", 0) == 1
    return is_sequence and len(prompt) > 0 and isinstance(next(iter(prompt)), dict)


def check_texts(texts: Sequence[Any]) -> None:
    """Raise if this is not a list of strings."""
    if isinstance(texts, str):
        raise ValueError(f"A list of texts is needed, got the single text {texts!r:.80}. Put it in a list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"Input {index} of {len(texts)} is {text!r:.80} ({type(text).__name__}), but only strings can be "
                f"embedded or generated from. Convert it to str, or drop it; {CONTAINERS}"
            )


def check_unicode(texts: Sequence[str]) -> None:
    """Raise if no UTF-8 can be made of a text."""
    for index, text in enumerate(texts):
        if (place := find_surrogate(text)) is not None:
            raise ValueError(f"Input {index} of {len(texts)} has {text[place]!r} at {place}, {NOT_UNICODE}")


def warn_of_second_bos(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> None:
    """Say once that a text begins with what the tokenizer puts before it. Its ids are left as the tokenizer's."""
    start = tokenizer.bos_token_id
    if any(row[:2] == [start, start] for row in rows):
        logger.warning_once(
            f"A text begins with {tokenizer.bos_token!r}, as a chat template writes it, and the tokenizer puts another "
            "one before it, so that it is read twice. Leave it out of the text, or give `generate` and `prefill` the "
            "messages themselves."
        )


def find_surrogate(text: str) -> int | None:
    """Place of the first half of a surrogate pair, of which no UTF-8 can be made; None in valid text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def count_around(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many special tokens a tokenizer puts before and behind a text, see :func:`ids_around`."""
    before, behind = ids_around(tokenizer)
    return len(before), len(behind)


def ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens, BOS and EOS in most models, that a tokenizer puts before and behind a text."""
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    starts = [index for index in range(len(whole)) if whole[index : index + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts and bare else ([], [])
