"""From texts to training rows: prefix/suffix tasks and the second view (paper, section 3).

Everything here is a function on rows of token ids without padding and GEM tokens, drawn from a torch generator on the
CPU, so that a seed fixes every cut and deletion on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

NO_TARGET = -100
"""Label of a token that is no next-token target, as torch's cross-entropy ignores it."""


def split_rows(input_ids: Tensor, attention_mask: Tensor, gem_token_ids: Sequence[int]) -> list[Tensor]:
    """Take padding and GEM tokens out of a batch.

    Args:
        input_ids: Token ids as ``preprocess`` gives them. Shape: ``(B, T)``
        attention_mask: 1 for real tokens, on either side. Shape: ``(B, T)``
        gem_token_ids: The ids of the GEM tokens.

    Returns:
        The texts' token ids, on the CPU. Shape: ``(T_i,)`` each
    """
    ids = input_ids.cpu()
    keep = attention_mask.cpu().bool() & ~torch.isin(ids, torch.as_tensor(gem_token_ids))
    return [row[kept] for row, kept in zip(ids, keep, strict=True)]


def cut_continuation(
    row: Tensor, max_length: int, num_special: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Continuation: the text up to a uniformly drawn cut, and the rest.

    Args:
        row: Token ids of a text, special tokens first. Shape: ``(T_i,)``
        max_length: Tokens that prefix and suffix may have together.
        num_special: Special tokens at the start (BOS), which belong to the prefix.
        generator: Source of randomness; torch's global one by default.

    Returns:
        Prefix and suffix, at least one token of text each; the suffix is empty if the text has fewer than two tokens.
    """
    row = row[:max_length]
    num_cuts = len(row) - num_special - 1
    if num_cuts < 1:
        return row, row[:0]
    cut = num_special + 1 + int(torch.randint(num_cuts, (), generator=generator))
    return row[:cut], row[cut:]


def repeat_for_reconstruction(
    row: Tensor, max_length: int, num_special: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Reconstruction: the whole text, and the same text again without its special tokens.

    A text that does not fit twice is shortened. Arguments and result are those of :func:`cut_continuation`.
    """
    row = row[: (max_length + num_special) // 2]
    return row, row[num_special:]


TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "continuation": cut_continuation,
    "reconstruction": repeat_for_reconstruction,
}
"""Ways to make ``prefix | suffix`` of one text, by name."""

PAIR_TASKS: dict[str, tuple[str, str]] = {"summary": ("context", "summary"), "soft_prompt": ("prompt", "answer")}
"""Tasks that are given prefix and suffix, and the names of columns by which they are recognised."""


def takes_pairs(tasks: Iterable[str]) -> bool:
    """True if some of the tasks are given prefix and suffix."""
    return not PAIR_TASKS.keys().isdisjoint(tasks)


def check_columns(tasks: Sequence[str], columns: Sequence[Any] | int) -> None:
    """Raise if tasks that are given prefix and suffix have not two columns.

    Args:
        tasks: Names of tasks.
        columns: Names of the columns, or how many there are.

    Raises:
        ValueError: If there are more or fewer than two.
    """
    if takes_pairs(tasks) and (columns if isinstance(columns, int) else len(columns)) != 2:
        raise ValueError(f"tasks={tuple(tasks)} take two columns, prefix and suffix, but there are {columns}.")


def fit_pair(prefix: Tensor, suffix: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Summary and soft prompt: shorten prefix and suffix to fit together, at first the suffix, to half a row or more.

    Args:
        prefix: Token ids, special tokens first. Shape: ``(m,)``
        suffix: Token ids without special tokens at the start. Shape: ``(n,)``
        max_length: Tokens that both may have together.

    Returns:
        Both, cut at their ends.
    """
    suffix = suffix[: max(max_length - len(prefix), max_length // 2)]
    return prefix[: max_length - len(suffix)], suffix


def split_text(
    kind: str,
    text: Tensor,
    given: Tensor | None,
    max_length: int,
    num_special: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Prefix and suffix of a row.

    Args:
        kind: ``"plain"``, or the name of a task.
        text: Token ids, special tokens first. Shape: ``(T_i,)``
        given: What the tasks of two columns put behind the GEM tokens, and plain rows before them. Shape: ``(n,)``
        max_length: Tokens that prefix and suffix may have together.
        num_special: Special tokens at the start of the text.
        generator: Source of randomness; torch's global one by default.

    Returns:
        Prefix, and suffix or None. Shape: ``(m,)``, ``(n,)``
    """
    if kind == "plain":
        return (text if given is None else torch.cat([text, given])[:max_length]), None
    if given is not None and kind in PAIR_TASKS:
        return fit_pair(text, given, max_length)
    return TASKS[kind](text, max_length, num_special, generator)


def split_messages(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Make the columns of the soft prompt task of chat data, with the tokenizer's chat template.

    ``dataset.map(split_messages, fn_kwargs={"tokenizer": model.tokenizer}, remove_columns=dataset.column_names)``

    Args:
        example: A row whose ``messages`` are dicts with ``role`` and ``content``, the assistant's last.
        tokenizer: A tokenizer with a chat template.

    Returns:
        ``prompt``, up to and with the start of the last message, and ``answer``, that message and what ends it.

    Raises:
        ValueError: If there is no chat template, the last message is not the assistant's, or the template writes a
            conversation otherwise once it goes on.
    """
    messages = example["messages"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "Chat messages need a chat template, and the tokenizer has none. Set tokenizer.chat_template, or write "
            "columns `prompt` and `answer` yourself."
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(f"The last of two messages or more has to be the assistant's, but their roles are {roles}.")
    render: Any = partial(tokenizer.apply_chat_template, tokenize=False)
    prompt, whole = render(messages[:-1], add_generation_prompt=True), render(messages)
    if not whole.startswith(prompt):
        raise ValueError(
            "The chat template does not write the conversation with the answer as one that goes on from the prompt. "
            "Write columns `prompt` and `answer` yourself."
        )
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:  # it will be put there again
        return {"prompt": prompt.removeprefix(str(tokenizer.bos_token)), "answer": whole[len(prompt) :]}
    return {"prompt": prompt, "answer": whole[len(prompt) :]}


def drop_tokens(row: Tensor, rate: float, num_special: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """Delete each token of a text with probability ``rate``; special tokens and at least one token stay.

    Args:
        row: Token ids of a text, special tokens first. Shape: ``(T_i,)``
        rate: Probability of deletion, in [0, 1).
        num_special: Special tokens at the start, which are kept.
        generator: Source of randomness; torch's global one by default.

    Returns:
        The remaining ids, in order. Shape: ``(at most T_i,)``
    """
    draws = torch.rand(len(row), generator=generator)
    keep = draws >= rate
    keep[:num_special] = True
    if len(row) > num_special and not keep[num_special:].any():
        keep[num_special + int(draws[num_special:].argmax())] = True
    return row[keep]


VIEWS = ("deletion", "crops")
"""Ways to make two views of one text."""

MIN_CROPPED = 16
"""Tokens of text from which it is cropped; shorter ones have tokens deleted."""


def draw_crops(
    row: Tensor, num_special: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor] | None:
    """Two spans of a text, each of a tenth to a half of it at a random place; None if it is too short.

    "Independent cropping" of Izacard et al. 2022, "Unsupervised Dense Information Retrieval with Contrastive Learning".

    Args:
        row: Token ids of a text, special tokens first. Shape: ``(T_i,)``
        num_special: Special tokens at the start, which are kept.
        generator: Source of randomness; torch's global one by default.

    Returns:
        Special tokens and span, twice. Shape: ``(at most T_i,)`` each
    """
    num = len(row) - num_special
    if num < MIN_CROPPED:
        return None
    spans = []
    for size_draw, place_draw in torch.rand(2, 2, generator=generator).tolist():
        size = max(1, round(num * (0.1 + 0.4 * size_draw)))
        start = num_special + int(place_draw * (num - size + 1))
        spans.append(torch.cat([row[:num_special], row[start : start + size]]))
    return spans[0], spans[1]


def join_row(prefix: Tensor, gem_token_ids: Sequence[int], suffix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Put ``prefix | GEM tokens | suffix`` together, with the next-token targets.

    Args:
        prefix: Token ids. Shape: ``(m,)``
        gem_token_ids: The K ids of the GEM tokens.
        suffix: Token ids, or None. Shape: ``(n,)``

    Returns:
        Token ids and labels, in which GEM tokens are no targets. The last GEM token predicts the first suffix token.
        Shape: ``(m + K + n,)`` each
    """
    gem = torch.as_tensor(gem_token_ids)
    tail = prefix[:0] if suffix is None else suffix
    return torch.cat([prefix, gem, tail]), torch.cat([prefix, torch.full_like(gem, NO_TARGET), tail])
