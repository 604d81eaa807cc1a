"""Many rows are read and written a batch at a time; what comes back is in their order, as of each alone."""

from __future__ import annotations

import pytest
import torch

from gem_st.modeling.gem_batches import split_rows

from ..conftest import CORPUS

GREEDY = {"max_new_tokens": 5, "do_sample": False}
TEXTS = [f"{text[: 3 + 7 * index % 50]} {index}" for index, text in enumerate(CORPUS * 3)]


@pytest.fixture
def gem_and_rows(make_model):
    """A module, and how many rows each pass of its model had."""
    gem, seen = make_model(num_gem_tokens=2)[0], []
    gem.model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    return gem, seen


def test_rows_of_like_length_are_together_and_in_order():
    assert split_rows([5, 1, 4, 2, 9], 2) == [[0, 4], [2, 3], [1]]
    assert split_rows([5, 1, 4], 3) == [[0, 1, 2]]
    assert split_rows([], 3) == []


@pytest.mark.parametrize("source", ["prompts", "cache"])
def test_generate_gives_of_each_row_what_it_gives_alone(gem_and_rows, source):
    gem, seen = gem_and_rows
    alone = [gem.generate(text, **GREEDY) for text in TEXTS]
    given = {"prompts": TEXTS} if source == "prompts" else {"cache": gem.prefill(TEXTS)}
    seen.clear()
    assert gem.generate(**given, **GREEDY, batch_size=5) == alone
    assert max(seen) == 5
    texts, cache = gem.generate(**given, **GREEDY, batch_size=7, return_cache=True)
    assert texts == alone
    ids = [row[mask] for row, mask in zip(cache.input_ids, cache.attention_mask, strict=True)]
    for row, prompt in zip(ids, gem.base.text.encode(TEXTS), strict=True):
        assert row[: len(prompt)].tolist() == prompt
    expected = gem.embedder.embed_ids([row.tolist() for row in ids])
    torch.testing.assert_close(gem.embed(cache), expected, atol=1e-5, rtol=1e-5)


def test_max_length_does_not_depend_on_the_size_of_batches(gem_and_rows):
    gem, _ = gem_and_rows
    options = {"max_length": 30, "do_sample": False, "eos_token_id": None}
    whole = gem.generate(TEXTS[:6], **options, batch_size=6)
    assert gem.generate(TEXTS[:6], **options, batch_size=2) == whole
    inputs = gem.base.text.pad([torch.tensor(row) for row in gem.base.text.encode(TEXTS[:6])], "left")
    stock = gem.model.generate(**inputs, **options, pad_token_id=1)
    assert whole == [gem.base.text.decode_continuation(row, inputs["input_ids"].shape[1]) for row in stock]


def test_a_cache_without_rows(gem_and_rows):
    gem, _ = gem_and_rows
    empty = gem.prefill(TEXTS[:1])[:0]
    for read in (gem.embed, gem.compress, lambda cache: gem.extend(cache, []), lambda cache: gem.generate(cache=cache)):
        with pytest.raises(ValueError, match=r"no rows|nothing to read"):
            read(empty)


def test_several_sequences_of_a_row_stay_together(gem_and_rows):
    gem, _ = gem_and_rows
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "batch_size": 5}
    texts = gem.generate(TEXTS, **options)
    assert texts == [text for prompt in TEXTS for text in gem.generate(prompt, **options)]
    options = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "return_cache": True}
    torch.manual_seed(0)
    texts, cache = gem.generate(TEXTS, **options, batch_size=5)
    assert len(texts) == len(cache) == 2 * len(TEXTS)
    for index, row in enumerate(gem.base.text.encode(TEXTS)):
        for copy in cache[[2 * index, 2 * index + 1]].split():
            assert copy.input_ids[copy.attention_mask][: len(row)].tolist() == row


def test_options_that_know_rows_know_the_right_ones(gem_and_rows):
    gem, _ = gem_and_rows
    allowed = [[60 + index] for index in range(len(TEXTS))]
    texts = gem.generate(TEXTS, **GREEDY, batch_size=5, prefix_allowed_tokens_fn=lambda row, ids: allowed[row])
    assert texts == [gem.tokenizer.decode(ids * 5) for ids in allowed]


def test_prefill_compress_and_reconstruct(gem_and_rows):
    gem, seen = gem_and_rows
    whole, memory = gem.prefill(TEXTS, batch_size=100), gem.compress(TEXTS, batch_size=100)
    written = gem.reconstruct(memory, batch_size=100)
    seen.clear()
    cache = gem.prefill(TEXTS, batch_size=5)
    assert cache.input_ids[cache.attention_mask].tolist() == whole.input_ids[whole.attention_mask].tolist()
    assert cache.lengths.tolist() == whole.lengths.tolist()
    torch.testing.assert_close(gem.embed(cache), gem.embed(whole), atol=1e-5, rtol=1e-5)
    seen.clear()
    parts = gem.compress(TEXTS, batch_size=5)
    for name, tensor in parts.tensors().items():
        torch.testing.assert_close(tensor, memory.tensors()[name], atol=1e-5, rtol=1e-5)
    assert gem.reconstruct(parts, batch_size=5) == written
    assert max(seen) == 5


@pytest.mark.parametrize("batch_size", [0, 2.5, True])
def test_a_batch_size_that_is_none(make_model, batch_size):
    gem = make_model()[0]
    for call in (gem.generate, gem.prefill, gem.compress):
        with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more"):
            call(TEXTS, batch_size=batch_size)
