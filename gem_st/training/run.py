"""The run of `gem-st train`, by its settings. The Sentence-Transformers trainer does the training."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.utils import logging

from ..checkpoints import last_checkpoint
from ..files import write_json
from ..instructions import task_prompts
from ..losses import GemLoss
from ..losses.dataset_checks import check_dataset
from ..losses.schedules import AlphaSchedule, TwoPhaseLearningRate
from ..modeling.gem_checkpoint import read_settings
from ..modeling.gem_transformer import GemTransformer
from .config import TrainConfig, load_config
from .data import TrainData, as_texts, generate_texts, load_eval, load_source, read_texts, set_aside, write_texts
from .measures import describe_versions, measure
from .report import write_report
from .teacher import cut_pieces, follow_teacher

__all__ = ["TrainConfig", "TrainResult", "load_config", "train"]

logger = logging.get_logger(__name__)

GENERATED = "generated.jsonl"
"""File in the output folder with the texts that the base wrote."""

DATA_SETTINGS = (
    *("data", "split", "subset", "columns", "streaming", "num_rows", "self_generate", "held_out"),
    *("teacher", "pieces", "seed"),
)
"""What a training reads, and in which order: a training that is resumed skips what it has read."""

LARGE = 500_000_000
"""Parameters from which the default learning rate of full training is too high."""


@dataclass
class TrainResult:
    """What a training left behind.

    Attributes:
        folder: Of the checkpoint.
        report: The HTML file.
        before: Measures of the model as it was; empty where nothing was held out.
        after: The same after the training.
    """

    folder: Path
    report: Path
    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        rows = [f"{'':<42}{'before':>12}{'after':>12}"] if self.after else []
        for name, value in self.after.items():
            before = f"{self.before[name]:>12.4g}" if name in self.before else f"{'':>12}"
            rows.append(f"{name:<42}{before}{value:>12.4g}")
        return "\n".join([*rows, f"Checkpoint in {self.folder}, report in {self.report}"])


def train(config: TrainConfig) -> TrainResult:
    """Train a GEM model with the Sentence-Transformers trainer, save it, and write a report beside it.

    Args:
        config: The settings.

    Raises:
        ImportError: If a package is missing.
        ValueError: If settings, data or base do not fit each other; before the first step.
    """
    start = time.perf_counter()
    config.check()
    check_folder(config)
    data = load_data(config)
    has_default_rate = config.learning_rate is None
    config = config.resolve(data.num_rows, data.columns, read_context(config))
    set_seed(config.seed)
    model = build_model(config)
    if has_default_rate and config.mode == "full" and sum(p.numel() for p in model.parameters()) > LARGE:
        logger.warning(
            f"learning_rate {config.learning_rate} is for small bases; billions of weights take 1e-5 to 1e-4."
        )
    inner = None
    if config.teacher:
        data = follow_teacher(config.teacher, model, data)
        inner = EmbedDistillLoss(model, distance_metric="cosine")
    loss = GemLoss(model, loss=inner, **loss_options(config))
    trainer = build_trainer(config, model, loss, data)
    _refuse_sharding(trainer)
    prepare_folder(config)
    before = _load_state(config).get("before") if config.resume else measure(trainer, loss, data)
    state = {"before": before, "settings": _reported(config)}  # for a training that is resumed
    if trainer.is_world_process_zero():
        write_json(config.folder / "report.json", state)
    trainer.train(resume_from_checkpoint=last_checkpoint(config.folder) if config.resume else None)
    try:
        after = measure(trainer, loss, data)
    finally:  # after it, for the card; whatever becomes of it, the training is not lost
        if trainer.is_world_process_zero():
            model.save_pretrained(str(config.folder))
    content = {
        **state,
        "versions": describe_versions(),
        "num_rows": data.num_rows,
        "columns": data.columns,
        "seconds": round(time.perf_counter() - start),
        "after": after,
        "log_history": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_report(config.folder, content)
    return TrainResult(
        config.folder, config.folder / "report.html", (before or {}).get("metrics", {}), after.get("metrics", {})
    )


def _reported(config: TrainConfig) -> dict[str, Any]:
    return {name: _without_folders(value) for name, value in config.describe().items()}


def _without_folders(value: Any) -> Any:
    """A file or folder of this machine by its name alone, since reports are passed on."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    return Path(value).name if isinstance(value, str) and value and Path(value).exists() else value


def check_folder(config: TrainConfig) -> None:
    """See that nothing in the output folder would be lost unasked.

    Raises:
        ValueError: If it holds a base or data of this training, or other things, or a training and neither ``resume``
            nor ``overwrite`` is set, or there is nothing to resume from, or that is of another model or of other data.
    """
    folder = config.folder
    if config.resume and last_checkpoint(folder) is None:
        raise ValueError(f"There is no whole checkpoint in {folder} to resume from. Start without resume.")
    if config.resume:
        _check_same_training(config)
    for name in ("base", "data", "eval_data"):
        path = Path(str(getattr(config, name) or "")).expanduser()
        is_inside = path.exists() and folder.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents)
        if getattr(config, name) and is_inside:
            raise ValueError(f"{name} {path} lies in the output folder {folder}, where it would be written over.")
    trained = [path for path in (folder / "modules.json", *sorted(folder.glob("checkpoint-*"))) if path.exists()]
    if trained and not (config.resume or config.overwrite):
        raise ValueError(
            f"{folder} holds a training already ({trained[0].name}). Set resume to go on with it, overwrite to start "
            "anew, or another output."
        )
    others = [path.name for path in sorted(folder.glob("*")) if path.name not in (GENERATED, f"{GENERATED}.base")]
    if others and not trained and not set(others) <= {"report.json", "report.html", "runs"}:
        raise ValueError(f"{folder} is not empty (it holds {others[0]}), and no training. Name a new folder.")


def _check_same_training(config: TrainConfig) -> None:
    """Refuse to resume a training of another model, or of other data."""
    checkpoint = Path(str(last_checkpoint(config.folder)))
    saved = read_settings(checkpoint)
    model = {
        "num_gem_tokens": config.num_gem_tokens,
        "pooling": config.pooling,
        "freeze_base": config.mode == "frozen",
    }
    _require_same(f"{checkpoint} was trained", saved, model)
    names = saved.get("gem_token_names")
    is_other = {"trained": names is not None, "reserved": names is None}
    if config.gem_tokens and is_other.get(config.gem_tokens[0], config.gem_tokens != names):
        raise ValueError(
            f"{checkpoint} was trained with the rows of {names or 'GEM tokens of their own'}, not {config.gem_tokens}. "
            "Resume without gem_tokens."
        )
    if started := _load_state(config).get("settings"):
        settings = _reported(config)
        data = {name: settings.get(name) for name in DATA_SETTINGS}
        _require_same(f"The training in {config.folder} was started", started, data)


def _require_same(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{what} with {name}={before.get(name)}, not {value}. Resume with the settings it was started with."
            )


def prepare_folder(config: TrainConfig) -> None:
    """Make the output folder; with ``overwrite``, remove the training that it holds, now that another can start.

    Args:
        config: The settings.
    """
    process = processes(config)
    process.wait_for_everyone()
    if process.is_main_process:
        config.folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            for path in config.folder.glob("checkpoint-*"):
                shutil.rmtree(path)
            for name in ("report.json", "report.html"):
                (config.folder / name).unlink(missing_ok=True)
    process.wait_for_everyone()


def processes(config: TrainConfig) -> Any:
    """The processes of this training, as an accelerate PartialState."""
    from accelerate import PartialState

    arguments = config.training_arguments
    backend = {"backend": arguments["ddp_backend"]} if "ddp_backend" in arguments else {}
    return PartialState(cpu=bool(arguments.get("use_cpu")), **backend)


def load_data(config: TrainConfig, num_texts: int | None = None) -> TrainData:
    """Load what a training reads, or have the base write it.

    Args:
        config: The settings.
        num_texts: For a look only: have the base write no more than these, and keep none.

    Raises:
        ValueError: If a data set is not there, or lacks the columns.
    """
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(**config.pretrained)
    with processes(config).main_process_first():
        if config.self_generate:
            dataset: Any = Dataset.from_dict({"text": self_generated(config, num_texts)})
        else:
            source = load_source(str(config.data), split=config.split, subset=config.subset, streaming=config.streaming)
            dataset = as_texts(source, config.columns, tokenizer, "training set")
        eval_set, graded = None, None
        columns = list(dataset.column_names)
        if config.eval_data:
            wanted, split = config.eval_columns, config.eval_split or "train"
            eval_set, graded = load_eval(config.eval_data, split, wanted, columns, tokenizer)
    rows, held_out = set_aside(dataset, config.num_rows, config.held_out, config.seed)
    num_rows = None if config.streaming else len(rows)
    if config.num_rows and num_rows is not None and num_rows < config.num_rows:
        logger.warning(f"The training set has {num_rows} of the {config.num_rows} rows that num_rows asks for.")
    if next(iter(rows), None) is None:
        raise ValueError(f"The training set has no rows beside {len(held_out)} held out. Check how it was made.")
    check_dataset(rows, "training", reads_streams=True)
    check_dataset(eval_set, "evaluation", reads_streams=True)
    held_out = [row for row in held_out if all(isinstance(text, str) and text.strip() for text in row.values())]
    if config.pieces:
        rows = cut_pieces(rows, held_out, config.seed)
        num_rows = len(rows)
    return TrainData(rows, columns, num_rows, held_out, eval_set, graded)


def self_generated(config: TrainConfig, at_most: int | None = None) -> list[str]:
    """Texts that the base wrote for this training, from the output folder if they are there."""
    path, num = config.folder / GENERATED, config.self_generate or 0
    origin = json.dumps({"base": str(config.base), "seed": config.seed, "num": num})
    written = path.with_name(f"{GENERATED}.base")
    if written.exists() and written.read_text(encoding="utf-8") == origin:
        return read_texts(path)
    texts = generate_texts(config.pretrained, min(num, at_most or num), config.seed)
    if at_most is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_texts(path, texts)
        written.write_text(origin, encoding="utf-8")
    return texts


def read_context(config: TrainConfig) -> int | None:
    """Tokens that the base can read, from its config alone; None if it names no limit."""
    base = AutoConfig.from_pretrained(**config.pretrained).get_text_config()
    return getattr(base, "max_position_embeddings", None)


def build_model(config: TrainConfig) -> SentenceTransformer:
    """The model to be trained.

    Args:
        config: Resolved settings.
    """
    model_kwargs: dict[str, Any] = {**config.hub_kwargs, **({"dtype": config.dtype} if config.dtype else {})}
    if config.mode == "qlora":
        from transformers import BitsAndBytesConfig

        model_kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    gem_tokens: Any = config.gem_tokens
    if config.resume and config.mode == "frozen":  # the default may have been another
        gem_tokens = read_settings(Path(str(last_checkpoint(config.folder)))).get("gem_token_names") or ["trained"]
    if gem_tokens in (["reserved"], ["trained"]):
        gem_tokens = gem_tokens[0]
    gem = GemTransformer(
        str(config.base),
        num_gem_tokens=config.num_gem_tokens,
        pooling=config.pooling,
        max_seq_length=config.max_length,
        freeze_base=config.mode == "frozen",
        lora_rank=config.lora_rank if config.mode == "frozen" else None,
        gem_tokens=gem_tokens,
        model_kwargs=model_kwargs,
        processor_kwargs=config.hub_kwargs,
        config_kwargs=config.hub_kwargs,
    )
    model = SentenceTransformer(
        modules=[gem],
        prompts=task_prompts() if config.instructions else None,
        device="cpu" if config.training_arguments.get("use_cpu") else None,
    )
    if config.mode in ("lora", "qlora"):
        from peft import LoraConfig

        rank = config.lora_rank or 32
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return model


def loss_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of :class:`gem_st.GemLoss` by resolved settings."""
    alpha: Any = config.alpha
    if config.uses_schedule:
        alpha = AlphaSchedule(config.ntp_steps or 0, config.final_alpha or 0.0, config.rise_steps)
    options = {
        "plain_ratio": config.plain_ratio,
        "tasks": config.tasks or None,
        "views": config.views,
        "token_dropout": config.token_dropout,
        "alpha": alpha,
        "scale": config.scale,
        "mini_batch_size": config.mini_batch_size,
        "gather_across_devices": config.gather_across_devices or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def build_trainer(
    config: TrainConfig, model: SentenceTransformer, loss: GemLoss, data: TrainData
) -> SentenceTransformerTrainer:
    """The trainer; its construction checks the data."""
    evaluator = None
    if data.graded_pairs:
        pairs = data.graded_pairs
        evaluator = EmbeddingSimilarityEvaluator(
            pairs["sentence1"], pairs["sentence2"], pairs["score"], main_similarity="cosine", name="eval"
        )
    callbacks: list[Any] = []
    if config.ntp_learning_rate is not None:
        rates = (config.ntp_learning_rate, config.learning_rate or 0.0, config.ntp_steps or 0)
        callbacks.append(TwoPhaseLearningRate(*rates))
    return SentenceTransformerTrainer(
        model=model,
        args=build_arguments(config, data),
        train_dataset=data.train,
        eval_dataset=data.eval_set,
        evaluator=evaluator,
        loss=loss,
        callbacks=callbacks,
    )


def build_arguments(config: TrainConfig, data: TrainData) -> SentenceTransformerTrainingArguments:
    """Training arguments: those of the settings, defaults, and what ``training_arguments`` says."""
    steps = config.steps or 1
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0 if config.ntp_learning_rate is not None else steps // 20,
        "logging_steps": max(1, min(10, steps // 20)),
        "save_total_limit": 2,
        "per_device_eval_batch_size": config.batch_size,
    }
    if data.eval_set is not None or data.graded_pairs is not None:
        defaults |= {"eval_strategy": "steps", "eval_steps": max(1, steps // 5)}
    if len(data.columns) > 1 and not config.streaming:
        defaults["batch_sampler"] = BatchSamplers.NO_DUPLICATES
    return SentenceTransformerTrainingArguments(
        output_dir=str(config.folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate or 0.0,
        seed=config.seed,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        **{**defaults, **config.training_arguments},
    )


def _refuse_sharding(trainer: SentenceTransformerTrainer) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "gem-st train measures and saves the model on one device, which a model sharded by FSDP or DeepSpeed is "
            "not. Use SentenceTransformerTrainer with GemLoss in a script, or one copy a device (DDP)."
        )


def _load_state(config: TrainConfig) -> dict[str, Any]:
    """What a training that is resumed had measured before its first step, and its settings."""
    try:
        return json.loads((config.folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
