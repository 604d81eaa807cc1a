"""Whatever was trained can be saved, and what training leaves behind is not saved with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import AutoModelForCausalLM

from gem_st import GemLoss, GemTransformer
from gem_st.hub import export

from ..conftest import CHECKPOINTING, CORPUS, quiet_arguments

SAMPLING = {"temperature": 0.9, "top_p": 0.6}
"""As Llama 2 and Vicuna have it, without `do_sample`."""


@pytest.fixture
def make_edited(make_base, tmp_path):
    """Function that writes a base whose configurations are edited."""

    def make(config: dict | None = None, generation_config: dict | None = None) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        for file in make_base().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for name, edit in (("config.json", config), ("generation_config.json", generation_config)):
            (folder / name).write_text(json.dumps({**read(folder, name), **(edit or {})}))
        return folder

    return make


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def train(model: SentenceTransformer, folder: Path, **options: object) -> None:
    SentenceTransformerTrainer(
        model=model,
        args=quiet_arguments(folder, max_steps=2, per_device_train_batch_size=4, **options),
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        loss=GemLoss(model, alpha=0.5),
    ).train()


def differing(first: dict, second: dict) -> set[str]:
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


@pytest.mark.parametrize(
    ("config", "generation_config"),
    [
        ({}, SAMPLING),
        ({}, {**SAMPLING, "do_sample": False}),
        ({"temperature": 0.5, "top_k": 7}, {}),  # as before generation had a file of its own
        ({"use_cache": False}, SAMPLING),
    ],
    ids=["sampling options", "switched off", "in the config", "no cache"],
)
def test_a_trained_base_is_saved_as_stock_saves_it(make_edited, tmp_path, config, generation_config):
    base, folder, stock = make_edited(config, generation_config), tmp_path / "trained", tmp_path / "stock"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(stock)
    model = SentenceTransformer(modules=[GemTransformer(str(base))], device="cpu")
    train(model, tmp_path / "run", save_steps=1, save_strategy="steps")
    model.save_pretrained(str(folder))
    for saved in (folder, tmp_path / "run" / "checkpoint-1"):
        assert differing(read(saved, "config.json"), read(stock, "config.json")) == {"vocab_size"}
        names = differing(read(saved, "generation_config.json"), read(stock, "generation_config.json"))
        assert names == {"suppress_tokens"}
    again = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode(CORPUS), model.encode(CORPUS))
    again.save_pretrained(str(tmp_path / "again"))
    assert (folder / "generation_config.json").read_bytes() == (tmp_path / "again/generation_config.json").read_bytes()


def test_so_are_stock_exports_and_bases_written_anew(make_edited, make_base, tmp_path):
    base = make_edited({}, SAMPLING)
    model = SentenceTransformer(modules=[GemTransformer(str(base))], device="cpu")
    train(model, tmp_path / "run", save_strategy="no")
    export(model, tmp_path / "stock", format="stock")
    assert read(tmp_path / "stock", "config.json")["use_cache"] is True
    assert SAMPLING.items() <= read(tmp_path / "stock", "generation_config.json").items()

    frozen = SentenceTransformer(modules=[GemTransformer(str(base), freeze_base=True)], device="cpu")
    train(frozen, tmp_path / "run", save_strategy="no")
    for file in base.glob("*.safetensors"):
        torch.save(dict(AutoModelForCausalLM.from_pretrained(base).state_dict()), base / "pytorch_model.bin")
        file.unlink()
    frozen[0].source.fingerprint = GemTransformer(str(base), freeze_base=True).source.fingerprint
    frozen.save_pretrained(str(tmp_path / "frozen"))
    assert read(tmp_path / "frozen", "config.json")["use_cache"] is True
    assert SAMPLING.items() <= read(tmp_path / "frozen", "generation_config.json").items()


@pytest.mark.parametrize("options", [{}, CHECKPOINTING, {"bf16": True}], ids=["plain", "checkpointing", "bf16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_leaves_no_mark_in_the_configuration(make_base, tmp_path, frozen, options):
    model = SentenceTransformer(modules=[GemTransformer(str(make_base()), freeze_base=frozen)], device="cpu")
    model.save_pretrained(str(tmp_path / "before"))
    generated = model[0].generate(CORPUS[0], max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        weights = [weight.clone() for weight in model.parameters()]
    train(model, tmp_path / "run", save_strategy="no", **options)
    with torch.no_grad():
        for weight, before in zip(model.parameters(), weights, strict=True):
            weight.copy_(before)
    model.save_pretrained(str(tmp_path / "after"))
    for name in ("config.json", "generation_config.json", "gem_config.json"):
        assert read(tmp_path / "before", name) == read(tmp_path / "after", name)
    assert read(tmp_path / "after", "config.json")["use_cache"] is True
    assert model[0].generate(CORPUS[0], max_new_tokens=3, do_sample=False) == generated


def test_what_could_not_be_saved_is_not_trained(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = make_model()
    model[0].save_base = False
    with pytest.raises(ValueError, match="save_base=False needs an adapter"):
        train(model, tmp_path)
    model = make_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    model[0].base_model_name_or_path = ""
    with pytest.raises(ValueError, match="has to name it"):
        train(model, tmp_path)
    model = make_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    for part in model[0].model.modules():
        if isinstance(part, BaseTunerLayer):
            part.enable_adapters(False)
    with pytest.raises(ValueError, match="adapter is disabled"):
        train(model, tmp_path)
