"""Bad input gets a ValueError that says what to do."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Features, IterableDataset, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import (
    BertConfig,
    BertModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5Model,
)

from gem_st import GemLoss, GemTransformer
from gem_st.losses.dataset_checks import check_dataset

from ..conftest import build_tokenizer, quiet_arguments


@pytest.fixture
def save_base(tmp_path):
    def save(model) -> str:
        model.save_pretrained(tmp_path)
        build_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gem_tokens": 0}, "num_gem_tokens must be a whole number of 1 or more, got 0"),
        ({"num_gem_tokens": True}, "num_gem_tokens must be a whole number of 1 or more, got True"),
        ({"num_gem_tokens": "4"}, "num_gem_tokens must be a whole number of 1 or more, got '4'"),
        ({"pooling": "max"}, r"pooling must be one of \('mean', 'concat'\), got 'max'"),
        ({"num_gem_tokens": 4, "max_seq_length": 5}, r"max_seq_length=5 must be more than num_gem_tokens \+ 1 = 5"),
        ({"max_seq_length": 300}, "at most the model's context of 256 tokens"),
    ],
)
def test_settings(make_base, settings, message):
    with pytest.raises(ValueError, match=message):
        GemTransformer(str(make_base()), **settings)


def test_max_seq_length_set_later(make_model):
    model = make_model(num_gem_tokens=4)
    with pytest.raises(ValueError, match="max_seq_length=5 must be more than"):
        model.max_seq_length = 5
    assert model.max_seq_length == 256


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a", "b"], 1.5])
def test_inputs_that_are_not_text(make_model, value):
    with pytest.raises(ValueError, match=r"Input 1 of 2 is .*only strings can be embedded"):
        make_model().preprocess(["fine", value])
    with pytest.raises(ValueError, match="only strings can be embedded"):
        make_model().encode(["fine", value])


def test_a_single_text_where_a_list_is_needed(make_model):
    with pytest.raises(ValueError, match="got the single text 'hello'"):
        make_model().preprocess("hello")
    with pytest.raises(ValueError, match="Prompts are a text, messages, or a list of either, got int"):
        make_model()[0].generate(5)
    with pytest.raises(ValueError, match="generate needs either prompts or a cache"):
        make_model()[0].generate()


def test_an_encoder_only_model(save_base):
    config = BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="lacks weights of BertLMHeadModel"):
        GemTransformer(save_base(BertModel(config)))


def test_a_bidirectional_model_with_a_head(save_base):
    from transformers import BertLMHeadModel

    config = BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match=r"\(bert\) is not causal.*decoder-only"):
        GemTransformer(save_base(BertLMHeadModel(config)))


def test_an_encoder_decoder_model(save_base):
    config = T5Config(vocab_size=600, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match=r"\(t5\) is an encoder-decoder model"):
        GemTransformer(save_base(T5Model(config)))


def test_a_backbone_without_its_head_is_not_given_a_random_one(save_base, make_base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_base(tie_word_embeddings=False))
    assert isinstance(model.model, LlamaModel)
    path = save_base(model)
    import safetensors.torch

    weights = safetensors.torch.load_file(f"{path}/model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: \['lm_head.weight'\]"):
        GemTransformer(path)


def test_a_state_space_model_embeds_with_one_token_but_cannot_be_masked(save_base):
    config = MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, state_size=4, expand=1)
    path = save_base(MambaForCausalLM(config))
    with pytest.raises(ValueError, match="mamba does not obey the GEM attention mask and positions"):
        GemTransformer(path, num_gem_tokens=2)
    model = SentenceTransformer(modules=[GemTransformer(path)], device="cpu")
    vectors = model.encode(["It rained all day.", "It"], convert_to_tensor=True)
    torch.testing.assert_close(vectors[1], model.encode("It", convert_to_tensor=True), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"plain rows only: GemLoss\(model, plain_ratio=1.0\)"):
        GemLoss(model)
    value = GemLoss(model, plain_ratio=1.0, alpha=0.0)([model.preprocess(["It rained.", "A boat."])]).item()
    assert value == pytest.approx(math.log(600), abs=0.2)  # weights near zero say nothing of the next token


def test_convolutions_and_alibi_do_not_pass_for_masked_attention(save_base):
    sizes = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    hybrid = Lfm2Config(
        **sizes, intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=1
    )
    with pytest.raises(ValueError, match="lfm2 does not obey"):
        GemTransformer(save_base(Lfm2ForCausalLM(hybrid)), num_gem_tokens=2)
    alibi = MptConfig(vocab_size=600, d_model=32, n_layers=2, n_heads=4, max_seq_len=256)
    with pytest.raises(ValueError, match="mpt does not obey"):
        GemTransformer(save_base(MptForCausalLM(alibi)), num_gem_tokens=2)


def test_a_tokenizer_of_another_model(make_base, tmp_path):
    base = make_base()
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    build_tokenizer(num_reserved=30).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"produces ids up to \d+, but the model has only \d+ vocabulary rows"):
        GemTransformer(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gem_tokens": 2}, "saved with num_gem_tokens=3, but num_gem_tokens=2 was asked for"),
        ({"num_gem_tokens": 3, "pooling": "concat"}, "saved with pooling='mean', but pooling='concat'"),
    ],
)
def test_a_checkpoint_saved_with_other_settings(make_model, tmp_path, settings, message):
    make_model(num_gem_tokens=3).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        GemTransformer(str(tmp_path), **settings)


def test_a_checkpoint_without_gem_settings(make_base):
    with pytest.raises(ValueError, match=r"holds no gem_config.json.*modules=\[GemTransformer"):
        GemTransformer.load(str(make_base()))


def test_a_checkpoint_whose_gem_rows_are_gone(make_model, tmp_path):
    make_model(num_gem_tokens=2).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "gem_config.json").read_text())
    config["gem_token_ids"] = [9998, 9999]
    (tmp_path / "gem_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gem_token_ids \[9998, 9999\]"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True)


def test_flash_attention_is_switched_where_a_mask_is_needed(make_model, warnings_of_transformers):
    gem = make_model(num_gem_tokens=2)[0]
    gem.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no custom mask"):
        gem(gem.preprocess(["It rained."]))
    gem.require_attention_mask()
    assert gem.model.config._attn_implementation == "sdpa"
    assert "takes no custom mask" in warnings_of_transformers.text


def test_other_formats_and_backends_are_refused(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(str(tmp_path), safe_serialization=False)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="backend='torch'"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True, backend="onnx")


HALVES = {
    "half an emoji": ("half an emoji \ud83d", 14),
    "halves the wrong way": ("\ude42\ud83d", 0),
    "bytes that were no UTF-8": (b"caf\xe9".decode("utf-8", "surrogateescape"), 3),
}


@pytest.mark.parametrize(("text", "place"), HALVES.values(), ids=HALVES)
def test_text_that_no_utf8_can_be_made_of(make_model, text, place):
    model = make_model(chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}")
    gem = model[0]
    message = rf"Input 1 of 2 has '\\u[0-9a-f]{{4}}' at {place}, half of a surrogate pair"
    messages = [[{"role": "user", "content": content}] for content in ("fine", text)]
    for read in (model.preprocess, gem.prefill, gem.compress, gem.generate):
        with pytest.raises(ValueError, match=message):
            read(["fine", text])
    for read in (gem.prefill, gem.generate):
        with pytest.raises(ValueError, match=message):
            read(messages)
    with pytest.raises(ValueError, match=message):
        gem.extend(gem.prefill(["a", "b"]), ["fine", text])
    with pytest.raises(ValueError, match=r"Input . of 2 has"):  # in the order of their lengths
        model.encode(["fine", text])
    with pytest.raises(ValueError, match="Input 0 of 1 has"):
        model.encode("fine", prompt=text)
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert model.encode(mended).shape == (32,)


def test_training_data_that_no_utf8_can_be_made_of(make_model, tmp_path):
    rows = [{"text": f"row {index}" if index != 5 else "half an emoji \ud83d"} for index in range(20)]
    data = IterableDataset.from_generator(lambda: iter(rows), features=Features({"text": Value("string")}))
    model = make_model()
    arguments = quiet_arguments(tmp_path, max_steps=9, per_device_train_batch_size=2)
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=GemLoss(model))
    with pytest.raises(ValueError, match=r"Input 1 of 2 has '\\ud83d' at 14, half of a surrogate pair"):
        trainer.train()  # a stream is not read ahead
    with pytest.raises(ValueError, match=r"Row 5 of column 'text' of the training set has '\\ud83d' at 14, half"):
        check_dataset(rows, "training")
