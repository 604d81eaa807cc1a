"""Health of vectors: numbers computed by hand, and models broken on purpose that have to be found out."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize

from gem_st.evaluation.health import examine, measure_health
from gem_st.evaluation.health.encode import weights_dtype
from gem_st.evaluation.health.examine import (
    cast_copy,
    choose_texts,
    cut_stream,
    group_by_length,
    judge_input,
    mix_lengths,
    row_lengths,
)
from gem_st.evaluation.health.report import Health, check_agreement, check_lengths
from gem_st.evaluation.health.vectors import (
    Agreement,
    LengthHealth,
    compare,
    effective_rank,
    first_component_share,
    is_bad,
    measure_isotropy,
    pair_cosines,
    singular_values,
    uniformity,
)

from ..conftest import CORPUS

TEXTS = [*CORPUS, *(f"{first[:20]} {second[-25:]}" for first, second in itertools.pairwise(CORPUS))]
TEXTS += [f"{text} {CORPUS[0]}" for text in CORPUS[1:]]


@pytest.fixture(autouse=True)
def _less_to_do(monkeypatch):
    monkeypatch.setattr(examine, "NUM_LONG", 6)
    monkeypatch.setattr(examine, "RECONSTRUCTED_LENGTHS", (16, 24))


class Broken(Module):
    """Adds to the first element of every vector what a function makes of a batch's features."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        vectors = features["sentence_embedding"].clone()
        vectors[:, 0] += self.change(features)
        features["sentence_embedding"] = vectors
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def break_model(make_model):
    """Function that puts a :class:`Broken` behind a random GEM model."""
    return lambda change: SentenceTransformer(modules=[make_model()[0], Broken(change)], device="cpu")


def measure(model: SentenceTransformer, **kwargs: Any) -> Health:
    return measure_health(model, TEXTS, **{"max_length": 64, **kwargs})


def verdict(result: Health, name: str) -> bool | None:
    """Of the one row whose name holds ``name``."""
    return next(check.is_ok for check in result.checks() if name in check.name)


# ---- numbers


def test_effective_rank_of_known_matrices():
    equal = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert effective_rank(singular_values(equal)) == pytest.approx(2)
    uneven = equal * [2, 1]  # singular values in the proportion 2 to 1
    expected = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert effective_rank(singular_values(uneven + 7)) == pytest.approx(expected)  # centring takes 7 away
    assert first_component_share(singular_values(uneven)) == pytest.approx(4 / 5)
    same = np.full((5, 3), 0.3) + 1e-9 * np.eye(5, 3)
    assert effective_rank(singular_values(same)) == 0
    assert first_component_share(singular_values(same)) == 1


def test_isotropy_of_known_vectors():
    vectors = np.array([[2.0, 0], [0, 1], [-3, 0]])  # cosines 0, -1, 0; squared distances 2, 4, 2
    isotropy = measure_isotropy(vectors)
    assert isotropy.mean_cosine == pytest.approx(-1 / 3)
    assert isotropy.std_cosine == pytest.approx(math.sqrt(2) / 3)
    assert (isotropy.low_cosine, isotropy.high_cosine) == (pytest.approx(-0.98), 0)  # interpolated
    assert isotropy.uniformity == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert isotropy.max_rank == 2
    assert uniformity(np.ones(3)) == 0


def test_agreement_is_that_of_unit_vectors():
    first, second = np.array([[1.0, 0], [0, 2]]), np.array([[5.0, 0], [2, 2]])
    agreement = compare(first, second)
    root = math.sqrt(0.5)
    assert agreement == pytest.approx((root, root, (1 + root) / 2))
    assert compare(first, first * 3) == pytest.approx((0, 1, 1))
    assert compare(np.zeros((1, 2)), first[:1]).min_cosine == 0


def test_bad_vectors_are_counted():
    vectors = np.array([[1, 0], [0, 0], [math.nan, 1], [1, -math.inf], [-1, 2]])
    assert is_bad(vectors).tolist() == [False, True, True, True, False]


def test_lengths_and_the_text_they_are_made_of():
    assert row_lengths(100) == [16, 32, 64, 100]
    assert row_lengths(64) == [16, 32, 64]
    assert row_lengths(10) == [10]
    assert cut_stream([0, 1, 2, 3, 4, 5], 3, 2) == ([[0, 1, 2], [3, 4, 5]], True)
    assert cut_stream([0, 1, 2, 3], 3, 2) == ([[0, 1, 2], [2, 3, 0]], False)
    groups = group_by_length(["a", "b", "c", "d"], [16, 17, 25, 1])
    assert groups == {(1, 16): ["a", "d"], (17, 24): ["b"]}


def test_checks_of_lengths():
    row = LengthHealth(16, norm=1.0, repeated=0.9, half=0.8, pairs=0.3, is_finite=True)
    longer = row._replace(num_tokens=32, norm=1.5, pairs=0.4)
    assert [check.is_ok for check in check_lengths([row, longer])] == [True, True, True, True]
    longer = longer._replace(norm=2.5, half=0.55, pairs=0.6)
    assert [check.is_ok for check in check_lengths([row, longer])] == [False, True, False, False]
    unknown = [row._replace(pairs=None), longer._replace(pairs=None, norm=1.0)]
    assert [check.is_ok for check in check_lengths(unknown)] == [True, None, None, None]
    assert check_lengths([row, longer._replace(norm=math.nan)])[0].is_ok is False
    assert check_lengths([row, row._replace(is_finite=False)])[0].is_ok is False


def test_lower_precision_is_judged_by_cosines():
    agreement = Agreement(max_difference=0.01, min_cosine=0.995, mean_cosine=0.999)
    assert check_agreement("", agreement, is_exact=True).is_ok is False
    assert check_agreement("", agreement, is_exact=False).is_ok is True
    assert check_agreement("", agreement._replace(min_cosine=math.nan), is_exact=False).is_ok is False


# ---- models


@pytest.mark.parametrize("settings", [{}, {"num_gem_tokens": 4, "freeze_base": True}])
def test_a_gem_model_is_exact(make_model, settings):
    model = make_model(**settings)
    result = measure(model)
    assert result.not_measured == {}
    assert result.batches.max_difference < 1e-5
    assert result.padding.max_difference < 1e-5
    assert 0.9 < result.bfloat16.min_cosine < 1
    assert result.num_bad == 0
    assert set(result.odd_inputs.values()) == {"ok"}
    assert [row.num_tokens for row in result.lengths] == [16, 32, 64]
    assert result.lengths[0].pairs is not None
    assert all(row.is_finite and row.norm > 0 and row.half < row.repeated for row in result.lengths)
    assert [group[:3] for group in result.reconstruction] == [(1, 16, 2), (17, 24, 13)]
    unit = model.encode(list(dict.fromkeys(TEXTS)), normalize_embeddings=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    assert result.isotropy.mean_cosine == pytest.approx(cosines.mean(), abs=1e-5)


def test_the_norm_is_that_before_normalisation(make_model):
    plain = make_model()
    normalised = SentenceTransformer(modules=[plain[0], Normalize()], device="cpu")
    lengths = [[row._replace(repeated=0, half=0, pairs=0) for row in measure(m).lengths] for m in (plain, normalised)]
    for first, second in zip(*lengths, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
        assert abs(first.norm - 1) > 0.5
    assert not normalised[1]._forward_pre_hooks


def test_a_plain_model_has_no_gem_parts(make_base):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(make_base("gpt_neo")))
    transformer.tokenizer.pad_token = "<eos>"
    result = measure(SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu"))
    assert result.reconstruction is None
    assert "reconstruction" not in result.not_measured
    assert "Reconstruction" not in result.to_markdown()
    assert result.batches.max_difference < 1e-5
    assert result.lengths is not None


def test_vectors_that_depend_on_the_batch_are_found(break_model):
    result = measure(break_model(lambda features: 0.1 * len(features["input_ids"])))
    assert verdict(result, "Batches of 1") is False
    assert verdict(result, "Left padding") is True
    assert not result.is_ok
    assert "| **look at it** |" in next(line for line in result.to_markdown().splitlines() if "Batches of 1" in line)


def test_vectors_that_depend_on_padding_are_found(break_model):
    result = measure(break_model(lambda features: 10.0 * (features["attention_mask"][:, 0] == 0)))
    assert verdict(result, "Left padding") is False
    assert verdict(result, "Batches of 1") is True  # which are padded on the right


def test_a_side_that_is_refused_is_named_and_the_tokenizer_is_as_before(break_model):
    def refuse(features: dict[str, Any]) -> float:
        if (features["attention_mask"][:, 0] == 0).any():
            raise ValueError("only right padding here\nsecond line")
        return 0.0

    model = break_model(refuse)
    result = measure(model)
    assert result.padding is None
    assert result.not_measured["padding"] == "padding on the left is refused: ValueError: only right padding here"
    assert verdict(result, "Left padding") is None
    assert model.tokenizer.padding_side == "right"


def test_bad_vectors_are_found_and_json_stays_valid(break_model):
    def spoil(features: dict[str, Any]) -> torch.Tensor:
        length = features["attention_mask"].sum(dim=1)
        return torch.where(length > 20, math.nan, 0.0)

    result = measure(break_model(spoil))
    assert 0 < result.num_bad < result.num_texts
    assert verdict(result, "not finite, or zero") is False
    assert verdict(result, "Norm before") is False
    assert verdict(result, "Odd inputs") is False
    assert result.odd_inputs["empty text"] == "ok"
    assert result.odd_inputs["very long text"] == "not finite"
    assert math.isfinite(result.isotropy.mean_cosine)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["batches"]["max_difference"] is None
    assert written["is_ok"] is False
    all_bad = measure(break_model(lambda features: math.nan))
    assert all_bad.isotropy is None
    assert "not measured: there are not two" in all_bad.to_markdown()


def test_equal_vectors_are_found(break_model):
    result = measure(break_model(lambda features: 1e4))
    assert [verdict(result, name) for name in ("Cosine of pairs", "Uniformity")] == [False, False]


def test_odd_inputs_are_judged():
    calls = iter([1.0, 2.0])
    cases = {
        "ok": lambda texts: np.ones((1, 2)),
        "zero vector": lambda texts: np.zeros((1, 2)),
        "not finite": lambda texts: np.array([[1, math.nan]]),
        "changes from call to call": lambda texts: np.full((1, 2), next(calls)),
    }
    for expected, encode in cases.items():
        assert judge_input(encode, "") == expected

    def refuse(texts: list[str]) -> np.ndarray:
        raise IndexError("no tokens")

    assert judge_input(refuse, "") == "refused: IndexError: no tokens"


def test_the_model_is_left_as_it_was(make_model):
    model = make_model(freeze_base=True)
    model.train()
    model.tokenizer.padding_side = "left"
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    random_state = torch.get_rng_state()
    measure(model)
    model[0].forward = lambda features: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.tokenizer.padding_side == "left"
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == {
        name: weight.dtype for name, weight in weights.items()
    }
    assert torch.equal(random_state, torch.get_rng_state())


def test_padding_side_is_restored_after_an_error(break_model):
    def fail(features: dict[str, Any]) -> float:
        if (features["attention_mask"][:, 0] == 0).any():
            raise KeyboardInterrupt
        return 0.0

    model = break_model(fail)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        measure(model)
    assert model.tokenizer.padding_side == "right"
    assert model.training


def test_a_copy_is_what_a_load_in_bfloat16_gives(make_model):
    """Base in bfloat16, LoRA in float32, buffers as they were, and one set of weights for base and adapter."""
    model = make_model(freeze_base=True)
    cast = cast_copy(model, torch.bfloat16)
    loaded = make_model(freeze_base=True, model_kwargs={"dtype": "bfloat16"})
    loaded[0].load_state_dict(model[0].state_dict())
    assert weights_dtype(cast) == torch.bfloat16
    assert {weight.dtype for name, weight in cast.named_parameters() if "lora_" in name} == {torch.float32}
    assert {buffer.dtype for buffer in cast.buffers() if buffer.is_floating_point()} == {torch.float32}
    shared = {id(weight) for weight in cast[0].model.parameters()}
    assert shared < {id(weight) for weight in cast[0].adapter_model.parameters()}
    assert not shared & {id(weight) for weight in model.parameters()}
    ours, theirs = (m.encode(TEXTS, convert_to_tensor=True) for m in (cast, loaded))
    assert torch.equal(ours, theirs)


def test_quantised_weights_are_not_cast(make_model):
    model = make_model()
    model[0].model.is_quantized = True
    result = measure(model)
    assert result.bfloat16 is None
    assert "not measured: the weights are quantised" in result.to_markdown()


def test_a_model_in_bfloat16_is_judged_as_one(make_model):
    result = measure(make_model(model_kwargs={"dtype": "bfloat16"}))
    assert result.dtype == "bfloat16"
    assert result.bfloat16.min_cosine > 0.9
    assert "cosine from" in next(check.expected for check in result.checks() if "Batches" in check.name)


def test_prompts_are_part_of_every_text(make_model):
    model = make_model()
    without = measure(model).to_dict()
    prompt = "The village by the sea: "
    model.prompts, model.default_prompt_name = {"sea": prompt}, "sea"
    result = measure(model)
    assert result.isotropy.mean_cosine != without["isotropy"]["mean_cosine"]
    assert measure(model, prompt="").to_dict() == without  # to the last digit
    cosines = pair_cosines(model.encode([prompt + text for text in set(TEXTS)], prompt="").astype(float))
    assert result.isotropy.mean_cosine == pytest.approx(cosines.mean(), abs=1e-5)


def test_another_seed_draws_other_texts():
    texts = [f"text {index}" for index in range(40)]
    drawn = [choose_texts(texts, 20, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20


def test_texts_of_equal_length_are_mixed():
    texts = [f"word {index:02d} and more" for index in range(6)]
    mixed = mix_lengths(texts)
    assert mixed[0] == texts[0][:8]
    assert mixed[1] == texts[1]
    assert mixed[5] == f"{texts[5]} {texts[0]}"


def test_bad_input_is_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"At least 16 different texts are needed, got 2 \(of 40"):
        measure_health(model, ["a", "b", " ", ""] * 10)
    with pytest.raises(ValueError, match="got 0"):
        measure_health(model, [])
    with pytest.raises(ValueError, match="list of strings"):
        measure_health(model, "one text")
    with pytest.raises(ValueError, match="list of strings"):
        measure_health(model, [*TEXTS, None])
    with pytest.raises(ValueError, match="batch_size must be 2 or more"):
        measure_health(model, TEXTS, batch_size=1)
    with pytest.raises(ValueError, match="num_texts must be 16 or more"):
        measure_health(model, TEXTS, num_texts=3)
