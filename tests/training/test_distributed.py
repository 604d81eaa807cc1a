"""Two processes started by `accelerate launch` train what one process trains with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from packaging.version import Version
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer

from ..conftest import CORPUS, ROOT
from .train_distributed import JOBS, RESUMES_ON_CPU, make_model, train

TEXTS = CORPUS * 2
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
NEEDS_TORCH = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13.0.dev"),
    reason="torch 2.7 to 2.10 mix up the collectives of FSDP2 over gloo",
)
ENGINES = [
    "ddp",
    pytest.param("fsdp2", marks=NEEDS_TORCH),
    *(pytest.param(f"deepspeed_zero{i}", marks=NEEDS_DEEPSPEED) for i in (2, 3)),
]
CONFIGS = ROOT / "examples" / "accelerate"


@pytest.fixture(scope="module")
def base(make_base) -> str:
    return str(make_base(vocab_size=404, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> Callable[[str], tuple[Path, dict]]:
    """Function that trains a job in this process; gives the checkpoint and the trainer's log."""
    folder, results = tmp_path_factory.mktemp("alone"), {}

    def run(name: str) -> tuple[Path, dict]:
        if name not in results:
            results[name] = train(base, str(folder / name), TEXTS, JOBS[name])
        return folder / name, results[name]

    return run


@pytest.fixture(scope="module")
def launched(base, tmp_path_factory) -> Callable[[str], Path]:
    """Function that trains all jobs by two processes with a configuration of examples/accelerate; gives the folder."""
    folders: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in folders:
            folders[engine] = launch(engine, base, tmp_path_factory.mktemp(engine))
        return folders[engine]

    return run


def launch(engine: str, base: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{engine}.yaml"]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    script = [ROOT / "tests" / "training" / "train_distributed.py", base, folder, json.dumps(TEXTS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if engine == "ddp":
        env["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(list(map(str, [*command, *options, *script])), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def weights_of(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_does(base, alone, launched, engine, name):
    """The weights after three steps of SGD, as the checkpoint has them, are those of the same global batches."""
    folder = launched(engine)
    results = json.loads((folder / f"{name}.json").read_text())
    reference, expected = alone(name)
    assert bool(results[0]["sharded"]) == (engine in ("fsdp2", "deepspeed_zero3"))
    for key in ("loss", "grad_norm", "eval_loss"):
        values = [[entry[key] for entry in each["log"] if key in entry] for each in (results[0], expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
        assert len(values[0]) >= 2
    for result in results:
        assert result["eval_losses"][0] == result["eval_losses"][1]
    if engine == "ddp":
        assert results[0]["sum"] == results[1]["sum"]

    options = {"freeze_base": False, "lora": False, **JOBS[name]}
    before = weights_of(make_model(base, options["freeze_base"], options["lora"]))
    after, one = weights_of(load(folder / name)), weights_of(load(reference))
    assert after.keys() == one.keys()
    moved = [
        weight for weight in one if weight in before and not torch.allclose(one[weight], before[weight], atol=1e-4)
    ]
    assert len(moved) > 5
    for weight in one:
        assert torch.allclose(after[weight], one[weight], atol=1e-5), weight


@pytest.mark.slow
@pytest.mark.skipif(not RESUMES_ON_CPU, reason="transformers before 5.17 resumes no two processes on the CPU")
def test_two_processes_resume_to_the_same_weights(launched):
    folder = launched("ddp")
    assert json.loads((folder / "resume.json").read_text()) == [True, True]
    assert (folder / "resume" / "checkpoint-3" / "rng_state_1.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_written_once_and_embeds_what_one_process_embeds(alone, launched, engine, name):
    folder = launched(engine)
    first, second = json.loads((folder / f"{name}.json").read_text())
    assert first["written"]
    assert len(first["written"]) == len(set(first["written"]))
    assert second["written"] == []
    reference, _ = alone(name)
    assert sorted(path.name for path in (folder / name).rglob("*")) == sorted(
        path.name for path in reference.rglob("*") if path.name != "eval"
    )
    vectors = [load(path).encode(CORPUS, convert_to_tensor=True) for path in (folder / name, reference)]
    assert torch.allclose(*vectors, atol=5e-4)


def test_a_frozen_base_that_would_be_sharded_by_layers_is_refused(base, monkeypatch):
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", config["fsdp_auto_wrap_policy"])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", config["fsdp_transformer_layer_cls_to_wrap"])
    with pytest.raises(ValueError, match=r"shard by TRANSFORMER_BASED_WRAP \['LlamaDecoderLayer'\].*Use DDP"):
        GemTransformer(base, freeze_base=True)
    GemTransformer(base)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    with pytest.raises(ValueError, match="shard by SIZE_BASED_WRAP"):
        GemTransformer(base, freeze_base=True)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    GemTransformer(base, freeze_base=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_knows_every_option_of_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"
