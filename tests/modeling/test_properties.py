"""What holds for every text, batch and setting, looked for by Hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPELLED = ["<bos>", "<eos>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<gem>", "<|gem_0|>"]
ODD = [
    "", " ", "\n\n", "\0", "a\0b", "\u200b", "\ufeff", "\u202eabc\u202c",
    "שלום עולם", "مرحبا", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301\u0301", "ﷺ", "𝔾𝔼𝕄",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=40),
        st.sampled_from(ODD),
        st.lists(st.sampled_from([*SPELLED, *ODD, "word ", "The old clock"]), max_size=6).map("".join),
    ),
    min_size=1,
    max_size=6,
)
SETUPS = [(freeze_base, k) for freeze_base in (True, False) for k in (1, 3)]
EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOLERANCE = 2e-5
"""Of a component of a vector of length 1, in float32."""


@pytest.fixture(params=SETUPS, ids=lambda setup: f"{'frozen' if setup[0] else 'full'}-{setup[1]}")
def model(request, make_model):
    freeze_base, num_gem_tokens = request.param
    return make_model(freeze_base=freeze_base, num_gem_tokens=num_gem_tokens, num_reserved=4)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@EXAMPLES
@given(
    texts=TEXTS,
    prompt=st.sampled_from(["", "query: ", "<bos>", "👩‍👩‍👧"]),
    padding_side=st.sampled_from(["left", "right"]),
    max_seq_length=st.integers(8, 64),
    batch_size=st.integers(1, 6),
)
def test_a_text_has_one_vector(model, texts, prompt, padding_side, max_seq_length, batch_size):
    model.max_seq_length, model.tokenizer.padding_side = max_seq_length, padding_side
    together = model.encode(texts, prompt=prompt, batch_size=batch_size)
    assert together.shape == (len(texts), 32)
    assert np.isfinite(together).all()
    for text, vector in zip(texts, together, strict=True):
        alone = model.encode(prompt + text)
        np.testing.assert_allclose(unit(vector), unit(alone), atol=TOLERANCE)


@EXAMPLES
@given(texts=TEXTS, max_seq_length=st.integers(8, 64))
def test_rows_end_in_all_gem_tokens_and_hold_no_other(model, texts, max_seq_length):
    model.max_seq_length = max_seq_length
    gem = model[0]
    features = model.preprocess(texts)
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        row = ids[mask.bool()].tolist()
        assert len(row) <= max_seq_length
        assert row[-gem.num_gem_tokens :] == gem.gem_token_ids
        assert not {*gem.gem_token_ids} & {*row[: -gem.num_gem_tokens]}


@EXAMPLES
@given(texts=TEXTS, max_seq_length=st.integers(8, 64))
def test_a_cache_gives_the_vectors_of_encode(model, texts, max_seq_length):
    model.max_seq_length = max_seq_length
    cached = model[0].embed(model[0].prefill(texts)).numpy()
    np.testing.assert_allclose(unit(cached), unit(model.encode(texts)), atol=TOLERANCE)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_a_megabyte_and_thousands_of_nothing(make_model, freeze_base):
    model = make_model(freeze_base=freeze_base, num_gem_tokens=2, max_seq_length=64)
    long = "The old clock on the wall had stopped. " * 27_000
    vectors = model.encode([long, *[""] * 3000], convert_to_tensor=True)
    torch.testing.assert_close(vectors[0], model.encode(long[:4000], convert_to_tensor=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors[1:], vectors[1:2].expand(3000, -1), atol=1e-5, rtol=1e-4)
