"""Vocabulary rows for the GEM tokens, and from text to token ids."""

from __future__ import annotations

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st import GemTransformer


def test_padding_rows_of_the_embedding_come_first(make_model):
    gem = make_model(vocab_size=420, num_reserved=8, num_gem_tokens=3)[0]
    last_id = max(gem.tokenizer.get_vocab().values())
    assert gem.gem_token_source == "padding"
    assert gem.gem_token_ids == [last_id + 1, last_id + 2, last_id + 3]
    assert gem.model.config.vocab_size == 420


def test_reserved_tokens_are_taken_from_the_end(make_model):
    gem = make_model(num_reserved=8, num_gem_tokens=2)[0]
    assert gem.gem_token_source == "reserved"
    assert gem.tokenizer.convert_ids_to_tokens(gem.gem_token_ids) == [
        "<|reserved_special_token_6|>",
        "<|reserved_special_token_7|>",
    ]


def test_rows_that_mean_padding_are_left_alone(make_base, tmp_path):
    for file in make_base(num_reserved=8).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = "<|reserved_special_token_7|>"
    tokenizer.save_pretrained(tmp_path)
    gem = GemTransformer(str(tmp_path), num_gem_tokens=2, config_kwargs={"pad_token_id": tokenizer.pad_token_id - 1})
    assert gem.tokenizer.convert_ids_to_tokens(gem.gem_token_ids) == [
        "<|reserved_special_token_4|>",
        "<|reserved_special_token_5|>",
    ]


def test_otherwise_the_embedding_grows(make_model):
    gem = make_model(num_gem_tokens=2)[0]
    num_tokens = max(gem.tokenizer.get_vocab().values()) + 1
    assert gem.gem_token_source == "grown"
    assert gem.gem_token_ids == [num_tokens, num_tokens + 1]
    assert gem.model.config.vocab_size == gem.model.get_output_embeddings().weight.shape[0] == num_tokens + 2


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_near_the_mean_and_differ_and_nothing_else_moves(make_base, tied):
    path = make_base(tie_word_embeddings=tied)
    base = AutoModelForCausalLM.from_pretrained(path)
    gem = GemTransformer(str(path), num_gem_tokens=3)
    for old, new in (
        (base.get_input_embeddings().weight, gem.model.get_input_embeddings().weight),
        (base.get_output_embeddings().weight, gem.model.get_output_embeddings().weight),
    ):
        assert torch.equal(new[: len(old)], old)
        rows = new[len(old) :]
        assert len(rows) == 3
        typical = (old - old.mean(0)).norm(dim=1).mean()
        assert ((rows - old.mean(0)).norm(dim=1) < 0.2 * typical).all()
        assert torch.pdist(rows).min() > 0


def test_new_rows_are_reproducible_under_a_seed(make_base):
    def rows(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        gem = GemTransformer(str(make_base()), num_gem_tokens=2)
        return gem.model.get_input_embeddings().weight[gem.gem_token_ids]

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_gem_tokens_follow_the_text_and_truncation_keeps_them(make_model):
    model = make_model(num_gem_tokens=3, max_seq_length=8)
    gem = model[0]
    whole = gem.tokenizer("Once upon a time there was a small village by the sea.")["input_ids"]
    features = model.preprocess(["Once upon a time there was a small village by the sea.", ""])
    assert sorted(features) == ["attention_mask", "input_ids"]
    assert features["input_ids"][0].tolist() == whole[:5] + gem.gem_token_ids
    assert features["input_ids"][1][:4].tolist() == [0, *gem.gem_token_ids]
    assert features["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]


def test_left_padding_as_the_tokenizer_asks(make_model):
    model = make_model(processor_kwargs={"padding_side": "left"})
    features = model.preprocess(["It rained all day.", ""])
    assert features["attention_mask"][1].tolist() == [0] * (features["input_ids"].shape[1] - 2) + [1, 1]
    assert features["input_ids"][1, -1] == model[0].gem_token_ids[0]


def test_a_text_of_a_hundred_thousand_characters_is_truncated(make_model):
    model = make_model(num_gem_tokens=2)
    vector, longer = model.encode(["word " * 20_000, "word " * 30_000], convert_to_tensor=True)
    assert model.preprocess(["word " * 20_000])["input_ids"].shape[1] == model.max_seq_length == 256
    assert torch.equal(vector, longer)
    assert vector.norm() > 0


def test_the_name_of_a_gem_token_in_a_text_is_ordinary_text(make_model):
    model = make_model(num_reserved=4, num_gem_tokens=2)
    gem = model[0]
    name = gem.tokenizer.convert_ids_to_tokens(gem.gem_token_ids[0])
    assert gem.tokenizer(name)["input_ids"][1:] == gem.gem_token_ids[:1]  # the base's tokenizer would inject it
    ids = model.preprocess([f"a {name} b", name * 3])["input_ids"]
    assert torch.isin(ids, torch.tensor(gem.gem_token_ids)).sum(1).tolist() == [2, 2]
    assert ids.shape[1] > 10  # the name is spelled out
    vectors = model.encode([f"a {name} b", "a b"])
    assert abs(vectors[0] - vectors[1]).max() > 1e-4


def test_prompts_are_put_before_the_text(make_base):
    gem = GemTransformer(str(make_base()))
    model = SentenceTransformer(modules=[gem], prompts={"query": "find: ", "document": "text: "})
    text = "bread at the market"
    torch.testing.assert_close(model.encode_query(text), model.encode("find: " + text))
    torch.testing.assert_close(model.encode_document(text), model.encode("text: " + text))
    torch.testing.assert_close(model.encode(text, prompt_name="query"), model.encode("find: " + text))
    torch.testing.assert_close(model.encode(text, prompt="text: "), model.encode("text: " + text))
    assert abs(model.encode_query(text) - model.encode_document(text)).max() > 1e-4


def test_max_seq_length_is_a_setting_of_the_model(make_model):
    model = make_model()
    model.max_seq_length = 12
    assert model[0].max_seq_length == 12
    assert model.preprocess(["word " * 100])["input_ids"].shape == (1, 12)


def test_embedding_dimension_by_pooling(make_model):
    assert make_model(num_gem_tokens=3).get_embedding_dimension() == 32
    model = make_model(num_gem_tokens=3, pooling="concat")
    assert model.get_embedding_dimension() == 96
    assert model.encode("It rained.").shape == (96,)


@pytest.mark.parametrize("source", ["padding", "reserved", "grown"])
def test_the_saved_tokenizer_is_the_bases(make_base, tmp_path, source):
    arguments = {"padding": {"vocab_size": 420}, "reserved": {"num_reserved": 4}, "grown": {}}[source]
    base = make_base(**arguments)
    model = SentenceTransformer(modules=[GemTransformer(str(base), num_gem_tokens=2)])
    assert model[0].gem_token_source == source
    model.encode("a text, tokenised with truncation")
    model.save_pretrained(str(tmp_path))
    saved, original = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(base)
    assert saved("hi") == original("hi")
    assert saved.get_vocab() == original.get_vocab()
    assert saved.special_tokens_map == original.special_tokens_map
    files = [json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path, base)]
    assert files[0] == files[1]
