"""What a module is made of follows what is set on it."""

from __future__ import annotations

import copy

import pytest
import torch

from ..conftest import CORPUS


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
