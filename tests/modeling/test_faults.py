"""A process killed at any moment, a full disk, damaged files: the right vectors or a clear error, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoTokenizer

from gem_st import GemTransformer, hub

from ..conftest import CORPUS, ROOT

TEXTS = CORPUS[:3]
UNFINISHED = "was not saved completely"

KILL = """
import hashlib, json, os, signal, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch

torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from tests.modeling.test_faults import arm_kill, hash_folder, try_encode

old, new, target = (Path(path) for path in sys.argv[2:])
model, states, outcomes = SentenceTransformer(str(new), trust_remote_code=True, device="cpu"), set(), []
moment, code = 0, -signal.SIGKILL
while code == -signal.SIGKILL:
    shutil.rmtree(target, ignore_errors=True)
    if old.name != "nothing":
        shutil.copytree(old, target)
    if (pid := os.fork()) == 0:
        arm_kill(target, moment)
        model.save_pretrained(str(target))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    state, moment = hash_folder(target), moment + 1
    if state not in states:
        states.add(state)
        outcomes.append(try_encode(target))
print(json.dumps([code, moment, outcomes]))
"""


def arm_kill(folder: Path, moment: int) -> None:
    """Kill this process when it is about to make, write, move or remove something in a folder for so many times.

    Files that are not in their place yet do not count.
    """
    count = 0

    def listen(event: str, details: tuple) -> None:
        nonlocal count
        is_write = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        is_write |= (
            event == "open" and bool(details[2] & (os.O_WRONLY | os.O_RDWR)) and "gem_part." not in str(details[0])
        )
        if is_write and str(details[0]).startswith(str(folder)):
            count += 1
            if count > moment:
                os.kill(os.getpid(), 9)

    sys.addaudithook(listen)


def hash_folder(folder: Path) -> tuple:
    """What a folder holds, but for what is not in its place yet."""
    files = (
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.relative_to(folder).parts[0].startswith("gem_part")
    )
    return tuple((str(file), file.read_bytes()) for file in sorted(files))


def try_encode(folder: Path) -> list | str:
    """Vectors, or the error."""
    try:
        classes = {"gem_st.GemTransformer": GemTransformer}  # instead of the copy in the folder, to save time
        model = SentenceTransformer._load_with_module_classes(str(folder), classes, device="cpu", local_files_only=True)
        return model.encode(TEXTS).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def build(base: Path, seed: int, *modules: torch.nn.Module, **options: object) -> SentenceTransformer:
    torch.manual_seed(seed)
    model = SentenceTransformer(modules=[GemTransformer(str(base), **options), *modules], device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "logit_scale" not in name:
                weight += 0.1 * torch.randn_like(weight)
    return model


FROZEN = {"freeze_base": True}
CHANGES = {
    "full, with a head": ({}, {"num_gem_tokens": 3}),
    "frozen": (FROZEN, FROZEN),
    "to frozen": ({}, FROZEN),
    "new": (None, FROZEN),
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("change", CHANGES)
def test_a_save_that_is_killed_leaves_what_was_there_or_what_cannot_be_loaded(make_base, tmp_path, python, change):
    expected = {"nothing": "nothing"}
    for name, seed, options in zip(("old", "new"), (0, 1), CHANGES[change], strict=True):
        if options is not None:
            head = [Dense(32, 8)] if "head" in change else []
            model = build(make_base(pad_token_id=1), seed, *head, **options)
            model.save_pretrained(str(tmp_path / name))
            expected[name] = model.encode(TEXTS)
    (tmp_path / "script.py").write_text(KILL)
    old = tmp_path / ("old" if "old" in expected else "nothing")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = python.run("script.py", ROOT, old, tmp_path / "new", tmp_path / "target", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, num_moments, outcomes = json.loads(done.stdout)
    assert (code, num_moments > 30) == (0, True)  # the last one saved all of it
    found = [name_of(outcome, expected) for outcome in outcomes]
    assert (found[0], found[-1]) == (old.name, "new")
    assert set(found) <= {old.name, "new", UNFINISHED}
    assert UNFINISHED in found


def name_of(outcome: list | str, expected: dict[str, np.ndarray]) -> str:
    """Which vectors these are, or what the error says."""
    if isinstance(outcome, str):
        missing = ("Unrecognized model", "not found")
        return UNFINISHED if UNFINISHED in outcome else "nothing" if any(m in outcome for m in missing) else outcome
    vectors = np.array(outcome, dtype=np.float32)
    shaped = [name for name, value in expected.items() if np.shape(value) == vectors.shape]
    return next((name for name in shaped if np.allclose(expected[name], vectors, atol=1e-6)), "wrong vectors")


FULL_DISK = """
import json, resource, sys

sys.path.insert(0, sys.argv[1])
import torch

torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from gem_st import GemCache

model = SentenceTransformer(sys.argv[3], trust_remote_code=True, device="cpu")
cache, messages = model[0].prefill(["a text"]), []
cache.save(sys.argv[4])
cache = model[0].prefill(["another text, which is longer " * 20])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for save in (lambda: model.save_pretrained(sys.argv[2]), lambda: cache.save(sys.argv[4])):
    try:
        save()
    except Exception as error:
        messages.append(str(error))
print(json.dumps([messages, len(GemCache.load(sys.argv[4]).input_ids[0])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
def test_a_full_disk_leaves_what_was_there(make_base, tmp_path, python, options):
    old, new = (build(make_base(), seed, **options) for seed in (0, 1))
    old.save_pretrained(str(tmp_path / "target"))
    new.save_pretrained(str(tmp_path / "new"))
    before = {file.name for file in (tmp_path / "target").iterdir()}
    (tmp_path / "script.py").write_text(FULL_DISK)
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    paths = [ROOT, *(tmp_path / name for name in ("target", "new", "cache.safetensors"))]
    done = python.run("script.py", *paths, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    messages, num_tokens = json.loads(done.stdout)
    assert len(messages) == 2
    assert all("File too large" in message for message in messages)  # as a full disk, by a limit that needs no root
    assert num_tokens < 10
    assert {file.name for file in (tmp_path / "target").iterdir()} == before
    assert np.allclose(try_encode(tmp_path / "target"), old.encode(TEXTS), atol=1e-6)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "other bytes": lambda content: b"\xff\xfe" + content[2:],
}


@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
def test_damaged_files_give_an_error_or_the_same_vectors(make_base, tmp_path, options):
    model = build(make_base(), 0, **options)
    model.save_pretrained(str(tmp_path / "model"))
    expected = model.encode(TEXTS)
    files = [file for kind in ("json", "safetensors") for file in sorted((tmp_path / "model").rglob(f"*.{kind}"))]
    for file in files:
        for damage, change in DAMAGES.items():
            folder = Path(shutil.copytree(tmp_path / "model", tmp_path / "damaged", dirs_exist_ok=True))
            name = str(file.relative_to(tmp_path / "model"))
            (folder / name).write_bytes(change(file.read_bytes()))
            outcome = try_encode(folder)
            if isinstance(outcome, str):
                is_ours = name not in ("modules.json", "config_sentence_transformers.json")  # read before the module
                assert not is_ours or file.name in outcome, (name, damage, outcome)
            else:
                assert np.allclose(outcome, expected, atol=1e-6), (name, damage)
                assert name == "generation_config.json" or (file.suffix == ".json" and damage == "cut at the end")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gem_tokens": 2}, "are not the ids of 2 GEM tokens"),
        ({"gem_token_ids": [-1]}, "are not the ids of 1 GEM tokens"),
        ({"gem_token_ids": [1.5]}, "are not the ids of 1 GEM tokens"),
        ({"gem_token_ids": None}, "gem_token_ids cannot be None"),
        ({"gem_token_ids": "a"}, "gem_token_ids cannot be 'a'"),
        ({"gem_token_ids": [[]]}, "are not the ids of 1 GEM tokens"),
        ({"num_gem_tokens": "1", "pooling": 3}, "num_gem_tokens cannot be '1', pooling cannot be 3"),
        ({"pooling": "evil"}, "pooling must be one of"),
        ({"max_seq_length": "a"}, "max_seq_length cannot be 'a'"),
        ({"max_seq_length": 1}, "max_seq_length=1 must be more than"),
        ({"logit_scale": "x"}, "logit_scale cannot be 'x'"),
        ({"freeze_base": "yes"}, "freeze_base cannot be 'yes'"),
        ({"save_base": 0}, "save_base cannot be 0"),
        ({"save_base": False, "base_model_name_or_path": 5}, "base_model_name_or_path cannot be 5"),
        ({"save_base": False, "base_model_name_or_path": "../../etc"}, "its base, '../../etc'"),
        ({"pooling": ...}, "it lacks pooling"),
        ([], "no JSON object"),
        ("text", "no JSON object"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
def test_settings_that_cannot_be(make_base, tmp_path, options, change, message):
    build(make_base(), 0, **options).save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "gem_config.json").read_text())
    changed = {**settings, **change} if isinstance(change, dict) else change
    if isinstance(change, dict):
        changed = {name: value for name, value in changed.items() if value is not ...}
    (tmp_path / "gem_config.json").write_text(json.dumps(changed))
    outcome = try_encode(tmp_path)
    assert outcome[:12] == "ValueError: "
    assert message in outcome


@pytest.mark.parametrize("way", ["other order", "other merges", "adds no <bos>"])
@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
def test_a_tokenizer_of_the_same_size_that_reads_otherwise(make_base, tmp_path, options, way):
    build(make_base(), 0, **options).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if way == "other order":
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    elif way == "other merges":
        content["model"]["merges"] = []
    else:
        content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    outcome = try_encode(tmp_path)
    assert isinstance(outcome, str)
    assert "tokenizer" in outcome


def test_a_padding_token_added_later_changes_nothing(make_base, tmp_path):
    model = build(make_base(), 0)
    model.save_pretrained(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert np.allclose(try_encode(tmp_path), model.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
@pytest.mark.parametrize("is_absolute", [False, True])
def test_names_of_weights_cannot_leave_the_folder(make_base, tmp_path, options, is_absolute):
    folder = tmp_path / "model"
    build(make_base(), 0, **options).save_pretrained(str(folder))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    place = str(tmp_path / "outside.safetensors") if is_absolute else "../outside.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names weights outside its folder" in try_encode(folder)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("options", [{}, FROZEN, {"num_gem_tokens": 2}], ids=["full", "frozen", "K = 2"])
def test_running_out_of_memory_leaves_the_model_as_it_was(make_base, monkeypatch, options, error):
    model = build(make_base(), 0, **options)
    gem, layer = model[0], model[0].model.model.layers[1]
    cache = gem.prefill(TEXTS)

    def run_all() -> list[object]:
        memory = gem.compress(TEXTS)
        return [
            model.encode(TEXTS),
            gem.embed(cache).numpy(),
            gem.generate(TEXTS, max_new_tokens=3, do_sample=False),
            gem.embed(gem.extend(cache, "more")).numpy(),
            memory.layers[0][0].numpy(),
            gem.reconstruct(memory),
        ]

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    expected, state = run_all(), [module.training for module in gem.modules()]
    with monkeypatch.context() as patch:
        layers = [m for m in gem.modules() if type(m) is type(layer)]
        for each in layers:
            patch.setattr(each, "forward", fail)
        calls = [
            lambda: model.encode(TEXTS),
            lambda: gem.prefill(TEXTS),
            lambda: gem.embed(cache),
            lambda: gem.generate(TEXTS, max_new_tokens=3),
            lambda: gem.compress(TEXTS),
        ]
        for call in calls:
            with pytest.raises(type(error), match=r"allocate memory|CUDA out of memory\.[\s\S]*smaller batch_size"):
                call()
    assert [module.training for module in gem.modules()] == state
    for found, wanted in zip(run_all(), expected, strict=True):
        assert np.array_equal(found, wanted) if isinstance(wanted, np.ndarray) else found == wanted


@pytest.mark.parametrize("content", ["{", "[]", '{"remote_code": null}', '{"remote_code": 5}'])
def test_a_damaged_checkpoint_is_saved_over(make_base, tmp_path, content):
    model = build(make_base(), 0)
    model.save_pretrained(str(tmp_path))
    (tmp_path / "gem_config.json").write_text(content)
    assert isinstance(try_encode(tmp_path), str)
    model.save_pretrained(str(tmp_path))
    assert np.allclose(try_encode(tmp_path), model.encode(TEXTS), atol=1e-6)
    assert not list(tmp_path.glob("gem_part.*"))


def test_folders_that_a_tokenizer_writes_are_written_again(make_base, tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = build(make_base(), 0)
    model.tokenizer.chat_template = {"default": template, "tools": template}
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "additional_chat_templates/tools.jinja").exists()
        assert np.allclose(try_encode(tmp_path), model.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("options", [{}, FROZEN], ids=["full", "frozen"])
def test_a_module_saved_by_itself(make_base, tmp_path, options):
    model, new = build(make_base(), 0, **options), build(make_base(), 1, **options)
    folder = tmp_path / "not there" / "yet"
    model[0].save(str(folder))
    assert not (folder / "modules.json").exists()
    alone = SentenceTransformer(modules=[GemTransformer.load(str(folder))], device="cpu")
    assert np.allclose(alone.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    model.save_pretrained(str(folder))
    new[0].save(str(folder), max_shard_size="20KB")  # the way to shards, which save_pretrained does not pass on
    assert np.allclose(try_encode(folder), new.encode(TEXTS), atol=1e-6)


def test_one_of_two_modules_saved_by_itself(make_base, tmp_path):
    model = build(make_base(), 0, Dense(32, 8))
    model.save_pretrained(str(tmp_path))
    model[0].save(str(tmp_path))  # whose head may be another one's
    assert UNFINISHED in try_encode(tmp_path)
    with pytest.raises(ValueError, match=UNFINISHED):
        hub.load(tmp_path)
    model.save_pretrained(str(tmp_path))
    assert np.allclose(try_encode(tmp_path), model.encode(TEXTS), atol=1e-6)


def test_what_a_killed_save_left_is_removed_after_a_day(make_base, tmp_path):
    for name, age in (("gem_part.old", 25 * 3600), ("gem_part.new", 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    build(make_base(), 0).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.glob("gem_part.*")] == ["gem_part.new"]
