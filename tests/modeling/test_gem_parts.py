"""What a module is made of follows what is set on it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn

from gem_st import GemLoss

from ..conftest import CORPUS, quiet_arguments


@pytest.mark.parametrize("freeze_base", [False, True])
def test_a_model_that_is_set_is_the_one_that_runs(make_model, freeze_base):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base)
    gem = model[0]
    before = model.encode(CORPUS[:2], convert_to_tensor=True)
    other = copy.deepcopy(gem.model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(-1)
    gem.model = other
    assert gem.base.model is gem.model is other
    after = model.encode(CORPUS[:2], convert_to_tensor=True)
    assert (after - before).abs().max() > 0.01
    cached = gem.summarize(gem.prefill(CORPUS[:2]))
    torch.testing.assert_close(cached, after, atol=1e-5, rtol=1e-4)


def wrap_by_peft(model):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize(
    "wrap",
    [
        wrap_by_peft,
        nn.DataParallel,
        nn.Sequential,
        lambda model: model.base_model,
    ],
    ids=["peft", "DataParallel", "Sequential", "without its head"],
)
def test_a_wrapper_in_place_of_the_model_is_refused(make_model, wrap):
    model = make_model()
    kept, vectors = model[0].model, model.encode(CORPUS)
    with pytest.raises(ValueError, match=r"For a LoRA, use model.add_adapter\(LoraConfig\(...\)\)"):
        model[0].model = wrap(kept)
    assert model[0].model is kept
    assert (model.encode(CORPUS) == vectors).all()  # a new LoRA adds nothing


def test_a_compiled_model_is_taken(make_model):
    model = make_model()
    vectors = model.encode(CORPUS, convert_to_tensor=True)
    model[0].model = torch.compile(model[0].model, backend="eager")
    torch.testing.assert_close(model.encode(CORPUS, convert_to_tensor=True), vectors)


@pytest.mark.parametrize("freeze_base", [False, True])
def test_the_auto_model_is_what_stock_modules_have(make_model, tmp_path, freeze_base):
    model = make_model(freeze_base=freeze_base)
    gem = model[0]
    names, modules = list(gem.state_dict()), [name for name, _ in gem.named_modules()]
    model.save_pretrained(str(tmp_path / "before"))
    auto_model = gem.auto_model
    stock = Transformer(str(tmp_path / "before"))
    assert type(auto_model) is type(stock.auto_model)
    assert auto_model.config is gem.config is gem.model.config
    ids = torch.tensor([[0, 5, 7, 9]])
    with torch.no_grad():
        expected = stock.auto_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(auto_model(input_ids=ids).last_hidden_state, expected)
    assert (list(gem.state_dict()), [name for name, _ in gem.named_modules()]) == (names, modules)
    model.save_pretrained(str(tmp_path / "after"))
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("before", "after")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match=r"To compile it: model\[0\].auto_model.compile\(\)"):
        gem.auto_model = torch.compile(auto_model)
    assert gem.auto_model is auto_model


def test_a_trainer_that_would_wrap_the_model_in_data_parallel_is_refused(make_model, tmp_path):
    model, args = make_model(), quiet_arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2  # as where two GPUs are seen, and there is no launcher
    with pytest.raises(ValueError, match=r"sees 2 GPUs and no launcher, .* with `accelerate launch`"):
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict({"text": CORPUS}), loss=GemLoss(model)
        )


def test_no_replica_is_made_of_a_gem_module(make_model):
    """torch.nn.parallel.replicate calls this of every module, also in a training by another loss."""
    model = make_model()
    replicas = [module for module in model.modules() if module is not model[0]]
    for module in replicas:
        module._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"does not run in nn\.DataParallel.*accelerate launch"):
        model[0]._replicate_for_data_parallel()
    wrapped = nn.DataParallel(model[0])  # without a GPU, or of one, it calls the module itself
    features = model.preprocess(CORPUS)
    torch.testing.assert_close(
        wrapped(dict(features))["sentence_embedding"], model[0](dict(features))["sentence_embedding"]
    )
