"""Health of the vectors of a SentenceTransformer: whether they depend on the text alone, and how they fill their space.

Nothing here needs labels: texts of the kind that the model is to embed are enough. Works for any SentenceTransformer;
reconstruction is measured of models that can write a text back from its GEM tokens.

Shapes: ``N`` texts, ``D`` elements of a vector.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluators import ReconstructionEvaluator
from ..finding import find_gem

Vectors = NDArray[np.float64]


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

MAX_DIFFERENCE = 1e-4
"""Of elements of unit vectors, expected of two ways to compute them in float32."""

MIN_COSINE = 0.99
"""Expected where one way or both compute in less than float32."""

MAX_MEAN_COSINE = 0.5
MIN_RANK_SHARE = 0.2
MAX_FIRST_COMPONENT = 0.2
MAX_UNIFORMITY = -2.0
MAX_NORM_RATIO = 2.0
MAX_RISE = 0.2

ODD_TEXTS = {
    "empty text": "",
    "blanks": " \t\n ",
    "emoji": "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f642",
    "control characters": "a\x00b\x07c\x1b[0m\u200b\u202ed",
}
"""Inputs that are rare in training and common in production; a very long text is added to them."""

REFUSALS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model that cannot do something raises; out of memory is a RuntimeError."""


# --------------------------------------------------------------------------------------------------------------------
# Results


class Agreement(NamedTuple):
    """How far two sets of vectors of the same texts agree.

    Attributes:
        max_difference: Largest absolute difference of an element of the unit vectors.
        min_cosine: Smallest cosine of a text's two vectors.
        mean_cosine: Their mean.
    """

    max_difference: float
    min_cosine: float
    mean_cosine: float


class Isotropy(NamedTuple):
    """How vectors of different texts fill their space.

    Attributes:
        mean_cosine: Of all pairs of different texts (Ethayarajh 2019, https://arxiv.org/abs/1909.00512).
        std_cosine: Their standard deviation.
        low_cosine: Their 1st percentile.
        high_cosine: Their 99th percentile.
        effective_rank: Of the centred unit vectors (Roy and Vetterli 2007, "The effective rank").
        max_rank: What it could be at most, ``min(N - 1, D)``.
        first_component: Share of their variance along the first principal component, in [0, 1] (Mu and Viswanath 2018,
            https://arxiv.org/abs/1702.01417).
        uniformity: Wang and Isola 2020, https://arxiv.org/abs/2005.10242; 0 for equal vectors, near -4 for ones
            spread over a sphere.
    """

    mean_cosine: float
    std_cosine: float
    low_cosine: float
    high_cosine: float
    effective_rank: float
    max_rank: int
    first_component: float
    uniformity: float


class LengthHealth(NamedTuple):
    """What becomes of vectors at one length.

    Attributes:
        num_tokens: Tokens in a row, special tokens, GEM tokens and prompt included.
        norm: Mean norm of a vector before any normalisation.
        repeated: Mean cosine of a text of half as many tokens with the same text twice.
        half: Mean cosine of a text with its first half.
        pairs: Mean cosine of pairs of different texts; None where the texts given are too short in all to make
            different ones of this length.
        is_finite: Whether no vector holds NaN or infinity.
    """

    num_tokens: int
    norm: float
    repeated: float
    half: float
    pairs: float | None
    is_finite: bool


class Reconstruction(NamedTuple):
    """What comes back of texts from their GEM tokens, by :class:`gem_st.evaluation.ReconstructionEvaluator`.

    Attributes:
        min_tokens: Tokens in the shortest texts of the group, without special ones.
        max_tokens: In the longest.
        num_texts: Texts in the group.
        exact_match: Share that comes back whole, in [0, 1].
        chrf: sacreBLEU's chrF2, in [0, 100].
    """

    min_tokens: int
    max_tokens: int
    num_texts: int
    exact_match: float
    chrf: float


class HealthRow(NamedTuple):
    """One row of the table.

    Attributes:
        name: What is measured.
        value: The result, to be read.
        expected: What is expected, to be read; empty where nothing is.
        is_ok: Whether it is as expected; None where nothing is, or it was not measured.
    """

    name: str
    value: str
    expected: str = ""
    is_ok: bool | None = None


@dataclasses.dataclass(frozen=True)
class Health:
    """What :func:`measure_health` found. Parts that a model does not have, or that could not be measured, are None.

    Attributes:
        num_texts: N, the different texts used.
        dimension: D.
        dtype: Data type of the model's weights.
        batch_size: Rows in the batches that batches of one are compared with.
        num_bad: Vectors of the N that hold NaN or infinity, or are zero.
        batches: Batches of one against batches of ``batch_size``.
        padding: Left against right padding.
        bfloat16: Weights in bfloat16 against float32.
        isotropy: Of the vectors that are not bad.
        lengths: By length, in growing order.
        odd_inputs: By kind of input ``"ok"`` or what is wrong.
        reconstruction: By length of the text; of GEM models only.
        not_measured: Why, by the name of the attribute.
    """

    num_texts: int
    dimension: int
    dtype: str
    batch_size: int
    num_bad: int
    batches: Agreement
    padding: Agreement | None
    bfloat16: Agreement | None
    isotropy: Isotropy | None
    lengths: list[LengthHealth] | None
    odd_inputs: dict[str, str]
    reconstruction: list[Reconstruction] | None
    not_measured: dict[str, str]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is to be looked at."""
        return all(check.is_ok is not False for check in self.checks())

    def checks(self) -> list[HealthRow]:
        """The rows of the table, with what is expected of each."""
        checks = [
            self._agreement("batches", f"Batches of 1 against batches of {self.batch_size}"),
            self._agreement("padding", "Left padding against right padding"),
            self._agreement("bfloat16", "bfloat16 against float32"),
            *(self._missing("isotropy", "Isotropy") if self.isotropy is None else check_isotropy(self.isotropy)),
            *(self._missing("lengths", "Stability with length") if not self.lengths else check_lengths(self.lengths)),
            HealthRow(
                "Vectors that are not finite, or zero", f"{self.num_bad} of {self.num_texts}", "0", not self.num_bad
            ),
            check_odd_inputs(self.odd_inputs),
        ]
        if "reconstruction" in self.not_measured:
            checks += self._missing("reconstruction", "Reconstruction")
        return [*checks, *check_reconstruction(self.reconstruction or [])]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and the rows of the table as ``checks``, for json; numbers that are not finite become None."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _plain({**parts, "checks": self.checks(), "is_ok": self.is_ok})

    def to_markdown(self) -> str:
        """A table of what is measured, the value, what is expected and a verdict."""
        verdicts = {True: "ok", False: "**look at it**", None: "-"}
        rows = [f"| {c.name} | {_cell(c.value)} | {c.expected or '-'} | {verdicts[c.is_ok]} |" for c in self.checks()]
        return "\n".join(["| measured | value | expected | verdict |", "|---|---|---|---|", *rows]) + "\n"

    def _agreement(self, attribute: str, name: str) -> HealthRow:
        agreement: Agreement | None = getattr(self, attribute)
        if agreement is None:
            return self._missing(attribute, name)[0]
        is_exact = self.dtype == "float32" and attribute != "bfloat16"
        return check_agreement(name, agreement, is_exact)

    def _missing(self, attribute: str, name: str) -> list[HealthRow]:
        return [HealthRow(name, f"not measured: {self.not_measured.get(attribute, 'no reason given')}")]


def check_agreement(name: str, agreement: Agreement, is_exact: bool) -> HealthRow:
    """Two ways that should agree, up to the rounding of float32 (``is_exact``) or of a lower precision."""
    value = f"difference {agreement.max_difference:.1e}, cosine {agreement.min_cosine:.6f}"
    if is_exact:
        return HealthRow(
            name, value, f"difference up to {MAX_DIFFERENCE:g}", agreement.max_difference <= MAX_DIFFERENCE
        )
    return HealthRow(
        name,
        f"{value} (mean {agreement.mean_cosine:.6f})",
        f"cosine from {MIN_COSINE:g}",
        agreement.min_cosine >= MIN_COSINE,
    )


def check_isotropy(isotropy: Isotropy) -> list[HealthRow]:
    """How vectors fill their space; what is expected is a rule of thumb, see docs/health.md."""
    share = isotropy.effective_rank / isotropy.max_rank
    mean, spread = isotropy.mean_cosine, f"from {isotropy.low_cosine:.2f} to {isotropy.high_cosine:.2f}"
    return [
        HealthRow(
            "Cosine of pairs of different texts",
            f"{mean:.3f} +- {isotropy.std_cosine:.3f}, 98 % {spread}",
            f"mean up to {MAX_MEAN_COSINE:g}",
            mean <= MAX_MEAN_COSINE,
        ),
        HealthRow(
            "Effective rank",
            f"{isotropy.effective_rank:.1f} of at most {isotropy.max_rank} ({share:.0%})",
            f"from {MIN_RANK_SHARE:.0%}",
            share >= MIN_RANK_SHARE,
        ),
        HealthRow(
            "Variance along the first principal component",
            f"{isotropy.first_component:.1%}",
            f"up to {MAX_FIRST_COMPONENT:.0%}",
            isotropy.first_component <= MAX_FIRST_COMPONENT,
        ),
        HealthRow(
            "Uniformity",
            f"{isotropy.uniformity:.2f}",
            f"up to {MAX_UNIFORMITY:g}",
            isotropy.uniformity <= MAX_UNIFORMITY,
        ),
    ]


def check_lengths(lengths: Sequence[LengthHealth]) -> list[HealthRow]:
    """Whether vectors stay comparable as texts grow, rows from the shortest to the longest."""
    span = f"{lengths[0].num_tokens} to {lengths[-1].num_tokens} tokens"
    norms = [row.norm for row in lengths]
    smallest, largest = float(np.min(norms)), float(np.max(norms))  # NaN if one is
    ratio = largest / smallest if smallest > 0 else math.inf
    is_finite = all(row.is_finite for row in lengths)
    checks = [
        HealthRow(
            f"Norm before normalisation, {span}",
            f"{_series(norms)}, ratio {ratio:.2f}" + ("" if is_finite else ", not finite everywhere"),
            f"finite, ratio up to {MAX_NORM_RATIO:g}",
            is_finite and ratio <= MAX_NORM_RATIO,
        )
    ]
    for name, label in (("repeated", "A text and itself twice"), ("half", "A text and its first half")):
        values = [getattr(row, name) for row in lengths]
        pairs = [row.pairs for row in lengths]
        compared = [value > pair for value, pair in zip(values, pairs, strict=True) if pair is not None]
        checks.append(
            HealthRow(
                f"{label}, cosine, {span}",
                _series(values),
                "above pairs of different texts at each length",
                all(compared) if compared else None,
            )
        )
    known = [row for row in lengths if row.pairs is not None]
    if len(known) < 2:
        return [*checks, HealthRow(f"Pairs by length, {span}", "not measured: too little text to make long ones")]
    values = [row.pairs for row in known]
    rise = values[-1] - values[0]
    span = f"{known[0].num_tokens} to {known[-1].num_tokens} tokens"
    value = f"{_series(values)}, rise {rise:.2f}"
    checks.append(
        HealthRow(f"Pairs of different texts, cosine, {span}", value, f"rise up to {MAX_RISE:g}", rise <= MAX_RISE)
    )
    return checks


def check_odd_inputs(odd_inputs: dict[str, str]) -> HealthRow:
    """Whether every odd input gives a finite vector that is not zero, twice the same."""
    problems = [f"{name}: {problem}" for name, problem in odd_inputs.items() if problem != "ok"]
    value = "; ".join(problems) or f"{len(odd_inputs)} of {len(odd_inputs)} embedded"
    return HealthRow("Odd inputs: " + ", ".join(odd_inputs), value, "finite, not zero, repeatable", not problems)


def check_reconstruction(groups: Sequence[Reconstruction]) -> list[HealthRow]:
    """What comes back of texts; nothing is expected, since it takes a training for it."""
    return [
        HealthRow(
            f"Reconstruction, {group.min_tokens} to {group.max_tokens} tokens",
            f"{group.exact_match:.0%} whole, chrF {group.chrf:.1f} ({group.num_texts} texts)",
            "high if trained for it, otherwise near 0 %",
        )
        for group in groups
    ]


# --------------------------------------------------------------------------------------------------------------------
# Vectors -> numbers


def unit_vectors(vectors: Vectors) -> Vectors:
    """Vectors of length 1; zero vectors stay zero. Shapes: ``(N, D)`` -> ``(N, D)``"""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def row_cosines(first: Vectors, second: Vectors) -> Vectors:
    """Cosine of each row with its counterpart. Shapes: ``(N, D)``, ``(N, D)`` -> ``(N,)``"""
    return (unit_vectors(first) * unit_vectors(second)).sum(axis=1)


def compare(first: Vectors, second: Vectors) -> Agreement:
    """How far two sets of vectors of the same texts agree. Shapes: ``(N, D)``, ``(N, D)``"""
    cosines = row_cosines(first, second)
    difference = np.abs(unit_vectors(first) - unit_vectors(second)).max()
    return Agreement(float(difference), float(cosines.min()), float(cosines.mean()))


def pair_cosines(vectors: Vectors) -> Vectors:
    """Cosine of each of the M = N (N - 1) / 2 pairs of rows. Shapes: ``(N, D)`` -> ``(M,)``"""
    unit = unit_vectors(vectors)
    return (unit @ unit.T)[np.triu_indices(len(unit), k=1)]


def singular_values(vectors: Vectors) -> Vectors:
    """Of the centred vectors, largest first; zeros if they are equal but for rounding. Shape: ``(min(N, D),)``"""
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    return values if values[0] > 1e-6 * np.linalg.norm(vectors) else np.zeros_like(values)


def effective_rank(values: Vectors) -> float:
    """exp of the entropy of singular values that sum to 1 (Roy and Vetterli 2007); 0 if all are 0. Shape: ``(S,)``"""
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def first_component_share(values: Vectors) -> float:
    """Share of the variance along the first principal component; 1 if there is none. Shape: ``(S,)``"""
    return float(values[0] ** 2 / (values**2).sum()) if values.any() else 1.0


def uniformity(cosines: Vectors) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit vectors (Wang and Isola 2020), given their cosines."""
    return float(np.log(np.exp(-2 * (2 - 2 * cosines)).mean()))


def measure_isotropy(vectors: Vectors) -> Isotropy:
    """How vectors of different texts fill their space, all pairs considered.

    Args:
        vectors: Finite and not zero. Shape: ``(N, D)``, N of 2 or more
    """
    cosines, values = pair_cosines(vectors), singular_values(unit_vectors(vectors))
    low, high = np.percentile(cosines, [1, 99])
    return Isotropy(
        mean_cosine=float(cosines.mean()),
        std_cosine=float(cosines.std()),
        low_cosine=float(low),
        high_cosine=float(high),
        effective_rank=effective_rank(values),
        max_rank=min(len(vectors) - 1, vectors.shape[1]),
        first_component=first_component_share(values),
        uniformity=uniformity(cosines),
    )


def is_bad(vectors: Vectors) -> NDArray[np.bool_]:
    """True for vectors that hold NaN or infinity, or are zero. Shapes: ``(N, D)`` -> ``(N,)``"""
    return np.logical_not(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))


# --------------------------------------------------------------------------------------------------------------------
# Model -> vectors


class _Encoder:
    """Encodes with one model, prompt and batch size, to float64 on the CPU."""

    def __init__(self, model: SentenceTransformer, prompt: str | None, batch_size: int) -> None:
        self.model, self.prompt, self.batch_size = model, prompt, batch_size

    def __call__(self, texts: Sequence[str], batch_size: int | None = None) -> Vectors:
        """Vectors of texts, batched by length as `encode` does. Shape: ``(N, D)``"""
        vectors: Any = self.model.encode(
            list(texts),
            prompt=self.prompt,
            batch_size=batch_size or self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu().double().numpy()

    def in_order(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, batched as they come, so that long and short ones are padded to each other."""
        starts = range(0, len(texts), self.batch_size)
        return np.concatenate([self(texts[start : start + self.batch_size]) for start in starts])


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
    encoder = _Encoder(model, prompt, batch_size)
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
    with _unchanged(model), tqdm(parts.items(), desc="Health", disable=not show_progress_bar) as progress:
        for name, measure in progress:
            progress.set_postfix_str(name)
            try:
                results[name] = measure()
            except _NotMeasuredError as error:
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


def measure_padding(encoder: _Encoder, texts: Sequence[str]) -> Agreement:
    """Vectors of texts in batches padded on the left against those padded on the right."""
    tokenizer = _tokenizer_of(encoder.model)
    vectors: dict[str, Vectors] = {}
    side_before = tokenizer.padding_side
    try:
        for side in ("left", "right"):
            tokenizer.padding_side = side
            with _reporting(f"padding on the {side} is refused"):
                vectors[side] = encoder.in_order(texts)
    finally:
        tokenizer.padding_side = side_before
    return compare(vectors["left"], vectors["right"])


def measure_bfloat16(encoder: _Encoder, texts: Sequence[str]) -> Agreement:
    """Vectors of the model with its weights in bfloat16 against those in float32; copies are cast where needed."""
    model = encoder.model
    if is_quantized(model):
        raise _NotMeasuredError("the weights are quantised, and cannot be cast")
    vectors = []
    with _reporting("no copy of the model could be cast and run"):
        for dtype in (torch.float32, torch.bfloat16):
            cast = model if weights_dtype(model) == dtype else cast_copy(model, dtype)
            vectors.append(_Encoder(cast, encoder.prompt, encoder.batch_size)(texts))
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


def measure_lengths(encoder: _Encoder, texts: Sequence[str], max_length: int) -> list[LengthHealth]:
    """Norms and cosines of texts concatenated and cut to growing lengths."""
    tokenizer, model = _tokenizer_of(encoder.model), encoder.model
    prompt = encoder.prompt if encoder.prompt is not None else model.prompts.get(model.default_prompt_name or "")
    num_added = model.preprocess(["a"], prompt=prompt)["input_ids"].shape[1] - 1
    limit = min(max_length, model.max_seq_length or max_length)
    stream = [
        token for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] for token in ids
    ]
    lengths = [length for length in row_lengths(limit) if length - num_added >= 4]
    if not lengths:
        raise _NotMeasuredError(
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
    encoder: _Encoder, tokenizer: PreTrainedTokenizerBase, stream: list[int], num_tokens: int, width: int
) -> LengthHealth:
    """One row of :func:`measure_lengths`: texts of ``width`` tokens make rows of ``num_tokens``."""
    decode: Any = tokenizer.decode
    rows, is_different = cut_stream(stream, width, NUM_LONG)
    texts = [decode(row, skip_special_tokens=True) for row in rows]
    halves = [decode(row[: width // 2], skip_special_tokens=True) for row in rows]
    batch_size = max(1, min(encoder.batch_size, encoder.batch_size * 128 // num_tokens))
    with _recorded_norms(encoder.model) as norms:
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


def measure_odd_inputs(encoder: _Encoder, texts: Sequence[str], max_length: int) -> dict[str, str]:
    """``"ok"`` for each odd input that gives a finite vector that is not zero, twice the same, or what is wrong."""
    words = " ".join(texts).split()
    long_text = " ".join(words[index % len(words)] for index in range(2 * max_length))
    return {name: judge_input(encoder, text) for name, text in {**ODD_TEXTS, "very long text": long_text}.items()}


def judge_input(encoder: Callable[[Sequence[str]], Vectors], text: str) -> str:
    """``"ok"``, or what is wrong with the vector of a text."""
    try:
        first, second = encoder([text]), encoder([text])
    except REFUSALS as error:
        return f"refused: {_first_line(error)}"
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
    ids = gem.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    groups = group_by_length(texts, [len(row) for row in ids])
    if not groups:
        raise _NotMeasuredError(f"no text has {RECONSTRUCTED_LENGTHS[-1]} tokens or fewer")
    with _reporting("this model cannot reconstruct"):
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


# --------------------------------------------------------------------------------------------------------------------
# Models


class _NotMeasuredError(Exception):
    """Why something is not measured."""


@contextlib.contextmanager
def _reporting(problem: str) -> Iterator[None]:
    """Turn what a model raises into a reason why something is not measured."""
    try:
        yield
    except (ImportError, *REFUSALS) as error:
        raise _NotMeasuredError(f"{problem}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@contextlib.contextmanager
def _unchanged(model: SentenceTransformer) -> Iterator[None]:
    """Put every module back into training mode, or out of it, at the end; `encode` switches all of them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def _recorded_norms(model: SentenceTransformer) -> Iterator[list[float]]:
    """Norms of the vectors that reach the first module that normalises; empty for a model without one."""
    norms: list[float] = []

    def record(module: nn.Module, inputs: tuple[dict[str, torch.Tensor], ...]) -> None:
        norms.extend(inputs[0]["sentence_embedding"].float().norm(dim=-1).tolist())

    first = next((module for module in model if _normalizes_vectors(module)), None)
    handles = [] if first is None else [first.register_forward_pre_hook(record)]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _normalizes_vectors(module: nn.Module) -> bool:
    return isinstance(module, Normalize) and module.module_input_name == "sentence_embedding"


def _tokenizer_of(model: SentenceTransformer) -> PreTrainedTokenizerBase:
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise _NotMeasuredError("the model has no tokenizer of transformers")
    return tokenizer


def weights_dtype(model: SentenceTransformer) -> torch.dtype:
    """The data type of most of a model's floating-point weights; float32 if it has none."""
    counts: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            counts[weight.dtype] += weight.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def is_quantized(model: SentenceTransformer) -> bool:
    """True if some weights are not floating-point numbers, or a transformers model says that it is quantised."""
    if any(getattr(module, "is_quantized", False) is True for module in model.modules()):
        return True
    return any(not weight.is_floating_point() for weight in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Text


def _series(values: Sequence[float | None]) -> str:
    """Numbers in a row, with as many digits as they need."""
    return ", ".join("-" if value is None else f"{value:.3g}" for value in values)


def _cell(text: str) -> str:
    """Text that leaves a markdown table whole."""
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """The same in types that json has; numbers that are not finite become None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
