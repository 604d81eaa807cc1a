"""Measures a model: padding, batches, data types, length, odd inputs, reconstruction."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...evaluators import ReconstructionEvaluator
from ...finding import find_gem
from .encode import (
    REFUSALS,
    Encoder,
    NotMeasuredError,
    first_line,
    is_quantized,
    recorded_norms,
    reporting,
    tokenizer_of,
    unchanged,
    weights_dtype,
)
from .report import Health
from .vectors import (
    Agreement,
    LengthHealth,
    Reconstruction,
    Vectors,
    compare,
    is_bad,
    measure_isotropy,
    pair_cosines,
    row_cosines,
)

MIN_TEXTS = 16
"""Different texts needed, so that means over pairs and directions mean something."""

NUM_COMPARED = 64
"""Texts embedded several times over: one by one, padded on either side, in another data type."""

NUM_LONG = 16
"""Texts of each length."""

SHORTEST = 16
"""Tokens in a row of the shortest texts in the measures by length; each next one is twice as long."""

RECONSTRUCTED_LENGTHS = (8, 16, 32, 64)
"""Most tokens in a text of each group of the reconstruction."""

NUM_RECONSTRUCTED = 32
"""Texts in each of these groups at most."""

ODD_TEXTS = {
    "empty text": "",
    "blanks": " \t\n ",
    "emoji": "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f642",
    "control characters": "a\x00b\x07c\x1b[0m\u200b\u202ed",
}
"""Inputs that are rare in training and common in production; a very long text is added to them."""


def measure_health(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    seed: int = 0,
    num_texts: int = 512,
    max_length: int = 1024,
    prompt: str | None = None,
    show_progress_bar: bool = False,
) -> Health:
    """Measure whether a model's vectors depend on the text alone, and how they fill their space.

    The model is left as it was. Memory: that of a second copy of the model, in bfloat16 or float32, for a while.

    Args:
        model: Any SentenceTransformer.
        texts: Texts of the kind it is to embed, at least 16 different ones that are not blank.
        batch_size: Rows in a batch, 2 or more; long texts run in smaller ones.
        seed: Chooses the texts.
        num_texts: Texts used at most.
        max_length: Tokens in the longest row of the measures by length, if the model takes as many.
        prompt: Put before every text, instead of the model's default prompt.
        show_progress_bar: Show which part is being measured.

    Returns:
        The measures; :meth:`Health.to_markdown` says what is expected of each.

    Raises:
        ValueError: If there are too few texts, or a setting is out of range.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size must be 2 or more, to be compared with batches of one, got {batch_size}.")
    if num_texts < MIN_TEXTS:
        raise ValueError(f"num_texts must be {MIN_TEXTS} or more, got {num_texts}.")
    texts = choose_texts(texts, num_texts, seed)
    encoder = Encoder(model, prompt, batch_size)
    mixed = mix_lengths(texts[:NUM_COMPARED])
    not_measured: dict[str, str] = {}
    parts: dict[str, Callable[[], Any]] = {
        "vectors": lambda: encoder(texts),
        "batches": lambda: compare(encoder(mixed, batch_size=1), encoder.in_order(mixed)),
        "padding": lambda: measure_padding(encoder, mixed),
        "bfloat16": lambda: measure_bfloat16(encoder, mixed),
        "lengths": lambda: measure_lengths(encoder, texts, max_length),
        "odd_inputs": lambda: measure_odd_inputs(encoder, texts, max_length),
        "reconstruction": lambda: measure_reconstruction(model, texts, batch_size),
    }
    results: dict[str, Any] = {}
    with unchanged(model), tqdm(parts.items(), desc="Health", disable=not show_progress_bar) as progress:
        for name, measure in progress:
            progress.set_postfix_str(name)
            try:
                results[name] = measure()
            except NotMeasuredError as error:
                results[name], not_measured[name] = None, str(error)
    vectors = results.pop("vectors")
    good = vectors[~is_bad(vectors)]
    if len(good) < 2:
        not_measured["isotropy"] = "there are not two vectors that are finite and not zero"
    return Health(
        num_texts=len(texts),
        dimension=vectors.shape[1],
        dtype=str(weights_dtype(model)).removeprefix("torch."),
        batch_size=min(batch_size, len(mixed)),
        num_bad=len(vectors) - len(good),
        isotropy=measure_isotropy(good) if len(good) > 1 else None,
        not_measured=not_measured,
        **results,
    )


def choose_texts(texts: Sequence[str], num_texts: int, seed: int) -> list[str]:
    """Draw different texts that are not blank.

    Raises:
        ValueError: If these are fewer than 16, or something is not a text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("The health of vectors is measured on a list of strings.")
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(different) < MIN_TEXTS:
        raise ValueError(
            f"At least {MIN_TEXTS} different texts are needed, got {len(different)} (of {len(texts)}, without blank "
            "ones and repetitions). Pass texts of the kind the model is to embed; some hundred are better."
        )
    return random.Random(seed).sample(different, min(num_texts, len(different)))


def mix_lengths(texts: Sequence[str]) -> list[str]:
    """Halve every third text and join every other third with the next, so that a batch of them holds padding."""
    mixed = []
    for index, text in enumerate(texts):
        halved = text[: max(1, len(text) // 2)]
        joined = f"{text} {texts[(index + 1) % len(texts)]}"
        mixed.append((halved, text, joined)[index % 3])
    return mixed


def measure_padding(encoder: Encoder, texts: Sequence[str]) -> Agreement:
    """Vectors of texts in batches padded on the left against those padded on the right."""
    tokenizer = tokenizer_of(encoder.model)
    vectors: dict[str, Vectors] = {}
    side_before = tokenizer.padding_side
    try:
        for side in ("left", "right"):
            tokenizer.padding_side = side
            with reporting(f"padding on the {side} is refused"):
                vectors[side] = encoder.in_order(texts)
    finally:
        tokenizer.padding_side = side_before
    return compare(vectors["left"], vectors["right"])


def measure_bfloat16(encoder: Encoder, texts: Sequence[str]) -> Agreement:
    """Vectors of the model with its weights in bfloat16 against those in float32; copies are cast where needed."""
    model = encoder.model
    if is_quantized(model):
        raise NotMeasuredError("the weights are quantised, and cannot be cast")
    vectors = []
    with reporting("no copy of the model could be cast and run"):
        for dtype in (torch.float32, torch.bfloat16):
            cast = model if weights_dtype(model) == dtype else cast_copy(model, dtype)
            vectors.append(Encoder(cast, encoder.prompt, encoder.batch_size)(texts))
            del cast
    return compare(*vectors)


def cast_copy(model: SentenceTransformer, dtype: torch.dtype) -> SentenceTransformer:
    """A copy of a model with weights of another data type; those of a LoRA stay as they are, as when it is loaded.

    Buffers keep their type, too: rotary frequencies are never rounded by a load. Weights that two modules share, the
    copy's share, too. Nothing of the size of the weights is held beside model and copy.
    """
    memo: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and "lora_" not in name:
            memo[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, memo)


def measure_lengths(encoder: Encoder, texts: Sequence[str], max_length: int) -> list[LengthHealth]:
    """Norms and cosines of texts concatenated and cut to growing lengths."""
    tokenizer, model = tokenizer_of(encoder.model), encoder.model
    prompt = encoder.prompt if encoder.prompt is not None else model.prompts.get(model.default_prompt_name or "")
    num_added = model.preprocess(["a"], prompt=prompt)["input_ids"].shape[1] - 1
    limit = min(max_length, model.max_seq_length or max_length)
    stream = [
        token for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] for token in ids
    ]
    lengths = [length for length in row_lengths(limit) if length - num_added >= 4]
    if not lengths:
        raise NotMeasuredError(
            f"rows of {limit} tokens leave no room for text beside the {num_added} that are added to it"
        )
    return [_measure_length(encoder, tokenizer, stream, length, length - num_added) for length in lengths]


def row_lengths(limit: int) -> list[int]:
    """16, 32, 64 ... tokens, and the limit itself as the last."""
    lengths: list[int] = []
    while SHORTEST * 2 ** len(lengths) < limit:
        lengths.append(SHORTEST * 2 ** len(lengths))
    return [*lengths, limit]


def _measure_length(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, stream: list[int], num_tokens: int, width: int
) -> LengthHealth:
    """One row of :func:`measure_lengths`: texts of ``width`` tokens make rows of ``num_tokens``."""
    decode: Any = tokenizer.decode
    rows, is_different = cut_stream(stream, width, NUM_LONG)
    texts = [decode(row, skip_special_tokens=True) for row in rows]
    halves = [decode(row[: width // 2], skip_special_tokens=True) for row in rows]
    batch_size = max(1, min(encoder.batch_size, encoder.batch_size * 128 // num_tokens))
    with recorded_norms(encoder.model) as norms:
        whole = encoder(texts, batch_size)
    half, twice = encoder(halves, batch_size), encoder([f"{text} {text}" for text in halves], batch_size)
    return LengthHealth(
        num_tokens=num_tokens,
        norm=float(np.mean(norms or np.linalg.norm(whole, axis=1))),
        repeated=float(row_cosines(half, twice).mean()),
        half=float(row_cosines(whole, half).mean()),
        pairs=float(pair_cosines(whole).mean()) if is_different else None,
        is_finite=bool(np.isfinite([whole, half, twice]).all()),
    )


def cut_stream(stream: Sequence[int], width: int, num_rows: int) -> tuple[list[list[int]], bool]:
    """Cut rows of ``width`` tokens out of a stream that starts over at its end, and say whether none overlap.

    Starts are spread evenly. Shapes: ``(tokens,)`` -> ``(num_rows, width)``
    """
    size = len(stream)
    starts = [index * size // num_rows for index in range(num_rows)]
    rows = [[stream[(start + offset) % size] for offset in range(width)] for start in starts]
    return rows, width * num_rows <= size


def measure_odd_inputs(encoder: Encoder, texts: Sequence[str], max_length: int) -> dict[str, str]:
    """``"ok"`` for each odd input that gives a finite vector that is not zero, twice the same, or what is wrong."""
    words = " ".join(texts).split()
    long_text = " ".join(words[index % len(words)] for index in range(2 * max_length))
    return {name: judge_input(encoder, text) for name, text in {**ODD_TEXTS, "very long text": long_text}.items()}


def judge_input(encoder: Callable[[Sequence[str]], Vectors], text: str) -> str:
    """``"ok"``, or what is wrong with the vector of a text."""
    try:
        first, second = encoder([text]), encoder([text])
    except REFUSALS as error:
        return f"refused: {first_line(error)}"
    if not np.isfinite(first).all():
        return "not finite"
    if not first.any():
        return "zero vector"
    return "ok" if np.array_equal(first, second) else "changes from call to call"


def measure_reconstruction(
    model: SentenceTransformer, texts: Sequence[str], batch_size: int
) -> list[Reconstruction] | None:
    """What comes back of texts from their GEM tokens, by length; None for a model that has none."""
    gem = find_gem(model)
    if gem is None:
        return None
    ids = gem.base.text.encode(texts, add_special_tokens=False)
    groups = group_by_length(texts, [len(row) for row in ids])
    if not groups:
        raise NotMeasuredError(f"no text has {RECONSTRUCTED_LENGTHS[-1]} tokens or fewer")
    with reporting("this model cannot reconstruct"):
        return [_reconstruct(gem, *bounds, group, batch_size) for bounds, group in groups.items()]


def group_by_length(texts: Sequence[str], lengths: Sequence[int]) -> dict[tuple[int, int], list[str]]:
    """The first texts of each range of lengths, by its bounds, both included; ranges without a text are left out."""
    groups: dict[tuple[int, int], list[str]] = {}
    low = 1
    for high in RECONSTRUCTED_LENGTHS:
        if found := [text for text, length in zip(texts, lengths, strict=True) if low <= length <= high]:
            groups[low, high] = found[:NUM_RECONSTRUCTED]
        low = high + 1
    return groups


def _reconstruct(gem: Any, low: int, high: int, texts: list[str], batch_size: int) -> Reconstruction:
    metrics = ReconstructionEvaluator(texts, batch_size=batch_size).measure(gem)
    return Reconstruction(low, high, len(texts), metrics["exact_match"], metrics["chrf"])
