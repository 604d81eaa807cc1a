"""No option is taken and ignored: it is honoured, or refused with what there is instead."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer

from ..conftest import CORPUS

LONG = " ".join(CORPUS)


def embed_first(model: SentenceTransformer, num_tokens: int) -> torch.Tensor:
    """What the first tokens of the long text give, by the model's own parts."""
    ids = model.tokenizer(LONG)["input_ids"][: num_tokens - model[0].num_gem_tokens]
    return model[0].embedder.embed_ids([ids])


@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize(
    "text", [{"max_length": 16}, {"max_length": 16, "truncation": True}, {"max_length": 16, "padding": True}]
)
def test_the_length_of_one_call(make_model, freeze_base, text):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base)
    with torch.no_grad():
        expected, whole = embed_first(model, 16), embed_first(model, 256)
    encode = {"convert_to_tensor": True, "processing_kwargs": {"text": text}}
    torch.testing.assert_close(model.encode([LONG], **encode), expected, atol=1e-5, rtol=1e-4)
    assert (expected - whole).abs().max() > 1e-3
    assert model.preprocess([LONG], processing_kwargs={"text": text})["input_ids"].shape == (1, 16)
    assert model[0].preprocess([LONG], max_length=16)["input_ids"].shape == (1, 16)
    torch.testing.assert_close(model.encode([LONG], convert_to_tensor=True), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"text": {"truncation": False}},
        {"text": {"padding": "max_length", "max_length": 16}},
        {"text": {"add_special_tokens": False}},
        {"text": {"padding_side": "left"}},
        {"common": {"return_tensors": "np"}},
        {"image": {"size": 3}},
        {"chat_template": {"enable_thinking": False}},
    ],
    ids=str,
)
def test_other_options_of_processors_are_refused(make_model, options):
    with pytest.raises(ValueError, match="of options there is max_length"):
        make_model().encode([LONG], processing_kwargs=options)


@pytest.mark.parametrize("options", [{"truncation": False}, {"padding_side": "left"}, {"max_seq_length": 3}])
def test_other_options_of_preprocess_are_refused(make_model, options):
    with pytest.raises(ValueError, match="of options there is max_length"):
        make_model()[0].preprocess([LONG], **options)


def test_what_sentence_transformers_passes_to_every_module_is_taken(make_model):
    model = make_model()
    expected = model.preprocess([LONG])["input_ids"]
    for options in ({"task": "query"}, {"modality": "text"}, {"processing_kwargs": {}}, {"anything": None}):
        assert torch.equal(model[0].preprocess([LONG], **options)["input_ids"], expected)


@pytest.mark.parametrize("max_length", [0, 2, 257, 16.0, "16"])
def test_a_length_that_cannot_be_is_refused(make_model, max_length):
    gem = make_model()[0]
    for use in (gem.preprocess, gem.prefill):
        with pytest.raises(ValueError, match="and at most the model's context of 256 tokens"):
            use([LONG], max_length=max_length)
    with pytest.raises(ValueError, match="of options there is max_length"):
        gem.preprocess([LONG], max_length=8, processing_kwargs={"text": {"max_length": 16}})


def test_a_tokenizers_own_length_is_the_models(make_model, tmp_path):
    make_model().save_pretrained(str(tmp_path))
    options = {"trust_remote_code": True, "device": "cpu"}
    assert SentenceTransformer(str(tmp_path), **options).max_seq_length == 256
    shorter = SentenceTransformer(str(tmp_path), processor_kwargs={"model_max_length": 20}, **options)
    assert shorter.max_seq_length == 20
    assert shorter.preprocess([LONG])["input_ids"].shape == (1, 20)


def test_settings_of_a_checkpoint_are_not_asked_for_otherwise(make_model, tmp_path):
    make_model(freeze_base=True).save_pretrained(str(tmp_path))
    for options in ({"lora_rank": 2}, {"lora_kwargs": {"lora_dropout": 0.1}}):
        with pytest.raises(ValueError, match="Leave out lora_rank, lora_kwargs and gem_tokens"):
            GemTransformer(str(tmp_path), freeze_base=True, **options)
    with pytest.raises(ValueError, match=r"\['max_seq_length'\] were given. Set max_seq_length on the model"):
        GemTransformer.load(str(tmp_path), max_seq_length=20)


def test_forward_takes_features_only(make_model):
    gem = make_model()[0]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        gem(gem.preprocess(CORPUS), output_attentions=True)
