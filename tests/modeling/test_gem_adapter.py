"""Checkpoints with an adapter: whole, adapter only, and PEFT on every token; the base is checked."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import check_peft_version

from gem_st import GemLoss, GemTransformer, merge_lora

from ..conftest import CORPUS, quiet_arguments
from .test_frozen_base import outputs_of, same, take_steps
from .test_gem_checkpoint import EMBED

TEXTS = ["It rained all day.", "She bought bread at the market.", "", "\U0001f642 a letter"]


def load(folder: Path, **kwargs: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def base(make_base, tmp_path) -> Path:
    """A base of its own for each test, in several files, which may be changed."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(make_base(tie_word_embeddings=False), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(make_base()).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def frozen(base) -> SentenceTransformer:
    torch.manual_seed(0)
    gem = GemTransformer(str(base), num_gem_tokens=3, freeze_base=True, model_kwargs={"dtype": "float32"})
    model = SentenceTransformer(modules=[gem], prompts={"query": "find: "}, device="cpu")
    take_steps(model, GemLoss(model, alpha=0.9))
    return model


def test_a_whole_checkpoint_has_the_bases_files_byte_for_byte(base, frozen, tmp_path):
    folder = tmp_path / "whole"
    frozen.save_pretrained(str(folder))
    names = [*(file.name for file in base.glob("*.safetensors")), "config.json", "model.safetensors.index.json"]
    for name in [*names, "generation_config.json"]:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert sorted(file.name for file in (folder / "gem_adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.json",
        "gem_rows.safetensors",
    ]
    assert str(base) not in "".join(file.read_text() for file in folder.rglob("*.json"))
    shutil.rmtree(base)
    again = load(folder, model_kwargs={"dtype": "float32"})
    assert np.array_equal(again.encode(TEXTS), frozen.encode(TEXTS))
    assert again.encode(TEXTS, prompt_name="query").shape == (4, 32)
    again.save_pretrained(str(folder))  # into its own folder
    again.save_pretrained(str(tmp_path / "third"))
    third = load(tmp_path / "third", model_kwargs={"dtype": "float32"})
    assert np.array_equal(third.encode(TEXTS), frozen.encode(TEXTS))
    assert (tmp_path / "third" / names[0]).read_bytes() == (folder / names[0]).read_bytes()


def test_an_adapter_alone_is_small_and_fetches_its_base(base, frozen, tmp_path, warnings_of_transformers):
    folder = tmp_path / "adapter"
    frozen[0].save_base = False
    frozen.save_pretrained(str(folder))
    assert "names its base by a folder of this machine" in warnings_of_transformers.text
    assert not [*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("tokenizer*")]
    assert json.loads((folder / "gem_config.json").read_text())["base_model_name_or_path"] == str(base)
    again = load(folder, model_kwargs={"dtype": "float32"})
    assert np.array_equal(again.encode(TEXTS), frozen.encode(TEXTS))
    assert not again[0].save_base
    again.save_pretrained(str(tmp_path / "again"))
    assert np.array_equal(
        load(tmp_path / "again", model_kwargs={"dtype": "float32"}).encode(TEXTS), frozen.encode(TEXTS)
    )
    with pytest.raises((OSError, ValueError), match=str(folder)):  # no generator is made of it silently
        AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"holds an adapter only; its base, '.*base' .* cannot be loaded"):
        load(folder)


def test_both_forms_load_without_gem_st(frozen, run_without_gem_st, tmp_path):
    expected = frozen.encode(TEXTS)
    for save_base in (True, False):
        frozen[0].save_base = save_base
        folder = tmp_path / f"saved-{save_base}"
        frozen.save_pretrained(str(folder))
        code = EMBED.replace('device="cpu")', 'device="cpu", model_kwargs={"dtype": "float32"})')
        run_without_gem_st(code, folder, tmp_path / "out.npy", json.dumps(TEXTS))
        assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


def test_training_goes_on_after_loading(frozen, tmp_path):
    frozen.save_pretrained(str(tmp_path / "whole"))
    again = load(tmp_path / "whole", model_kwargs={"dtype": "float32"})
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in frozen.named_parameters() if p.requires_grad}
    untouched = outputs_of(again[0].model)
    take_steps(again, GemLoss(again, alpha=1.0))
    assert same(outputs_of(again[0].model), untouched)
    assert not np.allclose(again.encode(TEXTS), frozen.encode(TEXTS), atol=1e-3)


def change_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def change_tokenizer(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    assert config["vocab_size"] >= len(tokenizer)


def change_weights(base: Path) -> None:
    file = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "what"), [(change_config, "config"), (change_weights, "weights"), (change_tokenizer, "tokenizer")]
)
def test_another_base_is_an_error(make_base, base, tmp_path, change, what):
    if change is change_tokenizer:  # needs a spare row
        shutil.rmtree(base)
        shutil.copytree(make_base(vocab_size=600), base)
    gem = GemTransformer(str(base), freeze_base=True)
    gem.save_base = False
    SentenceTransformer(modules=[gem], device="cpu").save_pretrained(str(tmp_path / "adapter"))
    load(tmp_path / "adapter")
    change(base)
    with pytest.raises(ValueError, match=f"was trained on another base than .*: {what} differ"):
        load(tmp_path / "adapter")


def test_the_same_base_in_other_files_and_another_data_type_is_the_same(base, frozen, tmp_path):
    frozen[0].save_base = False
    frozen.save_pretrained(str(tmp_path / "adapter"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="1GB")
    for file in base.glob("model-*"):
        file.unlink()
    (base / "model.safetensors.index.json").unlink(missing_ok=True)
    for dtype in ("float32", "bfloat16", "float16"):
        again = load(tmp_path / "adapter", model_kwargs={"dtype": dtype})
        vectors = again.encode(TEXTS, convert_to_tensor=True).float()
        expected = frozen.encode(TEXTS, convert_to_tensor=True)
        assert torch.cosine_similarity(vectors, expected).min() > (0.99 if dtype != "float32" else 0.99999)


def test_a_base_changed_in_memory_is_not_saved_as_unchanged(frozen, tmp_path):
    with torch.no_grad():
        frozen[0].model.model.layers[1].mlp.up_proj.weight[0] += 1
    with pytest.raises(ValueError, match=r"base's weight model.layers.1.mlp.up_proj.weight was changed"):
        frozen.save_pretrained(str(tmp_path / "whole"))


def test_a_changed_base_is_seen_through_torch_compile(make_model, tmp_path):
    model = make_model(freeze_base=True)
    model[0].model = torch.compile(model[0].model, backend="eager")
    with torch.no_grad():
        model[0].model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"base's weight model.layers.1.mlp.up_proj.weight was changed"):
        model.save_pretrained(str(tmp_path))


def test_any_change_in_memory_is_seen(frozen, tmp_path):
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        weight = frozen[0].model.get_parameter(name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[7] += 1  # a row that no sample holds
        with pytest.raises(ValueError, match=f"base's weight {name} was changed"):
            frozen.save_pretrained(str(tmp_path / "whole"))
        with torch.no_grad():
            weight.copy_(kept)
    frozen.save_pretrained(str(tmp_path / "whole"))
    for module in frozen[0].adapter_model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    with pytest.raises(ValueError, match="adapter is disabled"):
        frozen.save_pretrained(str(tmp_path / "whole"))


@pytest.mark.parametrize("change", [change_config, change_weights])
def test_a_base_changed_on_the_disk_since_is_not_saved_as_unchanged(base, frozen, tmp_path, change):
    change(base)
    with pytest.raises(ValueError, match="was changed since it was loaded"):
        frozen.save_pretrained(str(tmp_path / "whole"))


def test_a_base_that_is_gone_is_written_anew(base, frozen, tmp_path, warnings_of_transformers):
    shutil.rmtree(base)
    frozen.save_pretrained(str(tmp_path / "whole"))
    assert "written anew" in warnings_of_transformers.text
    again = load(tmp_path / "whole", model_kwargs={"dtype": "float32"})
    assert np.array_equal(again.encode(TEXTS), frozen.encode(TEXTS))


def test_a_base_without_safetensors(make_base, tmp_path):
    folder = tmp_path / "bin"
    model = AutoModelForCausalLM.from_pretrained(make_base())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(make_base()).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    frozen = SentenceTransformer(modules=[GemTransformer(str(folder), freeze_base=True)], device="cpu")
    frozen.save_pretrained(str(whole))
    frozen[0].save_base = False
    frozen.save_pretrained(str(adapter))
    for saved in (whole, adapter):
        assert np.array_equal(load(saved).encode(TEXTS), frozen.encode(TEXTS))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"trained on another base than .*: weights differ"):
        load(adapter)


def test_saving_over_another_form_leaves_nothing_of_it(base, frozen, make_model, tmp_path):
    folder = tmp_path / "checkpoint"
    full = make_model(num_gem_tokens=2)
    take_steps(full, GemLoss(full, alpha=0.5))
    for save_base in (True, False):
        full.save_pretrained(str(folder))
        assert not (folder / "gem_adapter").exists()
        frozen[0].save_base = save_base
        frozen.save_pretrained(str(folder))
        again = load(folder, model_kwargs={"dtype": "float32"})
        assert np.array_equal(again.encode(TEXTS), frozen.encode(TEXTS))
        assert (folder / "config.json").exists() == save_base
        assert not (folder / "model.safetensors").exists()  # this base is in several files


def test_a_path_may_be_relative(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    model = SentenceTransformer(modules=[GemTransformer(base.name, freeze_base=True)], device="cpu")
    model[0].save_base = False
    monkeypatch.chdir(tmp_path.parent)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert np.array_equal(load(tmp_path / "adapter").encode(TEXTS), model.encode(TEXTS))


def test_a_file_that_is_missing_or_does_not_fit_is_an_error(frozen, tmp_path):
    folder = tmp_path / "whole"
    frozen.save_pretrained(str(folder))
    path = folder / "gem_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors does not fit its adapter_config.json: \["):
        load(folder)
    path.unlink()
    with pytest.raises(OSError, match=r"adapter_model.safetensors"):
        load(folder)


def test_a_frozen_checkpoint_is_not_read_as_a_full_one(frozen, tmp_path):
    frozen.save_pretrained(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="saved with freeze_base=True, but freeze_base=False was asked for"):
        GemTransformer(str(tmp_path / "whole"), num_gem_tokens=3)


# ---- PEFT on every token, in full mode


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def with_lora(make_model, request) -> SentenceTransformer:
    model = make_model(num_gem_tokens=2, tie_word_embeddings=request.param)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    take_steps(model, GemLoss(model, alpha=0.5))
    return model


def test_peft_trains_lora_and_gem_rows_only(make_model):
    model = make_model(num_gem_tokens=2)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    matrix = model[0].model.get_input_embeddings().weight.detach().clone()
    take_steps(model, GemLoss(model, alpha=0.5))
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {
        "0.logit_scale": (1,),
        "0.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 32),
    }
    change = (model[0].model.get_input_embeddings().weight - matrix).abs().amax(dim=1)
    assert (change > 1e-3).nonzero()[:, 0].tolist() == model[0].gem_token_ids
    assert change[: model[0].gem_token_ids[0]].max() == 0


def test_what_peft_trained_is_saved_small_and_reloaded(with_lora, tmp_path):
    folder = tmp_path / "adapter"
    with_lora.save_pretrained(str(folder))
    stored = load_file(folder / "gem_adapter" / "adapter_model.safetensors")
    assert max(tensor.numel() for tensor in stored.values()) <= 4 * 48  # no matrix of the vocabulary
    again = load(folder)
    assert np.array_equal(again.encode(TEXTS), with_lora.encode(TEXTS))
    assert again[0].generate("It rained", max_new_tokens=6) == with_lora[0].generate("It rained", max_new_tokens=6)
    features = again.preprocess(CORPUS)
    losses = [GemLoss(m, alpha=0.0, plain_ratio=1.0).eval()([features]).item() for m in (again, with_lora)]
    assert losses[0] == losses[1]
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in with_lora.named_parameters() if p.requires_grad
    }


def test_merged_equals_unmerged_and_is_a_plain_checkpoint(with_lora, tmp_path):
    expected, text = with_lora.encode(TEXTS), with_lora[0].generate("It rained", max_new_tokens=6)
    tied = with_lora[0].model.config.tie_word_embeddings
    merge_lora(with_lora)
    assert np.allclose(with_lora.encode(TEXTS), expected, atol=1e-5)
    assert with_lora[0].generate("It rained", max_new_tokens=6) == text
    model = with_lora[0].model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with_lora.save_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "gem_adapter").exists()
    assert np.array_equal(load(tmp_path / "merged").encode(TEXTS), with_lora.encode(TEXTS))
    ids = torch.tensor([[0, 10, 11]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    take_steps(with_lora, GemLoss(with_lora, alpha=0.5))  # in full mode again


def test_a_gem_checkpoint_takes_a_lora_too(make_model, tmp_path):
    make_model(num_gem_tokens=2).save_pretrained(str(tmp_path / "full"))
    model = load(tmp_path / "full")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    take_steps(model, GemLoss(model, alpha=0.5))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert np.array_equal(load(tmp_path / "adapter").encode(TEXTS), model.encode(TEXTS))


def test_tokens_of_the_user_are_trained_beside_the_gem_tokens(make_model):
    model = make_model(num_gem_tokens=2)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[5]))
    trained = dict(model.named_parameters())["0.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    assert trained.shape == (3, 32)
    whole = make_model(num_gem_tokens=2)
    whole.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    assert any(p.shape == (402, 32) for p in whole.parameters() if p.requires_grad)


def test_a_lora_on_a_tied_head_is_not_merged_and_nothing_is_lost(make_model):
    model = make_model(tie_word_embeddings=True)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    expected = model.encode(TEXTS)
    with pytest.raises(ValueError, match="output head that is tied to the embedding"):
        merge_lora(model)
    assert np.array_equal(model.encode(TEXTS), expected)


def test_a_full_model_cannot_be_saved_without_its_weights(make_model, tmp_path):
    model = make_model()
    model[0].save_base = False
    with pytest.raises(ValueError, match="save_base=False needs an adapter"):
        model.save_pretrained(str(tmp_path))


def test_what_cannot_be_merged_or_added_says_why(frozen, make_model):
    with pytest.raises(ValueError, match="LoRA of a frozen base cannot be merged: it works on GEM tokens only"):
        merge_lora(frozen)
    with pytest.raises(ValueError, match="frozen base takes no further adapter"):
        frozen.add_adapter(LoraConfig(r=4))
    with pytest.raises(ValueError, match="There is no adapter to merge"):
        merge_lora(make_model())
    model = make_model(model_kwargs={"dtype": torch.bfloat16})
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"Merging into weights of torch\.bfloat16 would round them"):
        merge_lora(model)


def refuse_peft(*args: object, **kwargs: object) -> None:
    """What transformers 5.24 does when PEFT is older than it likes."""
    check_peft_version(min_version="99.0")


@pytest.mark.parametrize("freeze_base", [True, False])
def test_peft_and_transformers_that_refuse_each_other_are_named_with_what_to_install(
    make_model, monkeypatch, freeze_base
):
    monkeypatch.setattr("peft.inject_adapter_in_model", refuse_peft)
    versions = [f"{name} {re.escape(importlib.metadata.version(name))}" for name in ("transformers", "peft")]
    message = rf"{' and '.join(versions)} do not work together \(.*99\.0\)\..*: pip install transformers==.* peft=="
    add = partial(make_model, freeze_base=True) if freeze_base else partial(make_model().add_adapter, LoraConfig(r=4))
    with pytest.raises(ImportError, match=message):
        add()


def test_what_peft_says_of_the_configuration_is_left_as_it_is(make_model):
    with pytest.raises(ValueError, match=r"Target modules .*no_such_layer.* not found in the base model"):
        make_model().add_adapter(LoraConfig(target_modules=["no_such_layer"]))
    with pytest.raises(TypeError, match=r"needs a PeftConfig, e\.g\. LoraConfig\(\.\.\.\), got dict"):
        make_model().add_adapter({"r": 4})


def test_a_lora_that_leaves_the_gem_tokens_untrained_is_refused_by_the_loss(make_model, tmp_path):
    model = make_model()
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), model[0].model)
    with pytest.raises(ValueError, match=r"leaves the embeddings of the GEM tokens untrained\. model\.add_adapter"):
        SentenceTransformerTrainer(
            model=model,
            args=quiet_arguments(tmp_path),
            train_dataset=Dataset.from_dict({"text": CORPUS}),
            loss=GemLoss(model),
        )


def test_an_adapter_is_not_replaced_by_another_of_its_name(with_lora):
    expected = with_lora.encode(TEXTS)
    with pytest.raises(ValueError, match="There is an adapter 'default' already"):
        with_lora.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    assert np.array_equal(with_lora.encode(TEXTS), expected)


def test_without_peft_the_error_names_it(make_base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        GemTransformer(str(make_base()), freeze_base=True)
