"""`SentenceTransformer.merge`, with a stand-in for mergekit where that is not installed: means of weights."""

from __future__ import annotations

import enum
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from gem_st import GemLoss, GemTransformer, hub

from ..conftest import CORPUS, quiet_arguments

merging = pytest.importorskip("sentence_transformers.base.merging")


class BasePolicy(enum.Enum):
    IGNORED = "ignored"


@pytest.fixture(autouse=True)
def mergekit(monkeypatch):
    """What Sentence Transformers asks of mergekit 0.1.5, for the method "linear"."""
    spec = SimpleNamespace(contract=SimpleNamespace(base=BasePolicy.IGNORED), parameters=[])
    method = SimpleNamespace(spec=spec, validate_inputs=lambda inputs, base: None)
    fake = ModuleType("mergekit.merge_methods")
    fake.BasePolicy, fake.get = BasePolicy, lambda name: method
    fake.merge_state_dicts = lambda states, *args, **kwargs: {
        name: torch.stack([state[name].float() for state in states.values()]).mean(dim=0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }
    monkeypatch.setitem(sys.modules, "mergekit", ModuleType("mergekit"))
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", fake)
    monkeypatch.setattr(merging, "version", lambda name: "0.1.5")


@pytest.fixture
def make_trained(make_base, tmp_path):
    """Function that trains a model by the same recipe, on other data for another seed."""

    def make(seed: int, **options) -> SentenceTransformer:
        torch.manual_seed(0)
        gem = GemTransformer(str(make_base()), num_gem_tokens=2, **options)
        model = SentenceTransformer(modules=[gem], device="cpu")
        SentenceTransformerTrainer(
            model=model,
            args=quiet_arguments(tmp_path / "run", max_steps=3, learning_rate=1e-2, seed=seed, save_strategy="no"),
            train_dataset=Dataset.from_dict({"text": CORPUS}),
            loss=GemLoss(model, alpha=0.5),
        ).train()
        return model

    return make


@pytest.mark.parametrize("from_disk", [True, False], ids=["from the disk", "in memory"])
def test_two_models_of_one_recipe_are_merged(make_trained, tmp_path, from_disk):
    models = [make_trained(seed) for seed in (1, 2)]
    scales = [model[0].logit_scale.item() for model in models]
    assert scales[0] != scales[1]
    sources = models
    if from_disk:
        sources = [str(tmp_path / name) for name in "ab"]
        for model, folder in zip(models, sources, strict=True):
            model.save_pretrained(folder)
        assert json.loads((tmp_path / "a" / "gem_config.json").read_text())["logit_scale"] == scales[0]
        sources = [hub.load(folder, device="cpu") for folder in sources]
    merged = SentenceTransformer.merge(sources)
    for (name, first), second, mean in zip(
        models[0].named_parameters(), models[1].parameters(), merged.parameters(), strict=True
    ):
        torch.testing.assert_close(mean, (first + second) / 2, msg=name)

    # The copy is a model of its own: the reference has the mean of all weights.
    reference = models[0]
    with torch.no_grad():
        for weight, mean in zip(reference.parameters(), merged.parameters(), strict=True):
            weight.copy_(mean)
    expected = reference.encode(CORPUS, convert_to_tensor=True)
    with torch.no_grad():
        for weight in [*reference.parameters(), *models[1].parameters()]:
            weight.zero_()
    torch.testing.assert_close(merged.encode(CORPUS, convert_to_tensor=True), expected)
    gem = merged[0]
    torch.testing.assert_close(gem.embed(gem.prefill(CORPUS)), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(str(tmp_path / "merged"))
    again = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode(CORPUS, convert_to_tensor=True), expected)
    assert again[0].logit_scale.item() == pytest.approx(sum(scales) / 2)


def test_models_of_two_bases_on_the_hub_are_of_one_recipe_too(make_trained):
    models = [make_trained(seed) for seed in (1, 2)]
    for model, name in zip(models, ("someone/first", "someone/second"), strict=True):
        model[0].base_model_name_or_path = name
        assert model[0].settings()["base_model_name_or_path"] == name
    SentenceTransformer.merge(models)


def test_models_of_other_recipes_are_not_merged(make_model, make_trained):
    model = make_trained(1)
    for options in ({"num_gem_tokens": 1}, {"num_gem_tokens": 2, "pooling": "concat"}):
        with pytest.raises(ValueError, match="different configuration in model 1"):
            SentenceTransformer.merge([model, make_model(**options)])
    frozen = [make_model(num_gem_tokens=2, freeze_base=True) for _ in range(2)]
    with pytest.raises(ValueError, match="PEFT adapters"):
        SentenceTransformer.merge(frozen)
