"""Bases of other architectures: they work, or are refused with the reason when they are loaded."""

from __future__ import annotations

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer

from ..conftest import CORPUS, SIZES, build_tokenizer

VOCAB_SIZE = len(build_tokenizer())
GEMMA4 = {
    **SIZES,
    "num_hidden_layers": 2,
    "global_head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 0,
    "pad_token_id": 1,
}
LLAMA4 = {
    **SIZES,
    "vocab_size": VOCAB_SIZE,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 64,
    "pad_token_id": 1,
}


@pytest.fixture
def make(tmp_path):
    def make_one(name: str, config: dict, **options: object) -> SentenceTransformer:
        if not hasattr(transformers, f"{name}ForCausalLM"):
            pytest.skip(f"This transformers has no {name}.")
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}TextConfig")(**config)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path)
        build_tokenizer().save_pretrained(tmp_path)
        return SentenceTransformer(modules=[GemTransformer(str(tmp_path), **options)], device="cpu")

    return make_one


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 8}, {"num_gem_tokens": 1}),
        ("Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 8}, {"num_gem_tokens": 3}),
        ("Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 0}, {"num_gem_tokens": 2, "freeze_base": True}),
        ("Llama4", LLAMA4, {"num_gem_tokens": 1}),
        ("Llama4", LLAMA4, {"num_gem_tokens": 3}),
        (
            "Llama4",
            LLAMA4,
            {"num_gem_tokens": 2, "freeze_base": True, "lora_kwargs": {"target_modules": ["q_proj", "v_proj"]}},
        ),
    ],
)
def test_it_works(make, tmp_path, name, config, options):
    model = make(name, config, **options)
    gem = model[0]
    vectors = model.encode(CORPUS, convert_to_tensor=True)
    for text, vector in zip(CORPUS, vectors, strict=True):
        torch.testing.assert_close(model.encode(text, convert_to_tensor=True), vector, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(gem.summarize(gem.prefill(CORPUS)), vectors, atol=2e-5, rtol=1e-4)
    if gem.num_gem_tokens == 1:  # an independent reference: the hidden state behind the text, by the whole model
        ids = torch.tensor([gem.tokenizer(CORPUS[0])["input_ids"] + gem.gem_token_ids])
        with torch.no_grad():
            output = gem.model(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[-1][0, -1], vectors[0], atol=2e-5, rtol=1e-4)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode(CORPUS, convert_to_tensor=True), vectors)


@pytest.mark.parametrize("num_gem_tokens", [1, 3])
@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 8}, "gemma4_text does not run GEM tokens beside a frozen"),
        ("Llama4", LLAMA4, r"llama4_text does not run .* lora_kwargs={\"target_modules\""),  # its router gives a tuple
    ],
)
def test_it_is_refused_when_loaded(make, name, config, reason, num_gem_tokens):
    with pytest.raises(ValueError, match=reason):
        make(name, config, freeze_base=True, num_gem_tokens=num_gem_tokens)
