"""Exports, what `verify` catches, stock modules, and the command line; all of it without a network."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gem_st import GemTransformer, hub
from gem_st.cli import app
from gem_st.files import hash_file
from gem_st.hub.layout import RELEASED_CODE
from gem_st.modeling.gem_checkpoint import hash_files

from ..conftest import ROOT, SIZES, build_tokenizer

TEXTS = ["It rained all day.", "", "\U0001f642 a letter", "She bought bread. " * 60, "two  spaces\n"]


def build(base: Path, *modules: torch.nn.Module, **kwargs) -> SentenceTransformer:
    torch.manual_seed(0)
    gem = GemTransformer(str(base), **kwargs)
    return SentenceTransformer(modules=[gem, *modules], prompts={"query": "find: "}, device="cpu")


@pytest.fixture(autouse=True)
def _verify_starts_sooner(python) -> Iterator[None]:
    """The process that `verify` starts is forked with the imports done; test_hub.py has it start a new one."""

    def run(command: list[str], cwd: str, env: dict[str, str] | None, **options: object) -> CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-c"]
        script = Path(cwd, "check.py")
        script.write_text(command[2])
        env = {**(env or os.environ), "HF_HOME": "hf", "HF_HUB_OFFLINE": "1"}
        return python.run(script, *command[3:], env=env, cwd=Path(cwd))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gem_st.hub.verifying.subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="module")
def exported(make_base, tmp_path_factory) -> Path:
    """An export that no test may change."""
    return hub.export(build(make_base(), num_gem_tokens=2), tmp_path_factory.mktemp("export") / "model")


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An export to be broken."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def findings(path: Path, **kwargs) -> dict[str, str]:
    """Findings of the checks that failed, by name."""
    checks = hub.verify(path, **kwargs).checks
    return {check.name: check.finding for check in checks if check.passed is False}


def rehash(folder: Path) -> None:
    """Make the list of hashes fit the files, as somebody would who exports again with broken ones."""
    path = folder / "gem_reference.json"
    reference = json.loads(path.read_text())
    reference["files"] = {name: hash_file(folder / name) for name in reference["files"]}
    path.write_text(json.dumps(reference))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


# ---- what verify finds


@pytest.mark.parametrize("kind", ["full", "frozen", "adapter_only"])
def test_an_export_passes(make_base, tmp_path, kind):
    model = build(make_base(tie_word_embeddings=False), Normalize(), freeze_base=kind != "full", num_gem_tokens=2)
    model[0].save_base = kind != "adapter_only"
    result = hub.verify(hub.export(model, tmp_path / "model"))
    assert result.passed, str(result)
    assert [check.name for check in result.checks] == [
        *("files", "no pickles", "remote code", "card", "embeddings", "generator")
    ]
    assert ("the base it names" in str(result)) == (kind == "adapter_only")


def test_all_files_may_be_read_like_others_made_here(make_base, tmp_path):
    """safetensors makes files that only their owner may read."""
    model = build(make_base(), freeze_base=True)
    hub.export(model, tmp_path / "gem")
    model[0].prefill(["It rained."]).save(tmp_path / "gem/cache.safetensors")
    (tmp_path / "other").touch()
    modes = {path: path.stat().st_mode for path in (tmp_path / "gem").rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "cache.safetensors"} <= {path.name for path in modes}
    assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}


def test_a_base_in_bfloat16_beside_an_adapter_in_float32_passes(make_base, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(make_base(), dtype=torch.bfloat16)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(make_base()).save_pretrained(base)
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        model = build(base, freeze_base=True, model_kwargs={"dtype": dtype})
        assert hub.verify(hub.export(model, tmp_path / name)).passed


def test_a_corrupted_weight_is_caught(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert findings(copy).keys() == {"files", "embeddings", "generator"}
    rehash(copy)
    assert findings(copy).keys() == {"embeddings", "generator"}


def test_weights_that_are_no_numbers_are_caught(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    rehash(copy)
    assert findings(copy).keys() == {"embeddings", "generator"}


def test_a_swapped_tokenizer_is_caught(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "Ġthe", "Ġa"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert findings(copy)["files"] == "tokenizer.json was changed"
    rehash(copy)
    assert "embeddings" in findings(copy)


def test_a_changed_remote_file_is_caught_and_not_run(copy, tmp_path):
    code = (copy / "gem_st.py").read_text()
    (copy / "gem_st.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code}")
    found = findings(copy)
    assert found["files"] == "gem_st.py was changed"
    assert "gem_config.json names" in found["remote code"]
    assert "embeddings" not in found  # skipped
    assert not hub.verify(copy).passed
    assert not (tmp_path / "ran").exists()


def change_code(folder: Path, name: str) -> str:
    """Have a checkpoint carry other code, and say so wherever its hash stands; gives the new hash."""
    settings = json.loads((folder / "gem_config.json").read_text())
    before = settings["remote_code_sha256"]
    with open(folder / name, "a") as file:
        file.write("\nANOTHER_VERSION = True\n")
    settings["remote_code"][name] = hash_file(folder / name)
    settings["remote_code_sha256"] = hash_files(settings["remote_code"])
    (folder / "gem_config.json").write_text(json.dumps(settings))
    card = (folder / "README.md").read_text()
    assert before in card
    (folder / "README.md").write_text(card.replace(before, settings["remote_code_sha256"]))
    rehash(folder)
    return settings["remote_code_sha256"]


@pytest.mark.parametrize("name", ["gem_st.py", "gem_mask.py"])
def test_code_of_another_version_runs_only_if_trusted(copy, name):
    change_code(copy, name)
    assert "pass trust_remote_code=True" in findings(copy)["remote code"]
    assert findings(copy, trust_remote_code=True) == {}
    with pytest.raises(ValueError, match="would run code that is not gem_st's: not that of gem_st"):
        hub.load(copy)
    assert hub.load(copy, trust_remote_code=True).encode("a").shape == (32,)


def test_code_of_a_released_version_runs_without_being_trusted(copy, monkeypatch):
    monkeypatch.setitem(RELEASED_CODE, change_code(copy, "gem_passes.py"), "0.0.9")
    assert hub.load(copy).encode("a").shape == (32,)
    code = next(check for check in hub.verify(copy).checks if check.name == "remote code")
    assert code.passed
    assert code.finding.startswith("that of gem_st 0.0.9, SHA-256 ")


def test_known_code_beside_other_code_does_not_pass_for_it(copy, tmp_path):
    """A copy of code that is known, under another name than the entry's, which is what runs."""
    decoy = copy / "gem_decoy.py"
    decoy.write_text("KNOWN = True\n")
    (copy / "gem_st.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for named in ({"gem_decoy.py": hash_file(decoy)}, ["gem_decoy.py"], {"gem_st.py": 0, "../gem_decoy.py": 1}):
        change(copy / "gem_config.json", remote_code=named, remote_code_sha256=hash_file(decoy))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RELEASED_CODE, hash_file(decoy), "0.0.9")
            with pytest.raises(ValueError, match="would run code that is not gem_st's"):
                hub.load(copy)
            assert not hub.verify(copy).passed
    assert not (tmp_path / "ran").exists()


def test_code_in_what_needs_none_is_reported(make_base, tmp_path):
    hub.export(build(make_base()), tmp_path / "stock", format="stock")
    (tmp_path / "stock" / "more.py").write_text("")
    assert "nothing else was expected, found ['more.py']" in findings(tmp_path / "stock")["remote code"]


def test_a_file_of_code_that_is_not_named_is_caught(copy):
    (copy / "gem_more.py").write_text("")
    assert "and nothing else was expected" in findings(copy)["remote code"]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


FOREIGN = [
    {"idx": 1, "name": "1", "path": "1_Other", "type": "other.Module"},
    {"idx": 1, "name": "1", "path": "1_Router", "type": "sentence_transformers.models.Router"},
    {"idx": 1, "name": "1", "path": "1_Transformer", "type": "sentence_transformers.models.Transformer"},
]


@pytest.mark.parametrize("module", FOREIGN, ids=lambda module: module["path"])
def test_other_modules_that_a_checkpoint_names_are_not_run(copy, module):
    modules = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps([*modules, module]))
    rehash(copy)
    assert module["type"] in findings(copy)["remote code"]
    with pytest.raises(ValueError, match=r"would run code that is not gem_st's: modules\.json names"):
        hub.load(copy)


@pytest.mark.parametrize("place", ["checkpoint", "base"])
@pytest.mark.parametrize("way", ["auto_map", "custom_generate"])
def test_code_that_a_base_brings_is_not_run(make_base, tmp_path, place, way):
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    model = build(base, freeze_base=True)
    model[0].save_base = place == "checkpoint"
    folder = hub.export(model, tmp_path / "export")
    where = folder if place == "checkpoint" else base
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM"
    if way == "auto_map":
        (where / "code.py").write_text(
            f"{code}\nclass Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): pass\n"
        )
        change(where / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    else:
        (where / "custom_generate").mkdir()
        (where / "custom_generate" / "generate.py").write_text(f"{code}\ndef generate(model, **kwargs): pass\n")
    hub.verify(folder)
    with contextlib.suppress(ValueError):  # where the changed base is not the one that was trained on
        hub.load(folder).encode("a")
    assert not (tmp_path / "ran").exists()


def test_files_that_were_added_are_told_apart(copy):
    added = {"vocab.txt", "more/config.json"}
    for name in (*added, "picture.png", "notes.txt", "results.json", "openvino/model.xml", "openvino/model.bin"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    found = findings(copy)
    assert found.keys() == {"files"}
    assert set(found["files"].split("; ")) == {f"{name} was added" for name in added}


def test_the_tolerance_is_not_the_checkpoints(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].normal_()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    rehash(copy)
    change(copy / "gem_reference.json", tolerance=1e9)
    assert findings(copy).keys() == {"embeddings", "generator"}


@pytest.mark.parametrize("name", ["training_args.bin", "weights.safetensors", "more.py", "gem_reference.json"])
def test_files_that_do_not_belong_are_caught(copy, name):
    if name == "gem_reference.json":
        (copy / name).unlink()
        result = hub.verify(copy)
        assert not result.passed
        assert [check.name for check in result.checks if check.passed is None] == ["files", "embeddings", "generator"]
        assert "skipped files         no gem_reference.json, which `gem-st export`" in str(result)
    elif name == "more.py":
        (copy / name).write_text("")
        assert {"files", "remote code"} <= findings(copy).keys()
    else:
        torch.save({"a": torch.zeros(2)}, copy / name)
        assert name in findings(copy)["no pickles"]


def test_a_missing_file_is_caught(copy):
    (copy / "generation_config.json").unlink()
    assert findings(copy)["files"] == "generation_config.json is missing"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("library_name: sentence-transformers", "library_name: mine", "library_name is 'mine'"),
        ("\n- gem\n", "\n", "the tag gem is missing"),
        ("SHA-256 `", "SHA-256 `0", ""),
        ("| mode | full |", "| mode | frozen base |", "it says mode frozen base"),
        ("| GEM tokens (K) | 2,", "| GEM tokens (K) | 4,", "it says K = 4"),
        ("tags:", "tags: [", "cannot be read"),
    ],
)
def test_a_card_with_wrong_metadata_is_caught(copy, old, new, expected):
    card = (copy / "README.md").read_text()
    assert old in card
    text = card.replace(old, new, 1)
    if not expected:
        digest = json.loads((copy / "gem_config.json").read_text())["remote_code_sha256"]
        text, expected = card.replace(digest, "0" * 64), "does not name the SHA-256"
    (copy / "README.md").write_text(text)
    assert expected in findings(copy)["card"]


def test_what_is_no_checkpoint_is_refused(make_base, tmp_path):
    for function in (hub.verify, hub.info, hub.load):
        with pytest.raises(ValueError, match="not a GEM checkpoint"):
            function(make_base())
        with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
            function("no such folder")
    stock = hub.export(build(make_base()), tmp_path / "stock", format="stock")
    with pytest.raises(ValueError, match="is the inner half of a stock export"):
        hub.verify(stock / "embedding")
    (stock / "gem_reference.json").write_text("{")
    with pytest.raises(ValueError, match=r"gem_reference\.json is not valid JSON"):
        hub.verify(stock)


# ---- exports


def test_an_export_is_whole_or_absent(make_base, tmp_path, monkeypatch):
    model, folder = build(make_base()), tmp_path / "new"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        hub.export(model, tmp_path / "full")
    with pytest.raises(ValueError, match="format must be one of"):
        hub.export(model, folder, format="onnx")

    def fill_the_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gem_st.hub.exporting.write_tensors", fill_the_disk)
    with pytest.raises(OSError, match="The disk is full") as caught:
        hub.export(model, folder)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    monkeypatch.undo()
    folder.mkdir()  # an empty folder will do
    assert hub.verify(hub.export(model, folder)).passed


def test_an_adapter_has_to_name_its_base(make_base, tmp_path):
    hub.export(build(make_base(), freeze_base=True), tmp_path / "whole")
    model = hub.load(tmp_path / "whole")
    model[0].save_base = False
    with pytest.raises(ValueError, match=r"set model\[0\]\.base_model_name_or_path"):
        hub.export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_is_not_gem_is_refused(make_base, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    backbone = Transformer(str(make_base()))
    with pytest.raises(ValueError, match="first module is a GemTransformer"):
        hub.export(SentenceTransformer(modules=[backbone, Pooling(32)]), tmp_path / "x")
    with pytest.raises(ValueError, match="first module is a GemTransformer"):
        hub.export("a folder", tmp_path / "x")


# ---- stock modules

STOCK = """
import json
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
assert all(type(module).__module__.startswith("sentence_transformers.") for module in model)
np.save(sys.argv[2], model.encode(json.loads(sys.argv[3])))
np.save(sys.argv[2].replace("out", "query"), model.encode("rain", prompt_name="query"))
"""


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "gpt_neo"])
@pytest.mark.parametrize("place", ["", "embedding"])
def test_a_stock_export_needs_no_remote_code(make_base, tmp_path, run_without_gem_st, architecture, place):
    model = build(make_base(architecture), Normalize(), max_seq_length=48)
    folder = hub.export(model, tmp_path / "stock", format="stock")
    run_without_gem_st(STOCK, folder / place, tmp_path / "out.npy", json.dumps(TEXTS))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "query.npy"), model.encode("rain", prompt_name="query"), atol=1e-5)
    assert not list(folder.rglob("*.py"))


def test_the_root_of_a_stock_export_is_a_clean_generator(make_base, tmp_path):
    base = make_base(tie_word_embeddings=False)
    model = build(base, model_kwargs={"attn_implementation": "eager"})
    folder = hub.export(model, tmp_path / "stock", format="stock")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    clean, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    appended = AutoTokenizer.from_pretrained(folder / "embedding")
    for text in TEXTS[:4]:
        ids = original(text)["input_ids"]
        assert clean(text)["input_ids"] == ids
        assert appended(text)["input_ids"] == [*ids, *model[0].gem_token_ids]
    long = appended(TEXTS[3], truncation=True, max_length=8)["input_ids"]
    assert len(long) == 8
    assert long[-1] == model[0].gem_token_ids[0]
    assert "<|gem|>" not in appended.get_vocab()
    assert model[0].gem_token_ids[0] not in appended("<|gem|>")["input_ids"][:-1]
    ids = clean("It rained", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model[0].model(ids).logits)
    assert plain.generation_config.suppress_tokens == model[0].gem_token_ids
    weights = [folder / "model.safetensors", folder / "embedding" / "model.safetensors"]
    assert weights[0].samefile(weights[1])
    assert hub.verify(folder).passed


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500_000.0},
        {
            **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        },
    ],
    ids=["theta", "llama3"],
)
def test_older_readers_find_the_rotary_base(tmp_path, rope):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer), "rope_parameters": rope})
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = build(base)
    folder = hub.export(model, tmp_path / "stock", format="stock")
    for place in (folder, folder / "embedding"):
        written = json.loads((place / "config.json").read_text())
        assert written["rope_theta"] == 500_000.0
        if rope["rope_type"] != "default":
            assert written["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
        settings = json.loads((place / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert AutoConfig.from_pretrained(place).rope_parameters == model[0].model.config.rope_parameters
    again = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_what_stock_modules_cannot_do_is_said(make_base, tmp_path):
    base = make_base()
    merged = build(base)
    merged.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for model, message in (
        (build(base, num_gem_tokens=2), "the mean of K requests"),
        (build(base, freeze_base=True), "A frozen base cannot be exported"),
        (merged, r"merge_lora\(model\)"),
        (build(base, GemTransformer(str(base))), "no module of Sentence Transformers' own"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.export(model, tmp_path / "stock", format="stock")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", ["$A", "<bos> $A <eos>", "<bos> <bos> $A <eos>"])
@pytest.mark.parametrize("is_last", [True, False])
def test_the_gem_token_joins_the_template_of_the_tokenizer(make_base, tmp_path, template, is_last):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(make_base()).save_pretrained(base)
    tokenizer = build_tokenizer()
    steps = [processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)])]
    steps.insert(0 if is_last else 1, processors.ByteLevel(trim_offsets=False))
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.save_pretrained(base)
    model = build(base)
    folder = hub.export(model, tmp_path / "stock", format="stock")
    loaded = SentenceTransformer(str(folder), device="cpu")
    ids = loaded.tokenizer("")["input_ids"]
    assert ids == [*tokenizer("")["input_ids"], *model[0].gem_token_ids]
    np.testing.assert_allclose(loaded.encode([*TEXTS, ""]), model.encode([*TEXTS, ""]), atol=1e-5)


def test_a_tokenizer_that_stock_modules_would_misread_is_refused(make_base, tmp_path, monkeypatch):
    backend = Tokenizer(models.WordLevel({"!": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(make_base()).save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(base)
    with pytest.raises(ValueError, match="no special token to pad with"):
        hub.export(build(base), tmp_path / "stock", format="stock")
    monkeypatch.setattr("gem_st.hub.stock.append_to_template", lambda processor, token, token_id: processor)
    with pytest.raises(
        ValueError, match=r"cannot be appended by a post-processor .* gives \[0\], and should give \[0, 400\]"
    ):
        hub.export(build(make_base()), tmp_path / "stock", format="stock")


def test_files_that_serving_engines_read(make_base, tmp_path):
    """Keys and values that vLLM, text-embeddings-inference and llama.cpp look for (docs/serving.md)."""
    folder = hub.export(build(make_base(), Normalize()), tmp_path / "stock", format="stock")
    for place, prefix in ((folder, "embedding/"), (folder / "embedding", "")):
        modules = json.loads((place / "modules.json").read_text())
        types = [module["type"] for module in modules]
        assert types == [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
        assert modules[1]["path"] == f"{prefix}1_Pooling"
        assert (place / modules[1]["path"] / "config.json").exists()
    pooling = json.loads((folder / "embedding" / "1_Pooling" / "config.json").read_text())
    legacy = {name: value for name, value in pooling.items() if name.startswith("pooling_mode_")}
    assert len(legacy) == 6
    assert [name for name, value in legacy.items() if value] == ["pooling_mode_lasttoken"]
    assert pooling["pooling_mode"] == "lasttoken"
    assert pooling["embedding_dimension"] == 32
    assert "word_embedding_dimension" not in pooling
    assert json.loads((folder / "embedding" / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    assert json.loads((folder / "embedding" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    processor = json.loads((folder / "embedding" / "tokenizer.json").read_text())["post_processor"]
    assert processor["type"] == "Sequence"
    assert processor["processors"][-1]["type"] == "TemplateProcessing"
    settings = json.loads((folder / "embedding" / "tokenizer_config.json").read_text())
    assert not {"add_bos_token", "add_eos_token"} & settings.keys()  # which would replace the post-processor


# ---- the command line


def test_each_command_has_help_with_an_example():
    assert run("--version")[1].startswith("gem-st ")
    for command in ("export", "verify", "push", "info"):
        code, output, _ = run(command, "--help")
        assert code == 0
        assert f"Example: gem-st {command} " in " ".join(output.split())


def test_the_commands_say_what_the_library_says(exported, copy, tmp_path):
    code, output, _ = run("verify", exported)
    assert code == 0
    assert output.count("\nok ") == 6
    (copy / "config_sentence_transformers.json").write_text("{}")
    code, output, _ = run("verify", copy, "--json")
    assert code == 1
    assert json.loads(output)["passed"] is False
    code, output, _ = run("info", exported, "--json")
    settings = json.loads(output)
    assert code == 0
    assert (settings["mode"], settings["num_gem_tokens"], settings["embedding_dimension"]) == ("full", 2, 32)
    hashes = {path.name: hash_file(path) for path in exported.glob("*.py")}
    assert settings["remote_code_sha256"] == hash_files(hashes)
    assert run("info", exported)[1].splitlines()[1].split() == ["mode", "full"]
    code, output, _ = run("export", exported, tmp_path / "again")
    assert code == 0
    assert f"gem-st verify {tmp_path / 'again'}" in output.replace("\n", " ")
    assert hub.verify(tmp_path / "again").passed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "{exported}", "{exported}"), 1, "is not empty"),
        (("export", "{exported}", "{new}", "--format", "stock"), 1, "The model has 2 GEM tokens"),
        (("export", "{exported}", "{new}", "--format", "onnx"), 2, "'onnx' is not one of"),
        (("export", "{exported}", "{new}", "--merge"), 1, "There is no adapter to merge"),
        (("verify", "no-such-folder"), 1, "neither a folder nor a Hub id"),
        (("verify",), 2, "Missing argument"),
        (("push", "{exported}", "nonsense"), 1, "neither a folder nor a Hub id"),
        (("push", "{exported}", "a/b"), 1, "There is no Hub token"),
        (("push", "{exported}", "a/b..c", "--token", "hf_x"), 1, "Cannot have -- or .. in repo_id"),
    ],
)
def test_bad_input_gets_one_line_and_a_status(exported, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setattr("gem_st.hub.pushing.get_token", lambda: None)
    names = {"exported": exported, "new": tmp_path / "new"}
    status, _, error = run(*(argument.format(**names) for argument in arguments))
    assert status == code
    if code == 1:
        error = error.splitlines()[-1]
        assert error.startswith("gem-st: ")
    assert message in " ".join(error.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("num_gem_tokens", [2, 5])
def test_requests_of_one_token_each(make_base, tmp_path, architecture, num_gem_tokens):
    """What docs/serving.md says of K > 1, as it stands there, with a bare backbone as the engine."""
    model = build(make_base(architecture), num_gem_tokens=num_gem_tokens)
    model.save_pretrained(str(tmp_path / "model"))
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "embed_by_requests" in b)
    backbone = AutoModel.from_pretrained(tmp_path / "model")

    @torch.no_grad()
    def last_token_embeddings(requests: list[list[int]]) -> np.ndarray:
        return np.stack([backbone(torch.tensor([ids])).last_hidden_state[0, -1] for ids in requests])

    names = {"SentenceTransformer": SentenceTransformer, "last_token_embeddings": last_token_embeddings}
    exec(block.replace('"model"', repr(str(tmp_path / "model"))), names)
    for text in TEXTS[:3]:
        np.testing.assert_allclose(names["embed_by_requests"](text), model.encode(text), atol=1e-5)
