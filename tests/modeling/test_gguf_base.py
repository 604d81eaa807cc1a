"""A base that is a GGUF file: nothing else is needed, and the checkpoint beside it is the adapter alone."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gem_st import GemTransformer
from gem_st.modeling.gem_gguf import split_gguf

from ..conftest import CORPUS

pytest.importorskip("gguf")
from gguf import RopeScalingType

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


GEMMA = {"head_dim": 256, "layer_types": ["sliding_attention"] * 2, "sliding_window": 128}


@pytest.mark.parametrize(
    ("architecture", "kind", "options"),
    [
        ("llama", "llama", {}),
        ("mistral", "llama", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 128}),
        ("phi3", "phi3", {}),
        ("gemma3", "gemma3", GEMMA),
    ],
)
def test_vectors_are_those_of_the_dense_model(make_model, tmp_path, architecture, kind, options):
    """Of the one that the file was made of, which is not read by way of the file."""
    sizes = {"num_reserved": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, **options}
    dense = make_model(architecture=architecture, freeze_base=True, gem_tokens="reserved", **sizes)
    # Phi-3's configuration has an id to pad with that a small vocabulary has not.
    model = build(write_gguf(dense[0], tmp_path / "base.gguf", kind), config_kwargs={"pad_token_id": 1})
    assert model[0].gem_tokens.names == dense[0].gem_tokens.names
    lora = {name: value for name, value in dense[0].state_dict().items() if "lora_" in name}
    model[0].load_state_dict(lora, strict=False)
    assert np.allclose(model.encode(CORPUS), dense.encode(CORPUS), atol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}


def test_llama_3s_scaling_is_taken_from_the_file(make_model, tmp_path):
    sizes = {"num_reserved": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    dense = make_model(freeze_base=True, gem_tokens="reserved", rope_parameters=LLAMA3, **sizes)[0]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](dense.model.config, "cpu")
    factors = (500000.0 ** -(torch.arange(8) / 8) / scaled).numpy()
    assert factors.max() > 31
    write = lambda factors: lambda writer: writer.add_tensor("rope_freqs.weight", factors)  # noqa: E731
    model = build(write_gguf(dense, tmp_path / "base.gguf", then=write(factors)))
    assert model[0].model.config.rope_parameters == LLAMA3
    assert torch.allclose(model[0].model.model.rotary_emb.inv_freq, dense.model.model.rotary_emb.inv_freq)
    with pytest.raises(ValueError, match=r"it has rope_freqs\.weight"):
        build(write_gguf(dense, tmp_path / "other.gguf", then=write(factors * 1.1)))


def test_what_transformers_does_not_read_is_refused(make_model, tmp_path):
    sizes = {"num_reserved": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    dense, scaled = make_model(**sizes)[0], lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN)
    with pytest.raises(ValueError, match=r"it has rope\.scaling\.type\. Train beside the model"):
        build(write_gguf(dense, tmp_path / "a.gguf", then=scaled))
    gemma = make_model(architecture="gemma3", **{**sizes, "query_pre_attn_scalar": 16})[0]
    with pytest.raises(ValueError, match=r"it has attention\.key_length"):
        build(write_gguf(gemma, tmp_path / "b.gguf", "gemma3"))
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is no GGUF file, or was not downloaded completely"):
        build(tmp_path / "c.gguf")


def test_how_a_file_is_named(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for name, expected in {
        "org/name/x.gguf": ("org/name", "x.gguf"),
        "org/name/folder/x.gguf": ("org/name", "folder/x.gguf"),
        "org/name.gguf": ("org/name.gguf", None),
        "/models/my model.v2.gguf": ("/models", "my model.v2.gguf"),
        str(tmp_path / "folder.gguf"): (str(tmp_path / "folder.gguf"), None),
    }.items():
        assert split_gguf(name) == expected


def test_the_file_of_the_folder_is_meant_and_not_one_of_the_same_name_here(file, make_model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / file.name).write_bytes(b"another")
    model = build(file.parent, model_kwargs={"gguf_file": file.name, "dtype": torch.float32})
    assert model[0].base_model_name_or_path == str(file)


def test_folders_may_be_named_like_files(make_model, tmp_path):
    model = make_model(num_reserved=2)
    model.save_pretrained(str(tmp_path / "checkpoint.gguf"))
    assert np.array_equal(load(tmp_path / "checkpoint.gguf").encode(CORPUS), model.encode(CORPUS))


def test_what_lies_beside_the_file_stays(file):
    for name in ("config.json", "model.safetensors"):
        (file.parent / name).write_text("of another model")
    model = build(file)
    model.save_pretrained(str(file.parent))
    assert {(file.parent / name).read_text() for name in ("config.json", "model.safetensors")} == {"of another model"}
    assert np.array_equal(load(file.parent).encode(CORPUS), model.encode(CORPUS))


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
