"""Few tokens beside a frozen base in one pass: the vectors of two stages, or two stages."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import OPTConfig, OPTForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gem_st import GemTransformer
from gem_st.modeling import gem_passes
from gem_st.modeling.gem_adapter import inject_adapter, share_weights
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


def modules_to_save(gem):
    with torch.no_grad():
        for name, weight in gem.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.3)


def replace_adapter(gem):
    for layer in gem.adapter_model.modules():
        if hasattr(layer, "lora_A"):
            layer.delete_adapter("default")
    del gem.adapter_model.peft_config["default"]
    config = LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    inject_adapter(gem.adapter_model, config, "default")


def unload_adapter(gem):
    for module in list(gem.adapter_model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "lora_A"):
                setattr(module, name, child.base_layer)


def add_other_tuner(gem):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    inject_adapter(gem.adapter_model, config, "ia3")


def drop_layers(gem):
    gem.adapter_model.model.layers = gem.adapter_model.model.layers[:1]


def take_another_base(gem):
    gem.model = type(gem.model)(gem.model.config).eval()


def take_a_model_without_an_adapter(gem):
    gem.adapter_model = share_weights(gem.model)


def merge(gem):
    for layer in gem.adapter_model.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()


def hook_base(gem):
    gem.model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def hook_adapter(gem):
    layer = gem.adapter_model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: output * 3)


def patch_layer(gem):
    layer = gem.model.model.layers[0]
    layer.forward = lambda *args, run=layer.forward, **kwargs: run(*args, **kwargs) * 1.5


CHANGES = [replace_adapter, unload_adapter, add_other_tuner, drop_layers, take_another_base]
CHANGES += [take_a_model_without_an_adapter, merge, hook_base, hook_adapter, patch_layer]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_put_in_or_taken_out_afterwards_is_seen(make_model, change):
    model = make_model(freeze_base=True, lora_kwargs={"target_modules": ["q_proj", "up_proj"]})
    before = encode_gated(model, TEXTS)
    torch.manual_seed(1)
    change(model[0])
    gated = encode_gated(model, TEXTS)
    assert (gated - before).abs().max() > 1e-4
    torch.testing.assert_close(gated, encode_staged(model, TEXTS), atol=1e-5, rtol=1e-5)


def test_dropout_that_is_on_stays_in_two_stages(make_model, passes):
    model = make_model(freeze_base=True, lora_kwargs={"lora_dropout": 0.5})
    features = model.preprocess(TEXTS[1:3])
    assert any(module.training for module in model[0].adapter_model.modules())  # until somebody calls `eval`
    passes.clear()
    with torch.no_grad():
        model(dict(features))
    assert set(passes) == {"AppendPass"}
    passes.clear()
    with torch.no_grad():
        model.eval()(dict(features))
    assert set(passes) == {"GatedPass"}


def test_modules_that_are_trained_beside_the_lora_stay_in_two_stages(make_model, passes):
    model = make_model(freeze_base=True, lora_kwargs={"modules_to_save": ["input_layernorm"]})
    modules_to_save(model[0])
    passes.clear()
    encode_gated(model, TEXTS)
    assert set(passes) == {"AppendPass"}


def test_threads_that_are_the_first_to_ask_get_vectors(make_model, tmp_path):
    config = OPTConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)  # its layers see tokens without their rows: refused
    build_tokenizer().save_pretrained(tmp_path)
    for base in (str(tmp_path), None):
        gem = GemTransformer(base, freeze_base=True) if base else make_model(freeze_base=True)[0]
        model = SentenceTransformer(modules=[gem], device="cpu")
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _, model=model: model.encode("It rained.", convert_to_tensor=True), range(12)))
        for vector in found:
            torch.testing.assert_close(vector, encode_staged(model, "It rained."), atol=1e-5, rtol=1e-5)


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
