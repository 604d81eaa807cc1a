"""The adapter for llama.cpp, read with the package that llama.cpp's own converter writes with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from typer.testing import CliRunner

from gem_st import GemTransformer
from gem_st.cli import app
from gem_st.hub import export

from ..conftest import CORPUS

gguf = pytest.importorskip("gguf")

from ..gguf_files import write_gguf  # noqa: E402


@pytest.fixture
def make(make_model):
    def make(**kwargs):
        return make_model(**{"freeze_base": True, "num_reserved": 2, "gem_tokens": "reserved", **kwargs})

    return make


SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
"""Rows of a multiple of 32 values, as quantised files have them."""


@pytest.mark.parametrize(
    ("architecture", "kind", "quantized"),
    [
        ("llama", "llama", "F32"),
        ("llama", "llama", "Q8_0"),
        ("mistral", "llama", "Q4_1"),
        ("qwen3", "qwen3", "F16"),
        ("qwen2", "qwen2", "Q5_1"),
        ("phi3", "phi3", "Q8_0"),
        ("gemma3", "gemma3", "Q4_0"),
    ],
)
def test_products_are_those_of_the_lora(make, tmp_path, architecture, kind, quantized):
    """What llama.cpp adds to each product is what PEFT adds, in the order that the file has rows in."""
    model = make(architecture=architecture, **SIZES)
    gem, base = model[0], tmp_path / "base.gguf"
    write_gguf(gem, base, kind, quantized)
    folder = export(model, tmp_path / "out", format="alora", gguf=base)
    reader = gguf.GGUFReader(folder / "gem-adapter.gguf")
    (token_id,) = reader.get_field("adapter.alora.invocation_tokens").contents()
    assert gem.tokenizer.convert_ids_to_tokens(token_id) == gem.gem_tokens.names[0]
    field = reader.get_field("adapter.alora.invocation_tokens")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]  # llama.cpp refuses int32
    assert [reader.get_field(f"{key}.type").contents() for key in ("general", "adapter")] == ["adapter", "lora"]
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = {name: layer for name, layer in gem.gem_model.named_modules() if hasattr(layer, "lora_A")}
    assert len(tensors) == 2 * len(layers)
    attention = gem.gem_model.model.layers[1].self_attn
    layer, place = (attention.qkv_proj, "attn_qkv") if kind == "phi3" else (attention.q_proj, "attn_q")
    first, second = (tensors[f"blk.1.{place}.weight.lora_{part}"] for part in "ab")
    expected = layer.get_delta_weight("default").detach().numpy()
    if kind == "llama":
        expected = expected.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.allclose(alpha / len(first) * second @ first, expected, atol=1e-5)
    readme = (folder / "README.md").read_text()
    line = "llama-server -m base.gguf --lora gem-adapter.gguf --embeddings --pooling cls -np 1 -b 512 -ub 512"
    assert line in readme
    saved = json.loads((folder / "reference_vectors.json").read_text())
    assert saved["end"] == 2 * gem.gem_tokens.names[0]
    assert f'"The train to the city is late.{saved["end"]}"' in readme
    assert "Train" in saved["texts"]  # of one token, the text that tells most
    assert np.allclose(model.encode(saved["texts"]), saved["vectors"], atol=1e-6)


def test_a_file_of_another_base_is_refused(make, tmp_path):
    model = make(**SIZES)
    gem = model[0]
    base = write_gguf(gem, tmp_path / "base.gguf", "llama", "Q4_0")
    other = make(**SIZES)[0]
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.4)  # as further training may leave it
    wrong = {
        "not the weight that the adapter was trained beside": write_gguf(other, tmp_path / "a.gguf", "llama", "Q4_0"),
        "the kind 'qwen3', and the adapter was trained on a 'llama'": write_gguf(gem, tmp_path / "b.gguf", "qwen3"),
        "another vocabulary": write_gguf(gem, tmp_path / "c.gguf", "llama", tokens=["a"] * 400),
        "is no GGUF file": tmp_path / "d.gguf",
        "of shape": write_gguf(make(hidden_size=32)[0], tmp_path / "e.gguf", "llama"),
    }
    (tmp_path / "d.gguf").write_bytes(b"GGUF")
    for message, path in wrong.items():
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out", format="alora", gguf=path)
        assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", format="alora", gguf=base)


def test_models_that_are_no_activated_lora_are_refused(make, make_model, tmp_path):
    cases = {
        "was trained in full mode": make_model(),
        "has 2 GEM tokens": make(num_gem_tokens=2),
        "a trained row of its own": make(gem_tokens="trained"),
        "products of two matrices": make(lora_kwargs={"use_dora": True}),
        "more than products": make(lora_kwargs={"lora_bias": True}),
        "more than products of two": make(lora_kwargs={"modules_to_save": ["input_layernorm"]}),
        "stores the weights of gpt_neo": make(architecture="gpt_neo"),
    }
    cases["there is Dense"] = make()
    cases["there is Dense"].append(Dense(32, 8, module_input_name="sentence_embedding"))
    path = write_gguf(make()[0], tmp_path / "base.gguf", "llama")
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out", format="alora", gguf=path)
    for options in ({"format": "alora"}, {"format": "gem", "gguf": path}):
        with pytest.raises(ValueError, match='format="alora" needs gguf='):
            export(make(), tmp_path / "out", **options)


def test_texts_that_are_cut_are_none_to_compare_with(make, tmp_path):
    """The server cuts none."""
    model = make(max_seq_length=20, **SIZES)
    folder = export(model, tmp_path / "out", format="alora", gguf=write_gguf(model[0], tmp_path / "base.gguf"))
    texts = json.loads((folder / "reference_vectors.json").read_text())["texts"]
    assert {"", "Train", "Late."} <= {*texts}
    assert all(len(model.tokenizer(text)["input_ids"]) < 20 for text in texts)


def test_the_command_line(make, tmp_path):
    model = make(**SIZES)
    model.save_pretrained(str(tmp_path / "checkpoint"))
    base = write_gguf(model[0], tmp_path / "base.gguf", "llama", "Q8_0")
    command = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--format", "alora"]
    result = CliRunner().invoke(app, [*command, "--gguf", str(base), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "gem-adapter.gguf").stat().st_size < 200_000
    assert model.encode(CORPUS).shape == (8, 64)
    refused = CliRunner().invoke(app, [*command[:2], str(tmp_path / "other"), *command[3:]])
    assert refused.exit_code == 1
    assert "needs gguf=" in refused.output


def test_the_base_may_have_moved_to_where_the_export_is_told(make, tmp_path):
    base = write_gguf(make(**SIZES)[0], tmp_path / "base.gguf")
    gem = GemTransformer(str(base), freeze_base=True, gem_tokens="reserved")
    SentenceTransformer(modules=[gem], device="cpu").save_pretrained(str(tmp_path / "checkpoint"))
    moved = base.rename(tmp_path / "moved.gguf")
    command = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--format", "alora", "--gguf", str(moved)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "llama-server -m moved.gguf" in (tmp_path / "out" / "README.md").read_text()
