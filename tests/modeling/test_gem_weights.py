"""What a cache is known by: what keys and values are computed from, and nothing else."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_st import GemCache, GemTransformer
from gem_st.modeling.gem_weights import sum_words

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
TEXTS = ["It rained all day.", "He plays the violin every evening after work."]


@pytest.fixture(params=["frozen", "full", "lora"])
def gem(make_model, request):
    model = make_model(freeze_base=request.param == "frozen")
    if request.param == "lora":
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return model[0]


@torch.no_grad()
def change_head(gem):
    gem.model.get_output_embeddings().weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda gem: gem.requires_grad_(False),
        lambda gem: gem.requires_grad_(True),
        lambda gem: [p.requires_grad_(not p.requires_grad) for p in list(gem.parameters())[::2]],
        lambda gem: gem.train(),
        lambda gem: gem.model.set_attn_implementation("eager"),
        lambda gem: gem.to(torch.float64).to(torch.float32),  # moved, and the same
        change_head,
    ],
    ids=["no gradients", "gradients", "some gradients", "training", "attention", "moved", "head"],
)
def test_what_does_not_change_keys_and_values_leaves_a_cache_valid(gem, change):
    cache = gem.prefill(TEXTS)
    expected = gem.summarize(cache)
    change(gem)
    torch.testing.assert_close(gem.summarize(cache), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "by way of data"])
@pytest.mark.parametrize("name", ["down_proj", "k_proj", "layernorm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_change_of_any_weight_is_seen(gem, name, layer, counted):
    cache = gem.prefill(TEXTS)
    weights = [w for n, w in gem.model.named_parameters() if f"layers.{layer}." in n and name in n and "lora" not in n]
    with torch.no_grad():
        (weights[0] if counted else weights[0].data).mul_(1.5)
    with pytest.raises(ValueError, match="made by other weights"):
        gem.summarize(cache)


@torch.no_grad()
def test_a_change_of_one_value_is_seen_and_taken_back(gem):
    cache = gem.prefill(TEXTS)
    layer = gem.model.model.layers[0].self_attn.q_proj
    weight = getattr(layer, "base_layer", layer).weight
    before = weight[7, 3].clone()
    weight[7, 3] += 1e-3
    with pytest.raises(ValueError, match="made by other weights"):
        gem.summarize(cache)
    weight[7, 3] = before
    gem.summarize(cache)


def test_an_adapter_that_is_off_or_weaker_gives_other_keys(make_model):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = make_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    gem = model[0]
    layers = [part for part in gem.model.modules() if isinstance(part, BaseTunerLayer)]
    cache = gem.prefill(TEXTS)
    for layer in layers:
        layer.enable_adapters(False)
    with pytest.raises(ValueError, match="with another adapter on"):
        gem.summarize(cache)
    for layer in layers:
        layer.enable_adapters(True)
    gem.summarize(cache)
    next(layer for layer in layers if hasattr(layer, "scale_layer")).scale_layer(2)
    with pytest.raises(ValueError, match="with another adapter on"):
        gem.summarize(cache)


def test_the_number_is_computed_once_and_alike_in_every_process(make_model, monkeypatch):
    gem, again = make_model(freeze_base=True)[0], make_model(freeze_base=True)[0]
    calls = []
    monkeypatch.setattr("gem_st.modeling.gem_weights.sum_words", lambda w: calls.append(w) or sum_words(w))
    number = gem.base.weights_id()
    assert len(calls) == len(list(gem.model.base_model.parameters()))
    assert gem.base.weights_id() == number
    assert len(calls) == len(list(gem.model.base_model.parameters()))
    assert again.base.weights_id() == number


def test_caches_of_versions_before_are_refused_with_a_reason(make_model, tmp_path):
    gem = make_model()[0]
    cache = gem.prefill(TEXTS)
    cache.weights_tag -= 1  # it was computed otherwise
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=r"or by a version before 0\.2"):
        gem.summarize(GemCache.load(tmp_path / "cache.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 7, 8191, 8192, 30001])
def test_sums_of_words_are_of_every_byte(dtype, size):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(2, (size,), generator=generator).to(dtype)
    sums = sum_words(tensor)
    assert torch.equal(sums, sum_words(torch.stack([tensor, tensor], dim=1)[:, 0]))  # not contiguous
    assert torch.equal(sums, sum_words(torch.cat([tensor[:1], tensor])[1:]))  # anywhere in memory
    for index in {*range(0, size, 97), *range(size)[-3:]}:
        other = tensor.clone()
        other[index] = 1 - other[index].int()
        assert not torch.equal(sums, sum_words(other)), index


@pytest.fixture
def load_with(make_base, tmp_path):
    """Function that loads a base with some of its parts on the disk."""

    def load(on_disk: tuple[str, ...], base=None, **options):
        pytest.importorskip("accelerate")
        places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
        torch.manual_seed(0)
        kwargs = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
        gem = GemTransformer(str(base or make_base()), model_kwargs=kwargs if on_disk else {}, **options)
        return SentenceTransformer(modules=[gem])

    return load


@pytest.mark.parametrize("num_gem_tokens", [1, 3])
@pytest.mark.parametrize("on_disk", [("model.layers.1",), ("model.layers.0", "model.layers.1", "model.norm")])
def test_layers_on_the_disk_are_weights_as_any(load_with, tmp_path, num_gem_tokens, on_disk):
    whole, model = (load_with(parts, num_gem_tokens=num_gem_tokens) for parts in ((), on_disk))
    assert any(weight.is_meta for weight in model.parameters())
    expected = whole.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), expected)
    gem = model[0]
    cache = gem.prefill(TEXTS)
    torch.testing.assert_close(gem.summarize(cache), expected, atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert gem.generate(cache=cache, **options) == whole[0].generate(TEXTS, **options)
    whole[0].summarize(cache)  # it is of the same weights
    with torch.no_grad():
        whole[0].model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="made by other weights"):
        whole[0].summarize(cache)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected)
    saved = load_with((*on_disk, "lm_head"), tmp_path / "saved", num_gem_tokens=num_gem_tokens)  # which has its rows
    torch.testing.assert_close(saved.encode(TEXTS, convert_to_tensor=True), expected)


@pytest.mark.parametrize(
    ("on_disk", "options", "message"),
    [
        (("model.layers.1",), {"freeze_base": True}, "Beside a frozen base all weights have to be in memory, .* out 9"),
        (("lm_head",), {}, r"the head of a new model, have to be in memory, .* such as lm_head\.weight"),
        (("model.embed_tokens",), {}, r"Embeddings, .* have to be in memory, .* such as model\.embed_tokens\.weight"),
    ],
)
def test_what_has_to_be_in_memory_is_said_when_it_is_not(load_with, on_disk, options, message):
    with pytest.raises(ValueError, match=message):
        load_with(on_disk, **options)
