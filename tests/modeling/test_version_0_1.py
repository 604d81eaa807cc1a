"""What version 0.1 wrote, when a checkpoint carried one file of code: it is read, trusted, and trained on.

``data/version_0_1.tar.xz`` was made by that version, of models with 16 dimensions and random weights: for each mode the
checkpoint after two of four steps, the vectors it gave, and the weights that its training ended in.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from gem_st import GemLoss, GemTransformer, hub

from ..conftest import CORPUS, quiet_arguments

MODES = ["full", "frozen"]
VERSIONED = {"remote_code", "remote_code_sha256", "__version__", "transformers_version", "peft_version"}
"""Settings that name a version."""


@pytest.fixture
def written(tmp_path) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "version_0_1.tar.xz") as archive:
        # Python 3.11.2, which Debian 12 has, knows no filters; the archive is ours.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path / "version_0_1"


def load_here(folder: Path, mode: str) -> SentenceTransformer:
    """The checkpoint in the classes of this version."""
    gem = GemTransformer(str(folder), num_gem_tokens=2, freeze_base=mode == "frozen")
    return SentenceTransformer(modules=[gem], device="cpu")


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_gives_its_vectors_by_its_own_code_and_by_ours(written, mode):
    checkpoint = written / mode / "checkpoint-2"
    expected = load_file(written / mode / "vectors_at_2.safetensors")["embeddings"]
    own = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    loaded, ours = hub.load(checkpoint, device="cpu"), load_here(checkpoint, mode)  # without asking for trust
    assert type(own[0]) is not type(ours[0]) is type(loaded[0])
    with pytest.raises(ValueError, match=r"is of the code of version 0.1.*gem_st.hub.load"):
        GemLoss(own)
    for model in (own, loaded, ours):
        torch.testing.assert_close(model.encode(CORPUS[:3], convert_to_tensor=True), expected, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in ours.named_parameters()]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_of_it_anew_carries_todays_code(written, tmp_path, mode):
    model = load_here(written / mode / "checkpoint-2", mode)
    folder = written / mode / "checkpoint-2"  # over the old files
    expected = model.encode(CORPUS[:3], convert_to_tensor=True)
    model.save_pretrained(str(folder))
    assert (folder / "gem_mask.py").exists()
    again = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert torch.equal(again.encode(CORPUS[:3], convert_to_tensor=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_training_goes_on_to_the_weights_it_would_have_ended_in(written, tmp_path, mode):
    checkpoint = written / mode / "checkpoint-2"
    model = load_here(checkpoint, mode)
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=quiet_arguments(tmp_path / "run", **options),
        train_dataset=Dataset.from_dict({"text": CORPUS[:16]}),
        loss=GemLoss(model, alpha=0.5, plain_ratio=0.5),
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    moved = 0
    for name, expected in load_file(written / mode / "weights_at_4.safetensors").items():
        weight = model.get_parameter(name)
        moved += not torch.allclose(weight, before[name], atol=1e-3)
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3, msg=name)
    assert moved > 3


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_anew_is_what_version_0_1_saved_but_for_the_code(written, tmp_path, mode):
    old, new = written / mode / "checkpoint-2", tmp_path / "checkpoint-2"
    load_here(old, mode).save_pretrained(str(new))
    names = [path.relative_to(old).as_posix() for path in old.rglob("*") if path.is_file()]
    others = re.compile(r"trainer_state.json|\w+\.pth?|training_args.bin|README.md|gem_st.py")  # trainer, card, code
    compared = [name for name in names if not others.fullmatch(name)]
    assert {"modules.json", "gem_config.json", "tokenizer.json"} <= {*compared}
    for name in compared:
        before, after = ((folder / name).read_bytes() for folder in (old, new))
        if not name.endswith(".json"):
            assert before == after, name
            continue
        first, second = json.loads(before), json.loads(after)
        assert isinstance(first, list) or first.keys() <= second.keys(), name  # other releases of PEFT add their own
        for key in [] if isinstance(first, list) else first.keys() - VERSIONED:
            assert _sorted(first[key]) == _sorted(second[key]), (name, key)


def _sorted(value: object) -> object:
    """Without the order of names, which 0.1 wrote as its hash seed had it."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
