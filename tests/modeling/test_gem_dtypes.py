"""Weights are trained in float32, saved in the data type they were stored in, and come back within its tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.modules import Dense
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from gem_st import GemLoss, hub
from gem_st.hub.layout import REFERENCE_TEXTS

from ..conftest import CORPUS, quiet_arguments

LOW = [torch.bfloat16, torch.float16]


def dtypes_of(model) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.parameters()}


def train(model: SentenceTransformer, folder: Path, steps: int = 4, **options: object) -> SentenceTransformerTrainer:
    arguments = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **options}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=quiet_arguments(folder, **{"save_strategy": "no", **arguments}),
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        loss=GemLoss(model, alpha=0.5),
    )
    trainer.train()
    return trainer


def load(folder: Path, **options: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def own_lines(log) -> list[str]:
    return [line.getMessage() for line in log.records if "lost to rounding" in line.getMessage()]


@pytest.mark.parametrize("dtype", LOW)
def test_weights_are_trained_in_float32_unless_asked_otherwise(make_model, warnings_of_transformers, dtype):
    model = make_model(dtype=dtype, tie_word_embeddings=True)
    lm, name = model[0].model, str(dtype).removeprefix("torch.")
    weights, values = list(lm.parameters()), [weight.detach().clone() for weight in lm.parameters()]
    assert dtypes_of(lm) == {dtype}
    GemLoss(model)
    GemLoss(model)  # as one of several losses has it
    assert dtypes_of(lm) == {torch.float32}
    assert all(new is old for new, old in zip(lm.parameters(), weights, strict=True))
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert all(torch.equal(new, old.float()) for new, old in zip(weights, values, strict=True))
    (line,) = own_lines(warnings_of_transformers)
    assert f"stored in {name}" in line
    assert f"trained in float32, and saved in {name} again unless model[0].save_dtype is set" in line


@pytest.mark.parametrize(
    "options",
    [
        {"model_kwargs": {"dtype": torch.bfloat16}},
        {"model_kwargs": {"torch_dtype": "bfloat16"}},
        {"model_kwargs": {"dtype": "auto"}},
        {"config_kwargs": {"dtype": "bfloat16"}},
    ],
)
def test_a_data_type_that_was_asked_for_is_obeyed(make_model, warnings_of_transformers, options):
    model = make_model(dtype=torch.bfloat16, **options)
    GemLoss(model)
    assert dtypes_of(model[0].model) == {torch.bfloat16}
    (line,) = own_lines(warnings_of_transformers)
    assert "The weights to be trained are in bfloat16" in line


def test_weights_that_somebody_cast_are_left_alone(make_model):
    model = make_model()
    model[0].model.to(torch.float16)
    GemLoss(model)
    assert dtypes_of(model[0].model) == {torch.float16}


def test_float32_is_no_news(make_model, warnings_of_transformers):
    GemLoss(make_model())
    GemLoss(make_model(dtype=torch.bfloat16, freeze_base=True))
    assert not own_lines(warnings_of_transformers)


@pytest.mark.parametrize("model_kwargs", [None, {"dtype": "bfloat16"}])
def test_a_lora_is_float32_and_its_base_stays_as_it_is(make_model, tmp_path, warnings_of_transformers, model_kwargs):
    from peft import LoraConfig

    model = make_model(dtype=torch.bfloat16, model_kwargs=model_kwargs)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    before = {name: (weight, weight.detach().clone()) for name, weight in model[0].model.named_parameters()}
    train(model, tmp_path)
    trained = [weight for weight, _ in before.values() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert any(not torch.equal(weight, value.float()) for weight, value in before.values() if weight.requires_grad)
    base = [(weight, value) for weight, value in before.values() if not weight.requires_grad]
    assert {weight.dtype for weight, _ in base} == {torch.bfloat16}
    assert all(torch.equal(weight, value) for weight, value in base)
    assert not own_lines(warnings_of_transformers)


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_cast_is_saved_as_it_was_stored_and_reloads_within_rounding(make_model, tmp_path, tied):
    model = make_model(dtype=torch.bfloat16, tie_word_embeddings=tied, num_gem_tokens=2)
    start = model.encode(CORPUS, convert_to_tensor=True).float()
    train(model, tmp_path / "out")
    lm = model[0].model
    live, weights = {name: weight.detach().clone() for name, weight in lm.named_parameters()}, list(lm.parameters())
    config_dtype = lm.config.dtype
    model.save_pretrained(str(tmp_path / "saved"))

    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    assert all(torch.equal(weight, live[name].to(torch.bfloat16)) for name, weight in stored.items())
    assert len(stored) == len(live)
    assert all(new is old for new, old in zip(lm.parameters(), weights, strict=True))
    assert all(torch.equal(weight, live[name]) for name, weight in lm.named_parameters())
    assert dtypes_of(lm) == {torch.float32}
    assert lm.config.dtype == config_dtype
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied

    generator = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert dtypes_of(generator) == {torch.bfloat16}
    ids = torch.tensor([[0, 5, 9, 17]])
    torch.testing.assert_close(generator(ids).logits.float(), lm(ids).logits, atol=0.03, rtol=0.03)
    again = load(tmp_path / "saved")
    assert dtypes_of(again[0].model) == {torch.bfloat16}
    vectors, expected = (each.encode(CORPUS, convert_to_tensor=True).float() for each in (again, model))
    assert torch.cosine_similarity(vectors, expected).min() > 0.999
    assert torch.cosine_similarity(start, expected).max() < 0.999  # training moved them further than rounding does


def test_save_dtype_is_the_data_type_of_checkpoints(make_model, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    train(model, tmp_path / "out")
    model[0].save_dtype = torch.float32
    model.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert dtypes_of(again[0].model) == {torch.float32}
    assert (again.encode(CORPUS) == model.encode(CORPUS)).all()
    again[0].save_dtype = torch.float16
    again.save_pretrained(str(tmp_path / "half"))
    assert dtypes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "half")) == {torch.float16}


def test_shards_and_wrapped_layers_are_saved_as_they_were_stored(make_model, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    GemLoss(model)
    layers = model[0].model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])  # as FSDP's activation checkpointing does
    model[0].save(str(tmp_path), max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}


def test_a_base_that_was_not_trained_is_saved_byte_for_byte(make_base, make_model, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    model.save_pretrained(str(tmp_path / "untouched"))
    GemLoss(model)
    model.save_pretrained(str(tmp_path / "cast"))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("untouched", "cast")]
    assert files[0] == files[1]
    base = load_file(make_base(dtype=torch.bfloat16) / "model.safetensors")
    stored = load_file(tmp_path / "cast" / "model.safetensors")
    assert all(torch.equal(stored[name][: len(weight)], weight) for name, weight in base.items())
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_a_checkpoint_to_resume_from_is_float32_and_goes_on_to_the_same_weights(make_base, make_model, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = train(model, tmp_path, **options)
    trainer.save_model(str(tmp_path / "end"))
    folder = tmp_path / "checkpoint-2"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert {w.dtype for w in load_file(tmp_path / "end" / "model.safetensors").values()} == {torch.bfloat16}
    half = {name: weight.bfloat16().float() for name, weight in load_file(folder / "model.safetensors").items()}
    assert any(not torch.equal(weight, half[name]) for name, weight in load_file(folder / "model.safetensors").items())

    again = make_model(dtype=torch.bfloat16)
    resumed = SentenceTransformerTrainer(
        model=again, args=trainer.args, train_dataset=trainer.train_dataset, loss=GemLoss(again, alpha=0.5)
    )
    resumed.train(resume_from_checkpoint=str(folder))
    expected = dict(model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in again.named_parameters())
    again.save_pretrained(str(tmp_path / "again"))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("end", "again")]
    assert files[0] == files[1]


def test_a_loaded_checkpoint_is_trained_further_in_float32_and_saved_as_it_was(make_model, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    train(model, tmp_path / "out")
    model.save_pretrained(str(tmp_path / "first"))
    again = load(tmp_path / "first")
    train(again, tmp_path / "out")
    assert dtypes_of(again[0].model) == {torch.float32}
    again.save_pretrained(str(tmp_path / "second"))
    assert dtypes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "second")) == {torch.bfloat16}


@pytest.mark.parametrize("format", ["gem", "stock"])
def test_an_export_is_compared_in_the_data_type_that_it_is_written_in(make_model, tmp_path, format):
    model = make_model(dtype=torch.bfloat16)
    train(model, tmp_path / "out")
    hub.export(model, tmp_path / "export", format=format)
    assert dtypes_of(model[0].model) == {torch.float32}
    assert json.loads((tmp_path / "export" / "gem_reference.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in load_file(tmp_path / "export" / "model.safetensors").values()} == {torch.bfloat16}
    expected = load_file(tmp_path / "export" / "gem_reference.safetensors")["embeddings"]
    vectors = load(tmp_path / "export").encode(REFERENCE_TEXTS, convert_to_tensor=True).float()
    torch.testing.assert_close(vectors, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_behind_it_are_of_the_data_type_of_its_embeddings(make_model, tmp_path, freeze_base, dtype):
    """Sentence Transformers casts them to that of the first parameter, which is in float32 beside bfloat16 weights."""
    model = make_model(freeze_base=freeze_base, model_kwargs={"dtype": dtype})
    model.append(Dense(32, 8, activation_function=None))
    expected = model.encode(CORPUS, convert_to_tensor=True)
    loss = GemLoss(model, alpha=0.5)
    loss([model.preprocess(CORPUS)]).backward()
    assert model[1].linear.weight.grad.norm() > 0
    model.save_pretrained(str(tmp_path / "model"))
    loaded = SentenceTransformer(
        str(tmp_path / "model"), trust_remote_code=True, device="cpu", model_kwargs={"dtype": dtype}
    )
    torch.testing.assert_close(loaded.encode(CORPUS, convert_to_tensor=True), expected, atol=2e-2, rtol=2e-2)
    loaded.bfloat16()
    assert loaded.encode(CORPUS, convert_to_tensor=True).dtype == torch.bfloat16
