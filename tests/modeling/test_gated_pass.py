"""Few tokens beside a frozen base in one pass: the vectors of two stages, or two stages."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gem_st import GemTransformer
from gem_st.modeling import gem_passes
from gem_st.modeling.gem_adapter import inject_adapter
from gem_st.modeling.gem_passes import AppendPass, GatedPass

from ..conftest import SIZES, build_tokenizer

TEXTS = ["", "It rained.", "She bought bread, apples and a little cheese.", "Again. " * 8]


@pytest.fixture
def passes(monkeypatch):
    """Names of the passes that ran."""
    ran = []
    for kind in (GatedPass, AppendPass):
        run = kind.__call__

        def record(self, *args, _run=run, **kwargs):
            ran.append(type(self).__name__)
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", record)
    return ran


def encode_staged(model, texts, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gem_passes.GATED_TOKENS, "cpu", 0)
        return model.encode(texts, convert_to_tensor=True, **kwargs)


def encode_gated(model, texts, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gem_passes.GATED_TOKENS, "cpu", 10**6)
        return model.encode(texts, convert_to_tensor=True, **kwargs)


@pytest.mark.parametrize("num_gem_tokens", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_one_pass_gives_the_vectors_of_two_stages(make_model, passes, architecture, num_gem_tokens):
    model = make_model(architecture, freeze_base=True, num_gem_tokens=num_gem_tokens)
    passes.clear()
    staged = encode_staged(model, TEXTS)
    assert set(passes) == {"AppendPass"}
    passes.clear()
    gated = encode_gated(model, TEXTS)
    assert set(passes) == {"GatedPass"}
    torch.testing.assert_close(gated, staged, atol=1e-5, rtol=1e-5)
    base = encode_gated(model, TEXTS[1:3], output_value="token_embeddings")
    for states, text in zip(base, TEXTS[1:3], strict=True):
        ids = model[0].preprocess([text])["input_ids"][:, :-num_gem_tokens]
        with torch.no_grad():  # the text is the untouched base's
            torch.testing.assert_close(states[:-num_gem_tokens], model[0].base.states(ids)[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    prompt=st.sampled_from([None, "query: ", "Find what answers this question about the weather: "]),
    padding_side=st.sampled_from(["left", "right"]),
)
@pytest.mark.parametrize("num_gem_tokens", [1, 4])
def test_they_agree_for_all_lengths_prompts_and_paddings(make_model, num_gem_tokens, lengths, prompt, padding_side):
    model = make_model(freeze_base=True, num_gem_tokens=num_gem_tokens)
    model.tokenizer.padding_side = padding_side
    texts = [" ".join(["rain"] * length) for length in lengths]
    gated, staged = encode_gated(model, texts, prompt=prompt), encode_staged(model, texts, prompt=prompt)
    torch.testing.assert_close(gated, staged, atol=1e-5, rtol=1e-5)


def test_a_single_text_is_embedded_in_one_pass_and_many_are_not(make_model, passes):
    model = make_model(freeze_base=True)
    model.encode("It rained.")
    passes.clear()
    model.encode("It rained.")
    assert passes == ["GatedPass"]
    passes.clear()
    model.encode(TEXTS * 8)
    assert set(passes) == {"AppendPass"}


def test_bfloat16_agrees(make_model):
    model = make_model(freeze_base=True, model_kwargs={"dtype": torch.bfloat16})
    similarity = torch.cosine_similarity(encode_gated(model, TEXTS).float(), encode_staged(model, TEXTS).float())
    assert similarity.min() > 0.999


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=lambda options: next(iter(options)))
def test_a_lora_that_is_more_than_a_product_stays_in_two_stages(make_model, passes, options):
    model = make_model(freeze_base=True, lora_kwargs=options)
    passes.clear()
    encode_gated(model, TEXTS)
    assert set(passes) == {"AppendPass"}


def test_experts_that_see_some_tokens_only_stay_in_two_stages(tmp_path):
    config = Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[GemTransformer(str(tmp_path), freeze_base=True)], device="cpu")
    gated, staged = encode_gated(model, TEXTS), encode_staged(model, TEXTS)
    torch.testing.assert_close(gated, staged, atol=1e-5, rtol=1e-5)


def test_what_is_done_to_the_adapter_meanwhile_is_seen(make_model):
    model = make_model(freeze_base=True)
    before = encode_gated(model, TEXTS)
    adapter = model[0].adapter_model
    layers = [module for module in adapter.modules() if hasattr(module, "lora_A")]
    with torch.no_grad():  # a step of training
        for layer in layers:
            layer.lora_B["default"].weight.mul_(2)
    changed = encode_gated(model, TEXTS)
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(changed, encode_staged(model, TEXTS), atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.enable_adapters(False)
    torch.testing.assert_close(encode_gated(model, TEXTS), encode_staged(model, TEXTS), atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.enable_adapters(True)
    inject_adapter(adapter, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False), "other")
    for layer in layers:
        layer.set_adapter([name for name in ("default", "other") if name in layer.lora_A])
    torch.testing.assert_close(encode_gated(model, TEXTS), encode_staged(model, TEXTS), atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_embed_by_their_own_weights(make_model):
    model = make_model(freeze_base=True)
    before = encode_gated(model, TEXTS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(encode_gated(other, TEXTS), before)
        with torch.no_grad():
            for name, weight in other[0].named_parameters():
                if "lora_B" in name:
                    weight.zero_()
        assert (encode_gated(other, TEXTS) - before).abs().max() > 0.01
        torch.testing.assert_close(encode_gated(model, TEXTS), before)


def test_threads_do_not_see_each_others_tokens(make_model):
    model = make_model(freeze_base=True, num_gem_tokens=2)
    texts = [text * number for text in TEXTS[1:] for number in range(1, 8)]
    expected = [encode_staged(model, text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda text: model.encode(text, convert_to_tensor=True), texts * 3))
    for one, other in zip(found, expected * 3, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
