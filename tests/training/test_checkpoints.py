"""Training that is killed, between two checkpoints or while one is written, goes on to the same weights."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import torch as safetensors_torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback, TrainerState

from gem_st import AlphaSchedule, GemLoss, GemTransformer, TwoPhaseLearningRate, last_checkpoint

from ..conftest import CORPUS, quiet_arguments

STEPS, SAVE_STEPS, KILLED_AT = 8, 3, 6
SPAWN = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
"""Where it can be, every child is forked from a process that has the imports done."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieBetweenCheckpoints(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT - 1:
            die()


def die_in_the_middle_of(path: str | os.PathLike) -> None:
    """Cut a file of the later checkpoint in half, as if its second half had not been written yet."""
    if f"checkpoint-{KILLED_AT}" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()


def arm(place: str) -> None:
    """Have this process die at a place of the checkpoint of step ``KILLED_AT``."""
    serialize, torch_save, save_state = safetensors_torch.serialize_file, torch.save, TrainerState.save_to_json

    def write_weights(tensors, path, *args, **kwargs):
        serialize(tensors, path, *args, **kwargs)
        if place == "weights":
            die_in_the_middle_of(path)

    def write_archive(value, path, *args, **kwargs):
        torch_save(value, path, *args, **kwargs)
        if Path(path).name == place:
            die_in_the_middle_of(path)

    def write_state(state, path):
        if place == "before trainer_state.json" and f"checkpoint-{KILLED_AT}" in path:
            die()
        save_state(state, path)
        if place == "trainer_state.json":
            die_in_the_middle_of(path)

    safetensors_torch.serialize_file, torch.save, TrainerState.save_to_json = write_weights, write_archive, write_state


PLACES = ["between", "weights", "optimizer.pt", "rng_state.pth", "before trainer_state.json", "trainer_state.json"]


def train(base: str, freeze_base: bool, folder: str, place: str = "") -> None:
    """Train, from the last checkpoint in the folder if there is one; what came out is written beside it."""
    torch.set_num_threads(1)
    torch.manual_seed(7 if last_checkpoint(folder) else 0)  # of the first run's numbers, a resumed one may use none
    options = {"freeze_base": True, "lora_rank": 4, "lora_kwargs": {"lora_dropout": 0.1}} if freeze_base else {}
    model = SentenceTransformer(modules=[GemTransformer(base, num_gem_tokens=2, **options)], device="cpu")
    arguments = quiet_arguments(
        folder,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1 if freeze_base else 2,
        logging_steps=1,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        loss=GemLoss(model, alpha=AlphaSchedule(1, 0.7), plain_ratio=0.5, token_dropout=0.5),
        callbacks=[
            TwoPhaseLearningRate(1e-2, 5e-3, num_ntp_steps=4),
            *([DieBetweenCheckpoints()] if place == "between" else []),
        ],
    )
    arm(place)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    result = {
        "weights": dict(model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "log": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
    }
    torch.save(result, f"{folder}.pt")


def run(*args: object) -> int:
    process = SPAWN.Process(target=train, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str, bool], dict]:
    """Function that gives what comes out of a training that nobody stops, with or without a frozen base."""
    if sys.platform == "linux":
        SPAWN.set_forkserver_preload([__name__])
    results: dict[tuple[str, bool], dict] = {}

    def get(base: str, freeze_base: bool) -> dict:
        if (base, freeze_base) not in results:
            folder = str(tmp_path_factory.mktemp("uninterrupted") / "out")
            assert run(base, freeze_base, folder) == 0
            results[base, freeze_base] = torch.load(f"{folder}.pt", weights_only=False)
        return results[base, freeze_base]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "freeze_base", "dtype"),
    [
        *((place, False, torch.float32) for place in PLACES),
        *((place, True, torch.float32) for place in PLACES if place != "rng_state.pth"),
        ("between", False, torch.bfloat16),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(make_base, uninterrupted, tmp_path, place, freeze_base, dtype):
    base, folder = str(make_base(attention_dropout=0.1, dtype=dtype)), tmp_path / "out"
    assert run(base, freeze_base, str(folder), place) == -signal.SIGKILL
    assert (folder / f"checkpoint-{KILLED_AT}").exists() == (place != "between")
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{SAVE_STEPS}")
    assert run(base, freeze_base, str(folder)) == 0
    expected, result = uninterrupted(base, freeze_base), torch.load(f"{folder}.pt", weights_only=False)

    keys = ("step", "loss", "ntp", "contrastive", "alpha", "scale", "learning_rate", "grad_norm")
    logs = [[[entry.get(key) for key in keys] for entry in each["log"]] for each in (expected, result)]
    assert len(logs[0]) == STEPS
    assert logs[1] == logs[0]
    assert [entry["alpha"] for entry in result["log"]][::3] == pytest.approx([0, 0.2, 0.5], abs=1e-4)
    assert len({entry["learning_rate"] for entry in result["log"]}) == 1 + STEPS - 4

    trained = {name for name, weight in result["weights"].items() if weight.requires_grad}
    assert len(result["optimizer"]) == len(trained)
    assert any("lora_B" in name for name in trained) == freeze_base
    assert ("0.gem_embeddings" if freeze_base else "0.model.model.embed_tokens.weight") in trained
    assert "0.logit_scale" in trained
    assert {result["weights"][name].dtype for name in trained} == {torch.float32}
    assert result["log"][SAVE_STEPS]["scale"] != pytest.approx(20.0, abs=1e-4)  # moved before the checkpoint
    for name, weight in expected["weights"].items():
        assert torch.equal(result["weights"][name], weight), name
    for index, state in expected["optimizer"].items():
        assert all(torch.equal(result["optimizer"][index][key], value) for key, value in state.items())


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "gem_adapter").mkdir(parents=True)
    save_file({"a": torch.arange(8.0), "b": torch.ones(3)}, checkpoint / "model.safetensors")
    save_file({"c": torch.arange(8.0)}, checkpoint / "gem_adapter" / "adapter_model.safetensors")
    torch.save({"step": step}, checkpoint / "optimizer.pt")
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    return checkpoint


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    for step in (10, 100, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "old-checkpoint-200").mkdir()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("name", ["model.safetensors", "gem_adapter/adapter_model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_a_file_that_was_cut_short_makes_a_checkpoint_incomplete(tmp_path, name, kept):
    write_checkpoint(tmp_path, 1)
    file = write_checkpoint(tmp_path, 2) / name
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    file.write_bytes(file.read_bytes()[:kept])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_saved_over_and_killed_is_incomplete(tmp_path):
    write_checkpoint(tmp_path, 1)
    newer = write_checkpoint(tmp_path, 2)
    (newer / "gem_part.x").mkdir()
    (newer / "gem_part.x" / "model.safetensors").write_bytes(b"cut")  # killed before anything was moved
    assert last_checkpoint(tmp_path) == str(newer)
    (newer / "modules.json").write_text('[{"path": "unfinished_save"}]')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("text", [None, "", '{"global_step": 2', "[]", b"\xff\xfe"])
def test_a_checkpoint_without_a_readable_state_is_incomplete(tmp_path, text):
    write_checkpoint(tmp_path, 1)
    state = write_checkpoint(tmp_path, 2) / "trainer_state.json"
    state.unlink() if text is None else state.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
