"""What was found, and what is expected of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .vectors import Agreement, Isotropy, LengthHealth, Reconstruction

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
