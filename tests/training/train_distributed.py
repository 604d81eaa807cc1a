"""Trainings of test_distributed.py: run by the test itself in one process, and by `accelerate launch` in two."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from safetensors import torch as safetensors_torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gem_st import GemLoss, GemTransformer

RESUMES_ON_CPU = Version(transformers.__version__) >= Version("5.17")
"""Older versions ask torch for the optimizer's states on ``cpu:0`` and ``cpu:1``, which it does not know."""

STEPS, GLOBAL_BATCH, LEARNING_RATE = 3, 4, 0.05
PLAIN = {"plain_ratio": 1.0, "token_dropout": 0.0, "alpha": 0.5}
SUFFIX = {"plain_ratio": 0.0, "tasks": ["reconstruction"], "token_dropout": 0.0, "alpha": 0.5}
JOBS: dict[str, dict[str, Any]] = {
    "full_plain": {"loss": PLAIN, "columns": 1},
    "full_suffix": {"loss": SUFFIX, "columns": 2},
    "frozen_plain": {"loss": PLAIN, "columns": 2, "freeze_base": True},
    "frozen_suffix": {"loss": SUFFIX, "columns": 2, "freeze_base": True},
    "lora_suffix": {"loss": SUFFIX, "columns": 2, "lora": True},
}
"""Trainings in which every row is decided by its text."""


def make_model(base: str, freeze_base: bool, lora: bool) -> SentenceTransformer:
    torch.manual_seed(0)
    options = {"lora_kwargs": {"lora_alpha": 64}} if freeze_base else {}  # twice the rank: steps of SGD grow with it
    lora_rank = 32 if freeze_base else None
    gem = GemTransformer(base, num_gem_tokens=2, freeze_base=freeze_base, lora_rank=lora_rank, **options)
    model = SentenceTransformer(modules=[gem], device="cpu")
    if lora:
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():  # a LoRA starts at nothing; as if it had been trained
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def is_sharded(weight: Any) -> bool:
    """True for a weight of which this process holds a part (FSDP2, ZeRO 3)."""
    return hasattr(weight, "full_tensor") or getattr(weight, "ds_numel", weight.numel()) != weight.numel()


@contextmanager
def count_files_written() -> Iterator[list[str]]:
    """The names of the safetensors files that this process writes."""
    written: list[str] = []
    serialize = safetensors_torch.serialize_file

    def note(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        written.append(Path(path).name)
        serialize(tensors, path, *args, **kwargs)

    safetensors_torch.serialize_file = note
    try:
        yield written
    finally:
        safetensors_torch.serialize_file = serialize


def train(base: str, folder: str, texts: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Train with one text or pair of texts a row, save, and give the trainer's log and evaluation losses."""
    options = {"freeze_base": False, "lora": False, **job}
    loss, columns = options.pop("loss"), options.pop("columns")
    model = make_model(base, **options)
    batch_size = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1))
    arguments = SentenceTransformerTrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu="ACCELERATE_TORCH_DEVICE" not in os.environ,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({f"text{shift}": texts[shift:] + texts[:shift] for shift in range(columns)})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        loss=GemLoss(model, gather_across_devices=True, **loss),
    )
    if (plugin := trainer.accelerator.state.deepspeed_plugin) and plugin.zero_stage == 3:  # shards no weight this small
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer.train()
    losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    with count_files_written() as written:
        trainer.save_model(folder)
    return {
        "log": trainer.state.log_history,
        "eval_losses": losses,
        "sharded": [name for name, weight in trainer.model.named_parameters() if is_sharded(weight)],
        "sum": sum(float(weight.detach().double().sum()) for weight in trainer.model.parameters()),
        "written": written,
    }


def resume(base: str, folder: str, texts: list[str]) -> bool:
    """Whether training on random rows, resumed in the middle of an epoch, ends in the weights of one that was not."""
    ends = []
    for checkpoint in (None, f"{folder}/checkpoint-3"):
        model = make_model(base, freeze_base=False, lora=False)
        arguments = SentenceTransformerTrainingArguments(
            f"{folder}-resumed" if checkpoint else folder,
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts[:8]}),
            loss=GemLoss(model, alpha=0.5, plain_ratio=0.5, token_dropout=0.5),
        )
        if checkpoint:
            nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in model.parameters())), model.parameters())
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append([weight.detach().clone() for weight in model.parameters()])
    return all(map(torch.equal, *ends))


def run_jobs(base: str, folder: str, texts: list[str]) -> None:
    is_fsdp, is_deepspeed = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if is_fsdp or is_deepspeed:
        # accelerate shards on accelerators only: it is told that there are some, namely CPUs joined by gloo.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    for name, job in JOBS.items():
        if is_fsdp and "freeze_base" in job:
            os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"  # as the launcher's --fsdp_auto_wrap_policy sets it
        unset_hf_deepspeed_config()
        results = [None] * 2
        result = train(base, f"{folder}/{name}", texts, job)
        torch.distributed.all_gather_object(results, result)
        Path(folder, f"{name}.json").write_text(json.dumps(results))
    if RESUMES_ON_CPU and not (is_fsdp or is_deepspeed):
        is_same = [None] * 2
        torch.distributed.all_gather_object(is_same, resume(base, f"{folder}/resume", texts))
        Path(folder, "resume.json").write_text(json.dumps(is_same))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_jobs(*sys.argv[1:3], json.loads(sys.argv[3]))
