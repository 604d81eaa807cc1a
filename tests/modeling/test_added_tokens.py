"""Tokens that are added to the tokenizer once the model is made, whose ids may be those of GEM tokens."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_st import GemLoss, GemTransformer, hub

from ..conftest import CORPUS, build_tokenizer

TEXTS = ["It rained", CORPUS[0]]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
MODELS = {
    "full, grown": {"num_gem_tokens": 3},
    "full, rows to spare": {"num_gem_tokens": 2, "vocab_size": 408},
    "frozen": {"num_gem_tokens": 3, "freeze_base": True},
    "frozen, one": {"freeze_base": True},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_padding_token_works_as_it_is_never_read(make_model, tmp_path, settings):
    model = make_model(**settings)
    gem = model[0]
    vectors, texts = model.encode(TEXTS, convert_to_tensor=True), gem.generate(TEXTS, **GREEDY)
    gem.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert gem.tokenizer.pad_token_id in gem.gem_token_ids
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), vectors, atol=0, rtol=0)
    assert gem.generate(TEXTS, **GREEDY) == gem.generate(TEXTS, **GREEDY, pad_token_id=400) == texts
    cache = gem.prefill(TEXTS)
    torch.testing.assert_close(gem.embed(cache), vectors, atol=1e-5, rtol=1e-5)
    assert gem.generate(cache=cache, **GREEDY) == texts
    assert not torch.isin(gem.preprocess(TEXTS)["input_ids"][:, :3], torch.tensor(gem.gem_token_ids)).any()
    assert GemLoss(model, alpha=0.5)([gem.preprocess(CORPUS[:3])]).isfinite()

    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert loaded.tokenizer.pad_token == "[PAD]"
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), vectors)


def add_tokens(tokenizer):
    tokenizer.add_tokens(["[PAD]", "<new>"])


def add_end_token(tokenizer):
    tokenizer.eos_token = "</new>"
    tokenizer.add_special_tokens({"eos_token": "</new>"})
    tokenizer.add_bos_token = tokenizer.add_eos_token = True


CHANGES = {"tokens": (add_tokens, "a [PAD] b"), "an end token of the template": (add_end_token, "It rained")}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_other_tokens_are_refused_where_a_text_holds_one(make_model, settings, change, text):
    model = make_model(**settings)
    gem = model[0]
    expected, cache = model.encode("It rained"), gem.prefill("It rained")
    change(gem.tokenizer)
    if text != "It rained":
        assert (model.encode("It rained") == expected).all()
    message = r"Input 0 of 1 holds the token '.*', whose id 40\d is that of a GEM token: it was added to the tokenizer"
    for read in (model.encode, gem.prefill, gem.compress, gem.generate):
        with pytest.raises(ValueError, match=message):
            read([text])
    if text != "It rained":
        with pytest.raises(ValueError, match=message):
            gem.extend(cache, text)


def test_a_tokenizer_with_more_tokens_than_rows(make_model):
    gem = make_model()[0]
    gem.tokenizer = build_tokenizer(num_reserved=5)
    with pytest.raises(ValueError, match=r"Input 1 of 2 holds the token '<.reserved_special_token_4.>'.* vocabulary"):
        gem.preprocess(["fine", "a <|reserved_special_token_4|>"])


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_what_could_not_be_read_again_is_not_saved(make_model, tmp_path, settings):
    model = make_model(**settings)
    model.tokenizer.add_tokens([f"<new {index}>" for index in range(9)])
    with pytest.raises(ValueError, match="produces ids up to 408, but the model has only"):
        model.save_pretrained(str(tmp_path))


def test_a_frozen_base_is_not_saved_with_a_tokenizer_that_adapters_of_it_do_not_know(make_model, tmp_path):
    model = make_model(freeze_base=True, vocab_size=408)
    model.tokenizer.add_tokens(["<new>"])  # a row to spare
    with pytest.raises(ValueError, match="since it was loaded, on the disk or by tokens added to its tokenizer"):
        model.save_pretrained(str(tmp_path))


def test_a_base_that_was_given_a_padding_token_and_no_row_for_it(make_base, tmp_path):
    for file in make_base().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    for freeze_base in (False, True):
        vectors = []
        for base in (tmp_path, make_base()):
            torch.manual_seed(0)
            gem = GemTransformer(str(base), freeze_base=freeze_base)
            vectors.append(SentenceTransformer(modules=[gem], device="cpu").encode(TEXTS, convert_to_tensor=True))
        torch.testing.assert_close(*vectors)


def test_a_stock_export_spells_no_gem_token(make_model, tmp_path):
    model = make_model(num_reserved=0)
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    hub.export(model, tmp_path / "stock", format="stock")
    stock = SentenceTransformer(str(tmp_path / "stock" / "embedding"), device="cpu")
    torch.testing.assert_close(stock.encode(TEXTS, convert_to_tensor=True), vectors)
    assert stock.preprocess(["a [PAD] b"])["input_ids"][0].tolist().count(model[0].gem_token_ids[0]) == 1
