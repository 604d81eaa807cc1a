"""The frozen base: its outputs are the untouched checkpoint's to the bit, and only GEM embeddings and LoRA learn."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import AutoModelForCausalLM

from gem_st import GemLoss, GemTransformer
from gem_st.losses.rows import join_row

from ..conftest import CORPUS, quiet_arguments

TEXTS = ["It rained all day.", "", "She bought bread, apples and a little cheese at the market.", "He"]
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3", "gpt_neo"]


@torch.no_grad()
def outputs_of(model) -> list[torch.Tensor]:
    """Logits, keys, values and greedily generated tokens of a plain language model."""
    ids = torch.tensor([[0, 7, 20, 31, 44, 9, 12, 80]])
    output = model(input_ids=ids, use_cache=True)
    cache = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return [output.logits, *cache, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def take_steps(model, loss, num_steps: int = 3, fused: bool = False) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    for _ in range(num_steps):
        loss([model.preprocess(CORPUS)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_generator_is_the_untouched_one_to_the_bit(make_base, make_model, tmp_path, architecture, dtype):
    untouched = outputs_of(AutoModelForCausalLM.from_pretrained(make_base(architecture), dtype=dtype))
    model = make_model(architecture, num_gem_tokens=2, freeze_base=True, model_kwargs={"dtype": dtype})
    assert same(outputs_of(model[0].model), untouched)

    before = model.encode(TEXTS, convert_to_tensor=True).float()
    take_steps(model, GemLoss(model, alpha=0.5, plain_ratio=0.5))
    after = model.encode(TEXTS, convert_to_tensor=True).float()
    assert not torch.allclose(before, after, atol=1e-2)
    assert same(outputs_of(model[0].model), untouched)

    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu", model_kwargs={"dtype": dtype})
    assert same(outputs_of(again[0].model), untouched)
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True).float(), after)
    assert same(outputs_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)), untouched)
    prompt = "Once upon a time"
    assert again[0].generate(prompt, max_new_tokens=8) == make_model(
        architecture, freeze_base=True, model_kwargs={"dtype": dtype}
    )[0].generate(prompt, max_new_tokens=8)


def test_only_gem_embeddings_lora_and_scale_are_trained(make_model):
    model = make_model(num_gem_tokens=3, freeze_base=True, lora_rank=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name in ("0.gem_embeddings", "0.logit_scale") for name in trained)
    assert trained["0.gem_embeddings"].shape == (3, 32)
    assert sum("lora_A" in name for name in trained) == 2 * 7  # two layers of seven matrices
    assert all(p.shape[0] == 4 for name, p in trained.items() if "lora_A" in name)
    frozen = {id(p) for p in model[0].model.parameters()}
    assert frozen == {id(p) for p in model.parameters()} - {id(p) for p in trained.values()}  # no second copy


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_the_contrastive_loss_reaches_every_trained_weight(make_model, columns):
    model = make_model(num_gem_tokens=2, freeze_base=True)
    loss = GemLoss(model, alpha=1.0)
    model.train()
    loss([model.preprocess(CORPUS[i : i + 4]) for i in range(columns)]).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.abs().sum() > 0, name
        else:
            assert weight.grad is None, name


def test_next_token_loss_reaches_the_lora_through_keys_and_values_of_gem_tokens(make_model):
    model = make_model(num_gem_tokens=2, freeze_base=True)
    loss = GemLoss(model, alpha=0.0, plain_ratio=0.0, tasks=["reconstruction"])
    model.train()
    loss([model.preprocess(CORPUS)]).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "0.gem_embeddings" in touched
    for layer in range(2):
        for matrix in ("k_proj", "v_proj"):
            assert f"0.adapter_model.model.layers.{layer}.self_attn.{matrix}.lora_B.default.weight" in touched
    plain = GemLoss(model, alpha=0.0, plain_ratio=1.0)
    model.zero_grad()
    result = plain([model.preprocess(CORPUS)])
    assert result.item() == 0.0  # the base predicts plain text, and it does not learn


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_lora_the_stages_equal_one_masked_pass(make_base, architecture):
    """Prefix, GEM tokens and suffix one after the other give what the paper's mask gives in one pass."""
    window = {"window_size": 64} if architecture == "gpt_neo" else {"sliding_window": 64}
    base = str(make_base(architecture, **({} if architecture in ("llama", "qwen3") else window)))
    torch.manual_seed(0)
    frozen = GemTransformer(base, num_gem_tokens=3, freeze_base=True)
    full = GemTransformer(base, num_gem_tokens=3)
    scale = full.model.get_input_embeddings()(torch.tensor([5])) / full.model.get_input_embeddings().weight[5]
    with torch.no_grad():
        full.model.get_input_embeddings().weight[full.gem_token_ids] = frozen.gem_embeddings / scale.mean()
    texts = [torch.tensor(row) for row in ([0, 5, 6, 7, 8, 9, 10, 11], [0, 12], [0], [0, 20, 21, 22])]
    suffixes = [torch.tensor([30, 31, 32]), torch.tensor([40, 41, 42, 43, 44]), None, torch.tensor([50])]
    results = []
    for gem in (full, frozen):
        rows = [join_row(text, gem.gem_token_ids, suffix) for text, suffix in zip(texts, suffixes, strict=True)]
        results.append(gem.eval()(gem.pad([row for row, _ in rows], padding_side="right")))
    real = results[0]["attention_mask"].bool()
    expected, result = (output["token_embeddings"][real].detach() for output in results)
    assert torch.allclose(result, expected, atol=1e-5)
    expected, result = (output["sentence_embedding"].detach() for output in results)
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_gem_tokens", [1, 3])
def test_batch_and_padding_do_not_change_a_vector(make_model, architecture, num_gem_tokens):
    model = make_model(architecture, num_gem_tokens=num_gem_tokens, freeze_base=True)
    together = model.encode(TEXTS, convert_to_tensor=True)
    alone = torch.cat([model.encode([text], convert_to_tensor=True) for text in TEXTS])
    assert torch.allclose(together, alone, atol=5e-5)
    model[0].tokenizer.padding_side = "left"
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), together)


def test_a_suffix_knows_the_prefix_through_the_gem_tokens_only(make_model):
    """With the GEM tokens' keys and values held, another prefix moves nothing in the suffix."""
    gem = make_model(num_gem_tokens=2, freeze_base=True)[0].eval()
    row, _ = join_row(torch.tensor([0, 5, 6, 7]), gem.gem_token_ids, torch.tensor([30, 31]))
    other, _ = join_row(torch.tensor([0, 8, 6, 7]), gem.gem_token_ids, torch.tensor([30, 31]))
    append, held = gem.embedder.whole.append, []

    def hold(past, is_text, lengths):
        states = append(past, is_text, lengths)
        held.append([(layer.keys[:, :, -2:].clone(), layer.values[:, :, -2:].clone()) for layer in past.layers])
        for layer, (keys, values) in zip(past.layers, held[0], strict=True):
            layer.keys[:, :, -2:], layer.values[:, :, -2:] = keys, values
        return states

    gem.embedder.whole.append = hold
    hold.tokens = append.tokens
    with torch.no_grad():
        first, second = (gem(gem.pad([ids]))["token_embeddings"] for ids in (row, other))
    assert not torch.equal(held[0][1][1], held[1][1][1])  # the second layer's values do differ
    assert not torch.equal(first[:, 1:6], second[:, 1:6])
    assert torch.equal(first[:, 6:], second[:, 6:])


def test_the_base_stays_in_evaluation_mode(make_model):
    model = make_model(freeze_base=True, lora_kwargs={"lora_dropout": 0.5}).train()
    assert model[0].training
    assert not any(module.training for module in model[0].model.modules())
    dropouts = [module for module in model[0].adapter_model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert all(dropout.training for dropout in dropouts)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_lora_options_reach_peft(make_model):
    model = make_model(
        freeze_base=True, lora_rank=3, lora_kwargs={"target_modules": ["q_proj"], "layers_to_transform": [1]}
    )
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert names == ["0.adapter_model.model.layers.1.self_attn.q_proj.lora_A.default.weight"]
    assert model[0].adapter_model.peft_config["default"].r == 3
    late = make_model(freeze_base=True, lora_kwargs={"layers_to_transform": [1]})
    assert sum("lora_A" in name for name, _ in late.named_parameters()) == 7


def test_the_trainer_trains_saves_and_loads_the_best(make_base, make_model, tmp_path):
    model = make_model(num_gem_tokens=2, freeze_base=True)
    untouched = outputs_of(AutoModelForCausalLM.from_pretrained(make_base()))
    data = Dataset.from_dict({"anchor": CORPUS, "positive": CORPUS[1:] + CORPUS[:1], "negative": CORPUS[::-1]})
    arguments = quiet_arguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=GemLoss(model, alpha=0.9)
    )
    trainer.train()
    assert same(outputs_of(model[0].model), untouched)
    best = SentenceTransformer(trainer.state.best_model_checkpoint, trust_remote_code=True, device="cpu")
    assert torch.equal(best.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True))


def test_what_is_trained_stays_in_float32_beside_a_base_in_bfloat16(make_model, warnings_of_transformers):
    model = make_model(freeze_base=True, model_kwargs={"dtype": torch.bfloat16})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    GemLoss(model, alpha=1.0)
    assert "lost to rounding" not in warnings_of_transformers.text
    assert model.encode(TEXTS, convert_to_tensor=True).dtype == torch.float32
    assert model[0].embed(model[0].prefill(TEXTS)).dtype == torch.float32


def test_defaults_of_the_loss_beside_a_frozen_base(make_model, tmp_path):
    model = make_model(freeze_base=True)
    assert (GemLoss(model).plain_ratio, GemLoss(model).alpha) == (1.0, 1.0)
    assert GemLoss(model, plain_ratio=0.5).alpha == 0.7
    assert GemLoss(model).token_dropout == 0.85
    assert (GemLoss(make_model()).plain_ratio, GemLoss(make_model()).token_dropout) == (0.8, 0.7)


def test_a_pool_of_processes(make_model):
    model = make_model(num_gem_tokens=2, freeze_base=True)
    pool = model.start_multi_process_pool(["cpu"])
    result = model.encode(TEXTS, pool=pool, chunk_size=len(TEXTS))
    model.stop_multi_process_pool(pool)
    assert (result == model.encode(TEXTS)).all()


def test_gradient_checkpointing_does_not_drop_the_text(make_model):
    model = make_model(num_gem_tokens=2, freeze_base=True)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    for each in (model[0].model, model[0].adapter_model):
        new = hasattr(each, "activation_checkpointing_enable")
        each.activation_checkpointing_enable() if new else each.gradient_checkpointing_enable()
    model.train()
    features = model[0].pad([torch.tensor(row + model[0].gem_token_ids) for row in model[0].base.text.encode(TEXTS)])
    result = model(features)["sentence_embedding"]
    assert result.requires_grad
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias='all' trains biases of the frozen base"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights of the frozen base"),
    ],
)
def test_lora_options_that_touch_the_base_are_refused(make_base, options, message):
    with pytest.raises(ValueError, match=message):
        GemTransformer(str(make_base()), freeze_base=True, lora_kwargs=options)


def test_lora_options_without_a_frozen_base_are_refused(make_base):
    with pytest.raises(ValueError, match="lora_rank, lora_kwargs and gem_tokens belong to freeze_base=True"):
        GemTransformer(str(make_base()), lora_rank=8)
