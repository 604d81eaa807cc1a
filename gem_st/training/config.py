"""The settings of a training: options, YAML files and recipes, and what is checked before anything is loaded.

`gem-st train --help` is made of them, so that this file imports torch and transformers only where a machine or a model
is looked at.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    from ..losses.plan import RowPlan

MODES = ("full", "frozen", "lora", "qlora")
POOLING = ("mean", "concat")
PRECISIONS = ("auto", "float32", "bf16", "fp16")
DTYPES = ("float32", "bfloat16", "float16", "auto")

PAPER = {
    "mode": "full",
    "num_gem_tokens": 1,
    "plain_ratio": 0.8,
    "tasks": ["reconstruction"],
    "num_rows": 32_000,
    "batch_size": 32,
    "max_length": 512,
    "ntp_steps": 100,
    "final_alpha": 1.0,
    "rise_steps": 0,
    "ntp_learning_rate": 1e-4,
    "learning_rate": 1e-5,
    "scale": 20.0,
}
RECIPES: dict[str, dict[str, Any]] = {"paper": PAPER}
"""Settings by the name of a recipe; ``paper`` is section 4 of arXiv 2506.04344."""

OWN_ARGUMENTS = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "bf16": "precision",
    "fp16": "precision",
    "seed": "seed",
    "resume_from_checkpoint": "resume",
}
"""Training arguments that are options of their own here."""


EXCLUDED = {
    ("data", "self_generate"): "either data is read, or the base writes it.",
    ("steps", "epochs"): "each sets the length of the training.",
    ("resume", "overwrite"): "one goes on with a training, the other starts anew.",
    ("teacher", "streaming"): "a teacher embeds all rows before the training.",
    ("pieces", "self_generate"): "pieces are cut from the texts of an index.",
    ("teacher", "views"): "a teacher's vector stands in for a second view.",
    ("teacher", "token_dropout"): "a teacher's vector stands in for a second view.",
    ("teacher", "scale"): "scale belongs to the contrastive loss, instead of which a teacher is followed.",
    ("self_generate", "columns"): "texts that the base writes have one column.",
    ("self_generate", "streaming"): "texts that the base writes are in memory.",
    ("self_generate", "num_rows"): "self_generate is the number of rows.",
    ("alpha", "ntp_steps"): "alpha is constant, the other is part of a schedule.",
    ("alpha", "final_alpha"): "alpha is constant, the other is part of a schedule.",
    ("alpha", "rise_steps"): "alpha is constant, the other is part of a schedule.",
    ("alpha", "ntp_learning_rate"): "the second rate is for the steps in which a schedule holds alpha at 0.",
}
"""Settings of which only one may be given, and why."""


@dataclass
class TrainConfig:
    """Settings of a training; the keys of a YAML file and, with dashes, the options of ``gem-st train``.

    What each means is in its annotation, and printed by ``gem-st train --help``. None means that the mode and the data
    decide; :meth:`resolve` does that.
    """

    base: Annotated[str | None, "Base model: Hub id, folder, or GGUF file (folder/x.gguf, org/name/x.gguf)."] = None
    output: Annotated[str | None, "Folder for the checkpoint and its report; gem-<base> by default."] = None
    data: Annotated[str | None, "Texts: a csv, tsv, jsonl, parquet or txt file, a folder of them, or a Hub id."] = None
    split: Annotated[str, "Split of the data, or a part such as train[:1000]; a file is all train."] = "train"
    subset: Annotated[str | None, "Configuration of a Hub data set that has several."] = None
    columns: Annotated[
        list[str] | None, "Columns in the order GemLoss reads them; messages, text, or all by default."
    ] = None
    streaming: Annotated[bool, "Read the data as it is trained on; needs --steps."] = False
    num_rows: Annotated[int | None, "Rows to train on, drawn at random; all by default."] = None
    self_generate: Annotated[int | None, "Have the base write this many texts, instead of data."] = None
    eval_data: Annotated[str | None, "Evaluation set: two texts and a score, or columns like the data's."] = None
    eval_split: Annotated[str | None, "Its split; train by default."] = None
    eval_columns: Annotated[list[str] | None, "Its columns."] = None
    held_out: Annotated[int, "Rows of the data kept for the table before/after, at most a tenth."] = 256

    teacher: Annotated[
        str | None, "Embedder whose space is learned, so that its index can be searched: Hub id or folder."
    ] = None
    pieces: Annotated[
        bool, "With a teacher: learn from each text's sentences and short spans as well, which are like queries."
    ] = False
    mode: Annotated[str, "full (all weights), frozen (GEM tokens only), lora (every token) or qlora (4-bit base)."] = (
        "full"
    )
    num_gem_tokens: Annotated[int, "K, GEM tokens appended to a text."] = 1
    pooling: Annotated[str, "mean or concat over the GEM tokens."] = "mean"
    max_length: Annotated[int | None, "Tokens in a row, GEM tokens included; 512 or the base's context by default."] = (
        None
    )
    gem_tokens: Annotated[
        list[str] | None,
        "Of a frozen base: K special tokens whose rows are taken as they are, or reserved, or trained, for rows of "
        "their own; reserved where there are enough.",
    ] = None
    lora_rank: Annotated[int | None, "Rank of the LoRA; 8 of frozen, 32 of lora and qlora."] = None
    dtype: Annotated[
        str | None,
        "Data type of the weights: float32, bfloat16, float16 or auto; float32 by default, which full mode saves as "
        "in the base.",
    ] = None
    trust_remote_code: Annotated[bool, "Run code that a base brings."] = False

    plain_ratio: Annotated[
        float | None, "p, share of plain rows; 0.8, frozen 1, or 0.5 for summary and soft_prompt."
    ] = None
    tasks: Annotated[list[str] | None, "reconstruction, continuation, or of two columns summary, soft_prompt."] = None
    views: Annotated[list[str] | None, "deletion, the default, or crops, for retrieval of longer texts."] = None
    token_dropout: Annotated[float | None, "Share of tokens deleted for the second view; 0.7, frozen 0.85."] = None
    scale: Annotated[float | None, "Initial factor on cosine similarities; 20 in a new model."] = None
    alpha: Annotated[float | None, "Constant weight of the contrastive loss, instead of a schedule."] = None
    ntp_steps: Annotated[float | None, "Schedule of alpha: steps at 0, or below 1 their share; a fifth."] = None
    final_alpha: Annotated[float | None, "Schedule of alpha: value at its end; 0.9."] = None
    rise_steps: Annotated[
        float | None, "Schedule of alpha: steps of the rise, or their share; until the end, 0 for at once."
    ] = None

    learning_rate: Annotated[float | None, "1e-4 of all weights, 5e-4 of a LoRA; less for billions of weights."] = None
    ntp_learning_rate: Annotated[float | None, "Rate while alpha is 0; learning_rate then falls along a cosine."] = None
    steps: Annotated[int | None, "Optimizer steps."] = None
    epochs: Annotated[float | None, "Passes over the data, instead of steps; 1."] = None
    batch_size: Annotated[int, "Rows in a batch, on each device."] = 32
    mini_batch_size: Annotated[int | None, "Rows in a forward pass; a batch of any size then fits."] = None
    gather_across_devices: Annotated[bool, "Negatives from the batches of all devices."] = False
    precision: Annotated[str, "auto, float32, bf16 or fp16; auto is bf16 on accelerators that have it."] = "auto"
    seed: Annotated[int, "Of the data's order, new weights, cuts and deletions."] = 0
    instructions: Annotated[
        bool, "Store LLM2Vec's instructions for MTEB in the checkpoint as prompts; training itself is without."
    ] = False
    training_arguments: Annotated[
        dict[str, Any], "NAME=VALUE of any other training argument, e.g. report_to=wandb; may be repeated."
    ] = field(default_factory=dict)
    resume: Annotated[bool, "Go on from the last whole checkpoint in the output folder."] = False
    overwrite: Annotated[bool, "Start anew in an output folder that holds a training."] = False
    recipe: Annotated[str | None, "Settings to start from: paper, those of arXiv 2506.04344."] = None

    @property
    def folder(self) -> Path:
        """Where the checkpoint goes."""
        return Path(self.output or f"gem-{Path(self.base or 'model').name.removesuffix('.gguf')}")

    @property
    def uses_schedule(self) -> bool:
        """True if alpha follows a schedule."""
        given = (self.ntp_steps, self.final_alpha, self.rise_steps)
        return self.alpha is None and (self.mode != "frozen" or any(value is not None for value in given))

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Options that every ``from_pretrained`` of the base gets."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}

    @property
    def pretrained(self) -> dict[str, Any]:
        """What ``from_pretrained`` of the base's config and tokenizer gets."""
        from ..modeling.gem_gguf import name_pretrained

        return {**name_pretrained(str(self.base)), **self.hub_kwargs}

    def check(self) -> None:
        """Make sure that the options are in range and fit each other; nothing is loaded.

        Raises:
            ImportError: If a package is missing.
            ValueError: If they do not, with what to do.
        """
        if not self.base:
            raise ValueError("base is missing. Name a model: gem-st train --base HuggingFaceTB/SmolLM2-135M")
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)
        _check_training_arguments(self.training_arguments)
        _check_packages(self.mode)
        check_precision(self.precision)

    def resolve(self, num_rows: int | None, columns: list[str], context: int | None = None) -> TrainConfig:
        """A copy in which everything that depends on the mode and the data is set.

        Args:
            num_rows: Rows to train on; None for a stream, which has ``steps``.
            columns: Their columns.
            context: Tokens that the base can read; None if it has no limit.

        Raises:
            ValueError: If rows are longer than that, or nothing would be learned.
        """
        from ..losses.plan import DEFAULT_TASKS, WHOLE_TASKS, default_token_dropout, plan_rows
        from ..losses.rows import check_columns

        new = dataclasses.replace(self, output=str(self.folder), precision=choose_precision(self.precision))
        freeze_base = self.mode == "frozen"
        named = () if self.teacher else columns  # a teacher's vectors are of each column, and of whole texts
        plan = plan_rows(
            freeze_base, named, tasks=self.tasks, plain_ratio=self.plain_ratio, has_labels=self.teacher is not None
        )
        check_columns(plan.tasks, columns)
        new.plain_ratio = plan.plain_ratio
        is_default = plan.tasks in (DEFAULT_TASKS, WHOLE_TASKS)
        new.tasks = [] if plan.plain_ratio == 1 and is_default else list(plan.tasks)
        if new.token_dropout is None:
            new.token_dropout = default_token_dropout(freeze_base)
        if new.learning_rate is None:
            new.learning_rate = 1e-4 if self.mode == "full" else 5e-4
        if new.steps is None:
            new.steps = count_steps(num_rows or 0, self)
        new.max_length = new.max_length or min(512, context or 512)
        if context and new.max_length > context:
            raise ValueError(f"max_length {new.max_length} is more than the {context} tokens that the base can read.")
        if self.mode != "full":  # there, GemLoss has them in float32
            new.dtype = new.dtype or ("bfloat16" if self.mode == "qlora" else "float32")
        new.lora_rank = None if self.mode == "full" else new.lora_rank or (8 if freeze_base else 32)
        new._resolve_alpha(plan, learns_by_text=not freeze_base or plan.plain_ratio != 1)
        return new

    def _resolve_alpha(self, plan: RowPlan, learns_by_text: bool) -> None:
        from ..losses.schedules import AlphaSchedule

        if self.uses_schedule:
            default = AlphaSchedule() if learns_by_text else AlphaSchedule(num_ntp_steps=0)
            self.ntp_steps = default.num_ntp_steps if self.ntp_steps is None else self.ntp_steps
            self.final_alpha = default.final if self.final_alpha is None else self.final_alpha
        elif self.alpha is None and not callable(plan.alpha):
            self.alpha = plan.alpha
        if not learns_by_text and (self.alpha == 0 or self.ntp_steps):
            raise ValueError(
                "A frozen base learns nothing from plain rows while alpha is 0. Lower plain_ratio, or raise alpha."
            )

    def describe(self) -> dict[str, Any]:
        """Settings that say something, for logs and reports."""
        values = dataclasses.asdict(self)
        values["training_arguments"] = {
            name: "***" if name.endswith(("token", "key")) else value for name, value in self.training_arguments.items()
        }
        # 0 says something
        return {
            name: value for name, value in values.items() if not (value is None or value is False or value in ([], {}))
        }


# --------------------------------------------------------------------------------------------------------------------
# Options, YAML files and recipes -> settings


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """A value as it would be read in a YAML file."""
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | Path | None = None, **options: Any) -> TrainConfig:
    """Put settings together: options win over the file, the file over the recipe that either names.

    Args:
        path: YAML file whose keys are fields of :class:`TrainConfig`; paths in it are relative to the working folder.
        **options: Fields of :class:`TrainConfig`; None is not given.

    Returns:
        The settings, with types checked; :meth:`TrainConfig.check` checks the rest.

    Raises:
        ValueError: If the file cannot be read, or there is no such setting, recipe or type of value.
    """
    settings = _read_yaml(Path(path)) if path is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    arguments = settings.get("training_arguments") or {}
    if isinstance(arguments, Mapping) and (arguments or given.get("training_arguments")):
        given["training_arguments"] = {**arguments, **given.get("training_arguments", {})}
    settings |= given
    recipe = settings.get("recipe")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}, but {', '.join(RECIPES)}.")
    settings = {**_compatible(RECIPES[recipe] if recipe else {}, settings), **settings}
    hints = get_type_hints(TrainConfig)
    for name in settings:
        if name not in hints:
            raise ValueError(f"There is no setting {name!r}. {_nearest(name, hints)}")
    return TrainConfig(**{name: convert(name, value, hints[name]) for name, value in settings.items()})


def _compatible(recipe: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what the given settings exclude."""
    excluded = {name for pair in EXCLUDED for name in pair if set(pair) - {name} <= given.keys()}
    if given.get("plain_ratio") == 1:
        excluded.add("tasks")
    if given.get("ntp_steps") == 0:
        excluded.add("ntp_learning_rate")
    return {name: value for name, value in recipe.items() if name not in excluded or name in given}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no settings file {path}.")
    try:
        settings = parse_value(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as `name: value`, got {type(settings).__name__}.")
    return settings


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."


def convert(name: str, value: Any, hint: Any) -> Any:
    """Bring a value to the type of a setting.

    Args:
        name: The setting, for the error.
        value: From a YAML file, the command line or Python.
        hint: Its type.

    Raises:
        ValueError: If it is of another type.
    """
    kinds = get_args(hint) if get_origin(hint) not in (list, dict) else (hint,)
    kinds = kinds or (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    outer = get_origin(kind) or kind
    if outer is list:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and parts and all(isinstance(part, str) and part for part in parts):
            return list(parts)
    elif outer is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif outer is int and isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    elif outer is str and isinstance(value, str | Path):
        return str(value)
    elif outer in (bool, dict) and isinstance(value, outer):
        return value
    wanted = {
        list: "a list of names",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        dict: "a mapping",
    }
    raise ValueError(f"{name} must be {wanted.get(outer, 'text')}, got {value!r}.")


# --------------------------------------------------------------------------------------------------------------------
# Checks before anything is loaded


def _check_choices(config: TrainConfig) -> None:
    from ..losses.plan import check_views
    from ..losses.rows import PAIR_TASKS, TASKS

    choices = {"mode": MODES, "pooling": POOLING, "precision": PRECISIONS, "dtype": (*DTYPES, None)}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            listed = ", ".join(name for name in known if name)
            raise ValueError(f"{name} must be one of {listed}, got {getattr(config, name)!r}.")
    tasks = sorted({*TASKS, *PAIR_TASKS})
    if unknown := [task for task in config.tasks or () if task not in tasks]:
        raise ValueError(f"There is no task {unknown[0]!r}, but {', '.join(tasks)}.")
    if config.views is not None:
        check_views(config.views)


def _check_ranges(config: TrainConfig) -> None:
    from ..losses.schedules import AlphaSchedule

    ranges: dict[str, tuple[float, float]] = {
        **dict.fromkeys(("plain_ratio", "alpha", "final_alpha"), (0.0, 1.0)),
        "token_dropout": (0.0, 0.99),
        "scale": (1.0, 100.0),
        **dict.fromkeys(("ntp_steps", "rise_steps", "held_out"), (0, math.inf)),
        **dict.fromkeys(("num_gem_tokens", "lora_rank", "steps", "mini_batch_size", "num_rows"), (1, math.inf)),
        **dict.fromkeys(("self_generate", "batch_size"), (2, math.inf)),
        **dict.fromkeys(("learning_rate", "ntp_learning_rate", "epochs"), (1e-12, math.inf)),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            limits = (
                f"in [{low:g}, {high:g}]" if high < math.inf else f"{low:g} or more" if low >= 1 or not low else "> 0"
            )
            raise ValueError(f"{name} must be {limits}, got {value!r}.")
    AlphaSchedule(config.ntp_steps or 0, config.final_alpha or 0.0, config.rise_steps)


def _check_combinations(config: TrainConfig) -> None:
    """Refuse options that contradict each other, or lack what they need."""
    given = set(config.describe())
    for names, reason in EXCLUDED.items():
        if given.issuperset(names):
            raise ValueError(f"{names[0]} and {names[1]} exclude each other: {reason} Drop one.")
    refused = {
        "Neither data nor self_generate is given. Name a file, a folder or a Hub id, or have the base write its own "
        "texts: --self-generate 5000.": not given & {"data", "self_generate"},
        "A teacher's vectors are of whole texts, which reconstruction alone leaves whole. Drop the other tasks.": (
            config.teacher is not None and bool({*(config.tasks or ())} - {"reconstruction"})
        ),
        "pieces are for a teacher, who has a vector for each. Name one: --teacher MODEL.": (
            config.pieces and config.teacher is None
        ),
        "pieces are no whole texts: next-token prediction would learn to write like them. Use --mode frozen.": (
            config.pieces and config.mode != "frozen"
        ),
        "streaming needs steps: the length of a stream is not known.": config.streaming and config.steps is None,
        "lora_rank is for the modes frozen, lora and qlora; full trains all weights.": config.mode == "full"
        and config.lora_rank is not None,
        "gem_tokens are for the mode frozen; others train a row for each GEM token.": config.mode != "frozen"
        and config.gem_tokens is not None,
        "qlora makes 4-bit weights of dense ones; a GGUF file has weights of its own. Use --mode frozen or lora.": (
            config.mode == "qlora" and "gguf_file" in config.pretrained
        ),
        "dtype is set by qlora: 4-bit weights that compute in bfloat16.": config.mode == "qlora" and "dtype" in given,
        f"tasks {config.tasks} are of rows that are not plain, but plain_ratio is 1. Lower it: --plain-ratio 0.5.": (
            bool(config.tasks) and config.plain_ratio == 1
        ),
        "ntp_learning_rate is the rate while a schedule holds alpha at 0; set ntp_steps, too.": (
            config.ntp_learning_rate is not None and (not config.uses_schedule or config.ntp_steps == 0)
        ),
        "eval_split and eval_columns belong to eval_data, which is not given.": (
            bool(given & {"eval_split", "eval_columns"}) and config.eval_data is None
        ),
    }
    for message, is_refused in refused.items():
        if is_refused:
            raise ValueError(message)


def _check_training_arguments(arguments: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformerTrainingArguments

    accumulation = arguments.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"gradient_accumulation_steps must be a whole number of 1 or more, got {accumulation!r}.")
    known = [item.name for item in dataclasses.fields(SentenceTransformerTrainingArguments)]
    for name in arguments:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"training_arguments.{name} is the option {OWN_ARGUMENTS[name]!r} here. Set that one.")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            raise ValueError(
                f"There is no training argument {name!r}{f'; near it are {near}' if near else ''}. They are those of "
                "SentenceTransformerTrainingArguments."
            )


def _check_packages(mode: str) -> None:
    needed = dict.fromkeys(("datasets", "accelerate"), 'pip install "gem-st[train]"')
    if mode != "full":
        needed["peft"] = "pip install peft"
    if mode == "qlora":
        needed["bitsandbytes"] = "pip install bitsandbytes"
    for package, command in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"mode {mode!r} needs {package}, which is not installed: {command}")


def _has_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()


def check_precision(precision: str) -> None:
    """Raise if this machine does not compute in a precision.

    Raises:
        ValueError: If it does not.
    """
    import torch

    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a CUDA device, and there is none. Use float32 or auto.")
    if precision == "bf16" and torch.accelerator.is_available() and not _has_bf16():
        raise ValueError(f"precision bf16 is not supported by {torch.cuda.get_device_name()}. Use fp16 or float32.")


def choose_precision(precision: str) -> str:
    """What ``auto`` means on this machine; CPUs without bf16 instructions are slower in bf16 than in float32."""
    return precision if precision != "auto" else "bf16" if _has_bf16() else "float32"


def count_steps(num_rows: int, config: TrainConfig) -> int:
    """Optimizer steps of the epochs that are asked for, over all processes."""
    per_batch = config.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(num_rows / per_batch)
    steps = math.ceil(batches / config.training_arguments.get("gradient_accumulation_steps", 1))
    return max(1, math.ceil(steps * (config.epochs or 1.0)))
