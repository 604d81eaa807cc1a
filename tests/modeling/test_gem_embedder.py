"""The parts that a server calls with token ids of its own: embedder, reader, generator. None of them keeps anything."""

from __future__ import annotations

import pytest
import torch

from ..conftest import CORPUS


@pytest.mark.parametrize("freeze_base", [False, True])
@torch.no_grad()
def test_ids_in_vectors_and_ids_out(make_model, freeze_base):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base).eval()
    gem = model[0]
    ids = gem.base.text.encode(CORPUS[:3])
    before = {name: dict(vars(getattr(gem, name))) for name in ("embedder", "reader", "generator")}

    vectors = gem.embedder.embed_ids(ids)
    torch.testing.assert_close(vectors, model.encode(CORPUS[:3], convert_to_tensor=True), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="nothing to embed"):
        gem.embedder.embed_ids([])

    cache = gem.reader.append(gem.reader.append(None, [row[:3] for row in ids]), [row[3:] for row in ids])
    torch.testing.assert_close(gem.embedder.embed_cache(cache), vectors, atol=1e-5, rtol=1e-4)

    row = torch.tensor([ids[0]])
    output = gem.generator.continue_ids(row, torch.ones_like(row), max_new_tokens=5, do_sample=False)
    text = gem.base.text.decode_continuation(output.sequences[0], row.shape[1])
    assert text == gem.generate(CORPUS[0], max_new_tokens=5, do_sample=False)
    assert before == {name: dict(vars(getattr(gem, name))) for name in before}


@torch.no_grad()
def test_weights_that_were_written_to_have_another_id(make_model):
    base = make_model(freeze_base=True)[0].base
    first = base.weights_id()
    assert base.weights_id() == first
    base.model.get_input_embeddings().weight.data.mul_(2)  # which torch does not count
    assert base.weights_id() != first
