"""The generation side: MMLU, ARC, HellaSwag, LAMBADA and perplexity of a model in memory, measured by lm-eval.

Nothing here computes a metric that lm-eval has. This file turns local files into the documents that lm-eval's own
tasks read from the Hub, runs lm-eval on a model that is already loaded, and keeps a record of every answer, so that
two models can be compared question by question (:mod:`gem_st.evaluation.retention`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluators import perplexity
from ..modeling.gem_own_tokenizer import copy_tokenizer
from .local_files import read_lines, read_rows

logger = logging.getLogger(__name__)
T = TypeVar("T")
TaskType = Literal["mmlu", "arc_easy", "hellaswag", "lambada", "perplexity"]

LETTERS = ["A", "B", "C", "D"]
PERPLEXITY_TOKENS = 256
"""Tokens read of each text by the perplexity task, or the model's context where that is shorter."""


@dataclass(frozen=True)
class GenerationTask:
    """A task of the generation side.

    Args:
        name: The name that results are filed under.
        type: What is measured: ``mmlu``, ``arc_easy``, ``hellaswag``, ``lambada`` or ``perplexity``.
        data: Local file, of the format :func:`check_task` describes; without, lm-eval loads its own from the Hub.
        dev: Local file of the same format, from which examples are shown before each question.
        limit: Samples to use, the first ones; of ``mmlu``, for each subject.
        num_fewshot: Examples shown before each question; 5 for ``mmlu`` and none for the others if not given.
    """

    name: str
    type: TaskType
    data: Path | None = None
    dev: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    @property
    def shots(self) -> int:
        """Examples shown before each question."""
        return KINDS[self.type].num_fewshot if self.num_fewshot is None else self.num_fewshot


# --------------------------------------------------------------------------------------------------------------------
# Local files


def _require(is_good: bool, column: str, value: object, expected: str) -> None:
    """Raise a ValueError about one value; :func:`_read` adds the file and the line."""
    if not is_good:
        raise ValueError(f"column {column!r} is {value!r}, expected {expected}.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _mmlu_doc(row: dict[str, Any]) -> dict[str, Any]:
    for column in ("subject", "question"):
        _require(_is_text(row[column]), column, row[column], "text")
    for letter in LETTERS:
        _require(row[letter] is not None, letter, row[letter], "an option")
    _require(row["answer"] in LETTERS, "answer", row["answer"], "A, B, C or D")
    options = [row[letter] for letter in LETTERS]
    subject, question = row["subject"].strip(), row["question"]
    return {"subject": subject, "question": question, "choices": options, "answer": LETTERS.index(row["answer"])}


def _arc_doc(row: dict[str, Any]) -> dict[str, Any]:
    choices, labels = row["choices"], row["labels"]
    _require(_is_text(row["question"]), "question", row["question"], "text")
    are_texts = isinstance(choices, list) and len(choices) > 1 and all(map(_is_text, choices))
    _require(are_texts, "choices", choices, "a list of two texts or more")
    _require(isinstance(labels, list) and len(labels) == len(choices), "labels", labels, "one label for each choice")
    _require(row["answer"] in labels, "answer", row["answer"], f"one of the labels {labels}")
    return {"question": row["question"], "choices": {"text": choices, "label": labels}, "answerKey": row["answer"]}


def _hellaswag_doc(row: dict[str, Any]) -> dict[str, Any]:
    endings, label = row["endings"], str(row["label"])
    context = [row["ctx_a"], row["ctx_b"]] if {"ctx_a", "ctx_b"} <= row.keys() else [row.get("ctx"), ""]
    _require(all(isinstance(part, str) for part in context), "ctx", context[0], "text (or ctx_a and ctx_b)")
    _require(isinstance(row["activity_label"], str), "activity_label", row["activity_label"], "text")
    are_texts = isinstance(endings, list) and len(endings) > 1 and all(map(_is_text, endings))
    _require(are_texts, "endings", endings, "a list of two texts or more")
    is_index = label.isdecimal() and int(label) < len(endings)
    _require(is_index, "label", row["label"], f"the number of an ending, 0 to {len(endings) - 1}")
    document = {"activity_label": row["activity_label"], "endings": endings, "label": label}
    return {**document, "ctx_a": context[0], "ctx_b": context[1]}


def _lambada_doc(row: dict[str, Any]) -> dict[str, Any]:
    words = row["text"].split(" ") if isinstance(row["text"], str) else []
    _require(len(words) > 1 and _is_text(words[-1]), "text", row["text"], "two words or more, with no space at the end")
    return {"text": row["text"]}


def _read(path: Path, columns: Sequence[str], make: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Read a csv or jsonl file into lm-eval's documents.

    Raises:
        ValueError: If it is missing, empty, lacks a column or has a bad value, with the file and the line.
    """
    documents = []
    for number, row in read_rows(path):
        if missing := [column for column in columns if column not in row]:
            found = ", ".join(str(name) for name in row if name is not None)
            raise ValueError(f"{path}, line {number}: no column {', '.join(missing)}. Expected {', '.join(columns)}, "
                             f"found {found}.")  # fmt: skip
        try:
            documents.append(make(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not documents:
        raise ValueError(f"{path} has no rows. Expected the columns {', '.join(columns)}.")
    return documents


# --------------------------------------------------------------------------------------------------------------------
# Types of tasks


@dataclass(frozen=True)
class _Kind:
    """What a type of task needs to run: lm-eval's name of it, its main metric, and how local files become documents."""

    hub_name: str | None
    metric: str
    higher_is_better: bool = True
    num_fewshot: int = 0
    columns: tuple[str, ...] = ()
    make: Callable[[dict[str, Any]], dict[str, Any]] = dict
    config: dict[str, Any] = field(default_factory=dict)


def _mean_of(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


KINDS: dict[str, _Kind] = {
    "mmlu": _Kind(
        "mmlu",
        "acc",
        num_fewshot=5,
        columns=("subject", "question", *LETTERS, "answer"),
        make=_mmlu_doc,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": LETTERS,
            "doc_to_target": "answer",
            "metric_list": _mean_of("acc"),
        },
    ),
    "arc_easy": _Kind(
        "arc_easy",
        "acc",
        columns=("question", "choices", "labels", "answer"),
        make=_arc_doc,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": _mean_of("acc", "acc_norm"),
        },
    ),
    "hellaswag": _Kind(
        "hellaswag",
        "acc_norm",
        columns=("activity_label", "endings", "label"),
        make=_hellaswag_doc,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": _mean_of("acc", "acc_norm"),
        },
    ),
    "lambada": _Kind(
        "lambada_openai",
        "acc",
        columns=("text",),
        make=_lambada_doc,
        config={
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *_mean_of("acc"),
            ],
        },
    ),
    "perplexity": _Kind("wikitext", "perplexity", higher_is_better=False),
}


def check_task(task: GenerationTask) -> None:
    """Check a task before a model is loaded: its type, its numbers, and every row of its files.

    Files are csv or jsonl (any name but ``.csv`` is read as jsonl), in UTF-8:

    - ``mmlu``: subject, question, A, B, C, D, answer (a letter); ``dev`` has the examples of each subject.
    - ``arc_easy``: question, choices, labels, answer (one of the labels).
    - ``hellaswag``: activity_label, ctx_a and ctx_b (or ctx), endings, label (the number of the right ending).
    - ``lambada``: text, of which the last word is to be guessed.
    - ``perplexity``: plain text, one text a line.

    Args:
        task: The task.

    Raises:
        ImportError: If lm-eval is not installed and the task needs it.
        ValueError: If anything else is wrong.
    """
    if not isinstance(task.type, str) or task.type not in KINDS:
        raise ValueError(f"{task.name}: unknown type {task.type!r}. Choose one of {', '.join(KINDS)}.")
    for name, value, least in (("limit", task.limit, 1), ("num_fewshot", task.num_fewshot, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{task.name}: {name} is {value!r}, expected a whole number, {least} or more.")
    if task.type == "perplexity":
        _check_perplexity(task)
    if task.type != "perplexity" or task.data is None:
        _require_lm_eval()
    if task.data is None:
        if task.dev is not None:
            raise ValueError(f"{task.name}: dev is given, but data is not. Give both files, or neither.")
    elif task.type == "perplexity":
        read_lines(task.data)
    else:
        _read_documents(task)


def _check_perplexity(task: GenerationTask) -> None:
    if task.dev is not None or task.num_fewshot:
        raise ValueError(f"{task.name}: perplexity takes neither dev nor num_fewshot.")
    if task.data is None and task.name.lower() != "wikitext":
        raise ValueError(
            f"{task.name}: perplexity needs data, a text file with one text a line; from the Hub there is only the "
            "name wikitext."
        )


def _require_lm_eval() -> None:
    for name in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed, which measuring generation needs: pip install 'gem-st[eval]'")


def _read_documents(task: GenerationTask) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read a local task's documents, and its examples."""
    assert task.data is not None  # for the type checker
    kind = KINDS[task.type]
    documents = _read(task.data, kind.columns, kind.make)
    examples = _read(task.dev, kind.columns, kind.make) if task.dev else []
    if task.type == "hellaswag":
        documents = _prepare_hellaswag(documents)
        examples = _prepare_hellaswag(examples)
    if task.shots and task.dev is None:
        raise ValueError(
            f"{task.name}: no dev file for the {task.shots} examples that are shown before each question. Give dev, "
            "or num_fewshot 0."
        )
    counts = _split_by_subject(task, examples)
    for subject in _split_by_subject(task, documents) if task.shots else ():
        if (found := len(counts.get(subject, ()))) < task.shots:
            raise ValueError(f"{task.dev}: {found} examples of {subject}, expected {task.shots} (num_fewshot) or more.")
    return documents, examples


def _prepare_hellaswag(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clean the texts as lm-eval does."""
    if not documents:
        return []
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    with _quiet():
        return process_docs(Dataset.from_list(documents)).to_list()


def _split_by_subject(task: GenerationTask, documents: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Documents of each subject of MMLU, in the order of the file; one entry of the task's name for all others."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        parts.setdefault(document.get("subject", task.name), []).append(document)
    return parts


# --------------------------------------------------------------------------------------------------------------------
# Running lm-eval


def retry_smaller(function: Callable[[int], T], batch_size: int) -> T:
    """Call a function with a batch size, and again with half of it as long as memory runs out.

    Args:
        function: Takes the batch size; what it did before it failed is thrown away.
        batch_size: The first one to try.

    Returns:
        What the function returns.

    Raises:
        RuntimeError: The function's own, if memory runs out with one row; any other error at once.
    """
    while True:
        try:
            return function(batch_size)
        except (RuntimeError, MemoryError) as error:
            if batch_size <= 1 or not _is_out_of_memory(error):
                raise
            logger.warning("Out of memory with a batch size of %d, trying %d.", batch_size, batch_size // 2)
        # Here, and not above, because the error holds on to what the function had in memory.
        batch_size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's and datasets' messages and progress bars, not those of the model's work."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [each.level for each in loggers]
    had_bars = is_progress_bar_enabled()
    disable_progress_bar()
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if had_bars:
            enable_progress_bar()


@functools.cache
def _lm_class() -> type:
    from lm_eval.models.huggingface import HFLM

    class CountingHFLM(HFLM):
        """lm-eval's model, which counts the prompts that it has to cut."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.num_prompts = self.num_truncated = 0

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
            self.num_prompts += len(requests)
            self.num_truncated += sum(map(self._is_cut, requests))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _is_cut(self, request: tuple[Any, list[int], list[int]]) -> bool:
            texts, context, answer = request
            if not 0 < len(answer) <= self.max_length:
                raise ValueError(
                    f"The answer {texts and texts[1]!r} has {len(answer)} tokens; the model takes 1 to "
                    f"{self.max_length}."
                )
            return len(context) + len(answer) > self.max_length + 1

    return CountingHFLM


def _make_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    return _lm_class()(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),  # it gives it a padding token
        max_length=_context_length(model),
        batch_size=batch_size,
    )


def _context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for, if it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _local_tasks(task: GenerationTask, limit: int | None) -> dict[str, Any]:
    """lm-eval tasks over local files: one for each subject of MMLU, otherwise one."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents, examples = _read_documents(task)
    shown = _split_by_subject(task, examples)
    tasks = {}
    for subject, part in _split_by_subject(task, documents).items():
        data = {"test": Dataset.from_list(part[:limit])}
        config = {**copy.deepcopy(KINDS[task.type].config), "task": subject, "test_split": "test"}
        if task.shots:
            data["dev"] = Dataset.from_list(shown[subject])
            config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
        if task.type == "mmlu":
            config["description"] = _mmlu_header(subject)
        config |= {"custom_dataset": functools.partial(_same, data), "num_fewshot": task.shots}
        tasks[subject] = ConfigurableTask(config=config)
    return tasks


def _same(data: dict[str, Any], **_: Any) -> dict[str, Any]:
    return data


def _mmlu_header(subject: str) -> str:
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def _hub_tasks(task: GenerationTask) -> dict[str, Any]:
    """lm-eval's own tasks, by subject of MMLU or by name.

    Raises:
        OSError: If they cannot be loaded.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    name = KINDS[task.type].hub_name
    folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in ("mmlu/default", "arc", "hellaswag")]
    folders += [Path(lm_eval.__file__).parent / "tasks" / name for name in ("lambada", "wikitext")]
    try:
        tasks = TaskManager(include_defaults=False, include_path=folders).load([name])["tasks"]
    except Exception as error:  # of many libraries; whatever it is, the local way is open
        raise OSError(
            f"{task.name}: lm-eval could not load its task {name!r} from the Hub ({type(error).__name__}: {error}). "
            "Without network, name local files in a suite file: data: (and dev: for examples)."
        ) from error
    for each in tasks.values():
        each.set_config(key="num_fewshot", value=task.shots)
        each.set_fewshot_seed(seed=1234)  # lm-eval's default
    return {key.removeprefix("mmlu_") if task.type == "mmlu" else task.name: each for key, each in tasks.items()}


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Measure one task on a model in memory.

    Scores of two models are equal to the last digit if the models are and the batch size is the same: it decides how
    rows are padded and summed. The longest prompts come first, so a batch that is too large fails early, and is halved.

    Args:
        model: A ``*ForCausalLM``: ``model[0].model`` of a GEM model, or any base.
        tokenizer: Its tokenizer; left as it is.
        task: The task.
        batch_size: Prompts in a forward pass, halved as long as memory runs out.
        limit: Samples to use, the first ones, if fewer than the task's own limit; of MMLU, for each subject.
        device: Moves the model there; without, it stays where it is.

    Returns:
        What `json` can write: ``main_score``, of ``metric``, with its ``stderr`` (None for perplexity); all
        ``metrics``; ``num_samples``; ``truncated``, the share of prompts that lm-eval cut on the left to fit the
        context; ``batch_size``, the one that fitted; ``subjects`` of MMLU; ``correct``, by subject (or under the
        task's name), a string with a 1 for each sample that is right by ``metric`` and a 0 for each that is not, in
        order. Accuracies are in [0, 1]. MMLU's main score is the mean over subjects, ``acc_micro`` that over questions.

    Raises:
        ImportError: If lm-eval is not installed.
        OSError: If lm-eval's own data cannot be loaded from the Hub.
        ValueError: If the task is not right, or the tokenizer ends every text in a token of its own.
    """
    check_task(task)
    limit = min((value for value in (limit, task.limit) if value is not None), default=None)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more.")
    _check_tokenizer(tokenizer)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if task.type == "perplexity" and task.data is not None:
        return retry_smaller(functools.partial(_measure_perplexity, model, tokenizer, task, limit), batch_size)
    with _quiet(), _as_found(model):
        tasks = _hub_tasks(task) if task.data is None else _local_tasks(task, limit)
        return retry_smaller(lambda size: _run(model, tokenizer, task, tasks, limit, size), batch_size)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that appends a token: the answer would be asked for after it."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    if tokenizer("a b")["input_ids"][-len(plain) :] != plain:
        raise ValueError(
            "The tokenizer ends every text in a token of its own, so nothing can be continued. Give the base model's "
            "tokenizer, or switch its end token off."
        )


@contextlib.contextmanager
def _as_found(model: PreTrainedModel) -> Iterator[None]:
    """Give back the training mode of every module, which lm-eval switches off."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
    tasks: dict[str, Any],
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    from lm_eval import evaluate

    lm = _make_lm(model, tokenizer, batch_size)
    output = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    samples = {name: output["samples"][name] for name in tasks}
    num_samples = sum(map(len, samples.values()))
    shares = {"truncated": lm.num_truncated / max(1, lm.num_prompts), "batch_size": batch_size}
    metrics = {name: _metrics_of(output["results"][name]) for name in tasks}
    kind = KINDS[task.type]
    if task.type == "perplexity":
        (values,) = metrics.values()
        return _result(task, "word_perplexity", values["word_perplexity"], None, values, num_samples, **shares)
    scores = {name: np.array([sample[kind.metric] for sample in rows]) for name, rows in samples.items()}
    correct = {name: "".join(str(int(score)) for score in row) for name, row in scores.items()}
    errors = [row.std(ddof=1) / math.sqrt(len(row)) if len(row) > 1 else math.nan for row in scores.values()]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    if task.type != "mmlu":
        (values,) = metrics.values()
        result = _result(task, kind.metric, values[kind.metric], stderr, values, num_samples, **shares)
        return {**result, "correct": correct}
    macro = float(np.mean([values["acc"] for values in metrics.values()]))
    averages = {"acc": macro, "acc_micro": float(np.concatenate(list(scores.values())).mean())}
    subjects = {name: {"acc": metrics[name]["acc"], "n": len(row)} for name, row in scores.items()}
    result = _result(task, "acc", macro, stderr, averages, num_samples, **shares)
    return {**result, "subjects": subjects, "correct": correct}


def _metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """lm-eval's metrics, without the name of the filter after each."""
    values = {key.partition(",")[0]: value for key, value in results.items() if "_stderr" not in key and "," in key}
    return {key: float(value) for key, value in values.items()}


def _result(
    task: GenerationTask,
    metric: str,
    score: float,
    stderr: float | None,
    metrics: dict[str, float],
    num_samples: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "main_score": float(score),
        "type": task.type,
        "metric": metric,
        "higher_is_better": KINDS[task.type].higher_is_better,
        "stderr": None if stderr is None or math.isnan(stderr) else float(stderr),
        "metrics": metrics,
        "num_samples": num_samples,
        "num_fewshot": task.shots,
        **more,
    }


def _measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: GenerationTask, limit: int | None, batch_size: int
) -> dict[str, Any]:
    assert task.data is not None  # for the type checker
    texts = read_lines(task.data)[:limit]
    max_length = min(PERPLEXITY_TOKENS, _context_length(model) or PERPLEXITY_TOKENS)
    value = perplexity(model, tokenizer, texts, max_length=max_length, batch_size=batch_size)
    rows = tokenizer(texts)["input_ids"]
    num_tokens = sum(min(len(row), max_length) - 1 for row in rows)
    metrics = {"perplexity": value, "num_tokens": num_tokens}
    if tokenizer.is_fast:
        num_bytes = _predicted_bytes(tokenizer, texts, max_length)
        metrics["bits_per_byte"] = num_tokens * math.log2(value) / num_bytes
    truncated = sum(len(row) > max_length for row in rows) / len(rows)
    return _result(
        task, "perplexity", value, None, metrics, len(texts), truncated=truncated, batch_size=batch_size
    )  # fmt: skip


def _predicted_bytes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> int:
    """Bytes of the texts that perplexity predicts: without what lies before a second token, or after the last."""
    own = copy_tokenizer(tokenizer)  # truncation would be a mark on theirs
    offsets = own(list(texts), truncation=True, max_length=max_length, return_offsets_mapping=True)
    spans = zip(texts, offsets["offset_mapping"], strict=True)
    return sum(len(text[row[1][0] : row[-1][1]].encode()) for text, row in spans if len(row) > 1)
