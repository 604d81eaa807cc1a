"""A base that is a GGUF file: nothing else is needed, and the checkpoint beside it is the adapter alone."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer

from ..conftest import CORPUS

pytest.importorskip("gguf")

from ..gguf_files import write_gguf

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
OPTIONS = {"freeze_base": True, "gem_tokens": "reserved", "model_kwargs": {"dtype": torch.float32}}


@pytest.fixture
def file(make_model, tmp_path):
    dense = make_model(num_reserved=2, chat_template=TEMPLATE, hidden_size=64, intermediate_size=64, head_dim=16)
    (tmp_path / "models").mkdir()
    return write_gguf(dense[0], tmp_path / "models" / "base.gguf", quantized="Q8_0")


def build(base, **kwargs):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[GemTransformer(str(base), **{**OPTIONS, **kwargs})], device="cpu")
    with torch.no_grad():
        for name, weight in model[0].named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def load(folder, **model_kwargs):
    options = {"dtype": torch.float32, **model_kwargs}
    return SentenceTransformer(str(folder), trust_remote_code=True, model_kwargs=options, device="cpu")


def test_the_checkpoint_is_the_adapter_and_names_the_file_by_its_hash(file, tmp_path):
    model = build(file)
    gem = model[0]
    assert gem.tokenizer.chat_template == TEMPLATE
    before = gem.generate(["The train"], max_new_tokens=5)
    model.save_pretrained(str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not names & {"config.json", "model.safetensors", "tokenizer.json", "base.gguf"}
    assert sum(path.stat().st_size for path in (tmp_path / "out" / "gem_adapter").iterdir()) < 100_000
    saved = json.loads((tmp_path / "out" / "gem_adapter" / "base_fingerprint.json").read_text())
    assert saved["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()
    again = load(tmp_path / "out")
    assert np.array_equal(again.encode(CORPUS), model.encode(CORPUS))
    assert again[0].generate(["The train"], max_new_tokens=5) == before
    again.save_pretrained(str(tmp_path / "again"))
    assert np.array_equal(load(tmp_path / "again").encode(CORPUS), model.encode(CORPUS))


def test_file_and_folder_name_the_same(file):
    by_path, by_folder = build(file), build(file.parent, model_kwargs={"gguf_file": file.name, "dtype": torch.float32})
    assert np.array_equal(by_path.encode(CORPUS), by_folder.encode(CORPUS))
    assert by_path[0].base_model_name_or_path == by_folder[0].base_model_name_or_path == str(file)


def test_vectors_are_those_of_the_dense_model(file, tmp_path):
    model = build(file)
    dense = tmp_path / "dense"
    model[0].model.save_pretrained(dense)
    model[0].tokenizer.save_pretrained(dense)
    assert np.allclose(build(dense).encode(CORPUS), model.encode(CORPUS), atol=1e-6)


def test_a_file_that_moved_is_found_by_its_new_place_and_another_is_refused(file, make_model, tmp_path):
    model = build(file)
    model.save_pretrained(str(tmp_path / "out"))
    moved = tmp_path / "elsewhere.gguf"
    shutil.move(file, moved)
    with pytest.raises(ValueError, match=r"its base, .*base\.gguf.* cannot be loaded[\s\S]*pass model_kwargs"):
        load(tmp_path / "out")
    again = load(tmp_path / "out", gguf_file=str(moved))
    assert np.array_equal(again.encode(CORPUS), model.encode(CORPUS))
    again.save_pretrained(str(tmp_path / "again"))
    assert np.array_equal(load(tmp_path / "again").encode(CORPUS), model.encode(CORPUS))
    other = make_model(num_reserved=2, chat_template=TEMPLATE, hidden_size=64, intermediate_size=64, head_dim=16)
    write_gguf(other[0], moved, quantized="Q4_0")
    with pytest.raises(ValueError, match="trained on another base"):
        load(tmp_path / "out", gguf_file=str(moved))


def test_what_changed_since_loading_is_not_saved(file, tmp_path):
    model = build(file)
    model.load_state_dict(model.state_dict())  # writes, and changes nothing
    model.save_pretrained(str(tmp_path / "out"))
    with torch.no_grad():
        model[0].model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"up_proj\.weight was changed after loading"):
        model.save_pretrained(str(tmp_path / "out"))
    model = build(file)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="was changed since it was loaded"):
        model.save_pretrained(str(tmp_path / "out"))


def test_a_checkpoint_beside_it_cannot_hold_it(file, make_model, tmp_path):
    model = build(file)
    model[0].save_base = True
    with pytest.raises(ValueError, match="stays where it is"):
        model.save_pretrained(str(tmp_path / "out"))
    whole = make_model(num_reserved=2)
    whole.save_pretrained(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="Leave out gguf_file"):
        load(tmp_path / "whole", gguf_file=str(file))
    with pytest.raises(OSError, match=r"missing\.gguf"):
        build(file.with_name("missing.gguf"))


def test_full_mode_makes_a_dense_checkpoint_of_it(file, tmp_path):
    model = build(file, freeze_base=False, gem_tokens=None, num_gem_tokens=2)
    model.save_pretrained(str(tmp_path / "out"))
    again = load(tmp_path / "out")
    assert np.allclose(again.encode(CORPUS), model.encode(CORPUS), atol=1e-6)
    assert again[0].tokenizer.chat_template == TEMPLATE
