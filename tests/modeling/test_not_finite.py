"""A base whose numbers overflow is told so, and not that it lacks some property."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem_st import GemLoss, GemTransformer
from gem_st.modeling.gem_probes import is_same

from ..conftest import CORPUS, SIZES, build_tokenizer


@pytest.fixture
def make_folder(tmp_path):
    """Function that writes a base whose weights are edited."""

    def make(edit):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(build_tokenizer())}))
        with torch.no_grad():
            edit(model)
        model.save_pretrained(tmp_path)
        build_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def overflow(model):
    """Large activations in the first layer, as some models have them that were trained in bfloat16."""
    model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
    model.model.layers[0].mlp.up_proj.weight.mul_(1e3)


@pytest.mark.parametrize("options", [{}, {"num_gem_tokens": 3}, {"freeze_base": True}])
def test_float16_overflows_and_others_do_not(make_folder, options):
    folder = make_folder(overflow)
    with pytest.raises(FloatingPointError, match="not finite in float16; load in bfloat16 or float32"):
        GemTransformer(folder, model_kwargs={"dtype": torch.float16}, **options)
    for dtype in (torch.bfloat16, torch.float32):
        gem = GemTransformer(folder, model_kwargs={"dtype": dtype}, **options)
        assert gem.embed(gem.prefill(CORPUS)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"num_gem_tokens": 3}, {"freeze_base": True}])
def test_weights_that_are_no_numbers(make_folder, options):
    folder = make_folder(lambda model: model.model.layers[1].mlp.down_proj.weight[3].fill_(torch.nan))
    with pytest.raises(FloatingPointError, match="not finite in float32; look for NaN in the weights"):
        GemTransformer(folder, **options)


def test_an_output_head_that_is_no_number(make_folder, make_model):
    model = make_model()
    with torch.no_grad():
        model[0].model.lm_head.weight[5] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite in float32"):
        GemLoss(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_comparison_takes_it_for_a_difference(value):
    states = torch.ones(1, 3, 4)
    other = states.clone()
    other[0, 1, 2] = value
    for pair in ((states, other), (other, states), (other, other)):
        with pytest.raises(FloatingPointError, match="not finite"):
            is_same(*pair)
    assert is_same(states, states)
