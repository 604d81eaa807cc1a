"""What is evaluated: benchmarks of `mteb`, and tasks over local files that a YAML file declares."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from .lm_eval_tasks import GenerationTask, check_task
from .local_files import read_lines, read_rows

PAPER_TASKS = (
    *("ArguAna", "ClimateFEVER", "NFCorpus", "SciFact", "StackOverflowDupQuestions", "SciDocsRR"),
    *("BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions"),
    *("Banking77Classification", "EmotionClassification", "MassiveIntentClassification"),
    *("STS17", "SICK-R", "STSBenchmark"),
)
"""The 16 tasks of the paper's ablations (arXiv 2506.04344)."""

SMOKE_TASKS = ("STSBenchmark", "SprintDuplicateQuestions", "Banking77Classification", "NFCorpus")
MTEB_V1 = "MTEB(eng, v1)"
BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "paper": (MTEB_V1, PAPER_TASKS),
    "smoke": (MTEB_V1, SMOKE_TASKS),
    "mteb-eng-v1": (MTEB_V1, ()),
    "mteb-eng-v2": ("MTEB(eng, v2)", ()),
}
"""Suites from the Hub: a benchmark of mteb, and the tasks of it that are taken; none named are all."""

KNOWLEDGE = {"paper": ("mmlu",), "mteb-eng-v1": ("mmlu",), "mteb-eng-v2": ("mmlu",), "smoke": ()}
"""Generation tasks beside a suite of the Hub, if none are named."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "STS": ("sentence1", "sentence2", "score"),
    "PairClassification": ("sentence1", "sentence2", "label"),
    "Classification": ("text", "label"),
    "Clustering": ("text", "label"),
    "Retrieval": (),
}
"""Types of local tasks, and the columns of their files."""

MAX_CLUSTERED_TEXTS = 16_384
"""Most texts of a local clustering task that are embedded; mteb draws as many for each of its ten clusterings."""

LOCAL_ADVICE = "Local files need no network: declare them in a YAML file, and give it as --suite (docs/evaluation.md)."


@dataclass(frozen=True)
class Suite:
    """Tasks of an evaluation.

    Attributes:
        name: Name of the suite, or of its file.
        tasks: Tasks of mteb, for embeddings.
        knowledge: Tasks of lm-eval, for generation.
    """

    name: str
    tasks: list[Any] = field(default_factory=list)
    knowledge: list[GenerationTask] = field(default_factory=list)


def load_suite(name: str, knowledge: Iterable[str] | None = None) -> Suite:
    """Load a suite, and check its files, before any model is loaded.

    Args:
        name: A key of ``BENCHMARKS``, or a YAML file.
        knowledge: Names of generation tasks instead of the suite's own: names in the file, or tasks of the Hub.

    Raises:
        ImportError: If mteb is not installed.
        ValueError: If there is no such suite or task, or a file cannot be read; the message names file and row.
    """
    require_mteb()
    path = Path(name).expanduser()
    if name in BENCHMARKS:
        tasks, known = _benchmark(name), {task: _of_hub(task) for task in KNOWLEDGE[name]}
    elif path.suffix in (".yaml", ".yml") or path.exists():
        tasks, known = read_suite(path)
    else:
        raise ValueError(
            f"There is no suite {name!r}. Known are {', '.join(BENCHMARKS)}, or a YAML file of local tasks."
        )
    chosen = list(known.values()) if knowledge is None else [known.get(key) or _of_hub(key) for key in knowledge]
    for task in chosen:
        check_task(task)
    return Suite(path.stem if path.suffix else name, tasks, chosen)


def require_mteb() -> None:
    """Raise with the line that installs it, if mteb is not there."""
    if importlib.util.find_spec("mteb") is None:
        raise ImportError("Scores of embeddings need mteb: pip install 'gem-st[eval]', with Python 3.11 or later.")


def _of_hub(name: str) -> GenerationTask:
    return GenerationTask(name, cast("Any", name))  # checked with all others


def _benchmark(name: str) -> list[Any]:
    """Tasks of a benchmark as mteb defines them, which names splits and languages."""
    import mteb

    title, chosen = BENCHMARKS[name]
    tasks = {task.metadata.name: task for task in mteb.get_benchmark(title).tasks}
    return [tasks[key] for key in chosen] if chosen else list(tasks.values())


# --------------------------------------------------------------------------------------------------------------------
# Local tasks


def read_suite(path: Path) -> tuple[list[Any], dict[str, GenerationTask]]:
    """Read a YAML file of local tasks.

    Args:
        path: The file; paths in it are relative to its folder.

    Returns:
        Tasks of mteb, and tasks of lm-eval by name.

    Raises:
        ValueError: If the file or one that it names cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The suite {str(path)!r} cannot be read: {error}") from error
    sections = ("tasks", "knowledge")
    if not isinstance(content, dict) or not content or not set(content) <= set(sections):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"The suite {str(path)!r} must hold `tasks:`, `knowledge:` or both, but holds {found}.")
    tasks: dict[str, Any] = {}
    knowledge: dict[str, GenerationTask] = {}
    for section, made, make in (("tasks", tasks, _make_task), ("knowledge", knowledge, _make_knowledge)):
        entries = content.get(section) or []
        if not isinstance(entries, list):
            raise ValueError(f"`{section}:` in {str(path)!r} must be a list, got {entries!r}.")
        for entry in entries:
            if not isinstance(entry, dict) or not {"name", "type"} <= set(entry):
                raise ValueError(
                    f"Each entry of `{section}:` in {str(path)!r} needs name and type, but one is {entry!r}."
                )
            if not re.fullmatch(r"[^\W_][\w .()+-]*", str(entry["name"] or "")):
                raise ValueError(
                    f"{entry['name']!r} in {str(path)!r} is no name of a task, which files are named after: letters, "
                    "digits, spaces and . _ - + ( ), the first a letter or digit."
                )
            if not isinstance(entry["type"], str):
                raise ValueError(f"The type of task {entry['name']!r} must be text, got {entry['type']!r}.")
            if str(entry["name"]) in {**tasks, **knowledge}:
                raise ValueError(f"The suite {str(path)!r} has two tasks of the name {entry['name']!r}.")
            made[str(entry["name"])] = make(entry, path.parent)
    return list(tasks.values()), knowledge


def _check_entry(entry: Mapping[str, Any], known: Iterable[str], needed: Iterable[str]) -> None:
    """Raise if an entry of a suite has settings that nothing reads, or lacks some."""
    if unknown := set(entry) - set(known):
        raise ValueError(
            f"Task {entry['name']!r} has settings that are not known: {sorted(unknown)}. Known are {sorted(known)}."
        )
    if missing := [name for name in needed if not entry.get(name)]:
        raise ValueError(f"Task {entry['name']!r}, of type {entry['type']}, needs `{missing[0]}:`.")


def _make_knowledge(entry: Mapping[str, Any], folder: Path) -> GenerationTask:
    _check_entry(entry, ("name", "type", "data", "dev", "limit", "num_fewshot"), ())
    options: dict[str, Any] = {name: entry[name] for name in ("limit", "num_fewshot") if name in entry}
    options |= {name: folder / str(entry[name]) for name in ("data", "dev") if entry.get(name)}
    return GenerationTask(str(entry["name"]), entry["type"], **options)


def _make_task(entry: Mapping[str, Any], folder: Path) -> Any:
    """A task of mteb over local files."""
    name, kind = str(entry["name"]), entry["type"]
    if kind not in COLUMNS:
        raise ValueError(f"Task {name!r} is of type {kind!r}. Known are {', '.join(COLUMNS)}.")
    known = ["name", "type", "data", "limit", *(["columns"] if COLUMNS[kind] else [])]
    needed = ["data"]
    if kind == "Classification":
        known, needed = [*known, "train"], ["train", "data"]
    _check_entry(entry, known, needed)
    reader = LocalFiles(name, kind, entry.get("columns") or {}, entry.get("limit"))
    return MAKERS[kind](reader, *(folder / str(entry[key]) for key in needed))


@dataclass
class LocalFiles:
    """Files of one task."""

    name: str
    kind: str
    columns: Mapping[str, str]
    limit: int | None
    digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        is_named = isinstance(self.columns, Mapping) and all(isinstance(v, str) for v in self.columns.values())
        if not is_named:
            raise ValueError(f"columns of task {self.name!r} must name columns, got {self.columns!r}.")
        if unknown := set(self.columns) - set(COLUMNS[self.kind]):
            raise ValueError(
                f"Task {self.name!r} names columns {sorted(unknown)}. Those of a {self.kind} task are "
                f"{', '.join(COLUMNS[self.kind])}."
            )
        if self.limit is not None and not (isinstance(self.limit, int) and self.limit > 0):
            raise ValueError(f"limit of task {self.name!r} must be a whole number of 1 or more, got {self.limit!r}.")

    def read(self, path: Path) -> dict[str, list[Any]]:
        """Columns of a csv, tsv or jsonl file by the names that the task knows them by; of the rows that are kept."""
        rows = _list_rows(path, self.name)
        self.digest.update(path.read_bytes())
        names = {column: self.columns.get(column, column) for column in COLUMNS[self.kind]}
        if missing := [name for name in names.values() if name not in rows[0]]:
            raise ValueError(
                f"{path} of task {self.name!r} has no column {missing[0]!r}, but {list(rows[0])}. Name them: "
                f"columns: {{{', '.join(f'{column}: ...' for column in names)}}}."
            )
        table: dict[str, list[Any]] = {column: [] for column in names}
        for index in sample_indices(len(rows), self.limit):
            row, number = rows[index], index + 1
            for column, name in names.items():
                if row.get(name) is None:
                    raise ValueError(f"{path} of task {self.name!r}: row {number} has no {name!r}.")
                table[column].append(_parse(column, self.kind, row[name], f"{path}, row {number}, column {name!r}"))
        return table

    def build(self, base: Any, dataset: Any, main_score: str, **attributes: Any) -> Any:
        """The task, with its data loaded."""
        from mteb.abstasks.task_metadata import TaskMetadata

        self.digest.update(repr((self.kind, sorted(self.columns.items()), self.limit)).encode())
        metadata = TaskMetadata(
            name=self.name,
            type=cast("Any", self.kind),
            description=f"Local {self.kind} task {self.name}.",
            dataset={"path": f"local/{self.name}", "revision": self.digest.hexdigest()[:40]},
            category="t2t" if self.kind != "Classification" and self.kind != "Clustering" else "t2c",
            eval_langs=["eng-Latn"],
            main_score=main_score,
        )
        task = type(self.name, (base,), {"metadata": metadata, **attributes})()
        task.dataset, task.data_loaded = dataset, True
        return task


def sample_indices(total: int, limit: int | None) -> list[int]:
    """Indices of a fixed random sample in their order; all of them without a limit. Files are often sorted by label."""
    return sorted(random.Random(0).sample(range(total), min(total, limit or total)))


def _parse(column: str, kind: str, value: Any, where: str) -> Any:
    """Check a value of a file: text as it is, scores as numbers, labels of pairs as 0 or 1."""
    if column == "score":
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{where} must be a number, got {value!r}.")
        return score
    if column == "label":
        text = str(value).strip().lower()
        if kind == "PairClassification":
            if text not in ("0", "1", "false", "true", "0.0", "1.0"):
                raise ValueError(f"{where} must be 0 or 1, got {value!r}.")
            return int(text in ("1", "true", "1.0"))
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r}.")
    return value


def _list_rows(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a file of a task, one at least."""
    rows = [row for _, row in read_rows(path)]
    if not rows:
        raise ValueError(f"{path} of task {name!r} has no rows.")
    for number, row in enumerate(rows, start=1):
        if None in row:  # a comma in a text without quotes, say, behind which all columns are others
            raise ValueError(f"{path} of task {name!r}: row {number} has more values than the {len(row) - 1} columns.")
    return rows


def _make_sts(files: LocalFiles, data: Path) -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS

    table = files.read(data)
    low, high = min(table["score"]), max(table["score"])
    if low == high:
        raise ValueError(f"{data} of task {files.name!r}: every score is {low}, which nothing can be correlated with.")
    dataset = DatasetDict(test=Dataset.from_dict(table))
    return files.build(AbsTaskSTS, dataset, "cosine_spearman", min_score=low, max_score=high)


def _make_pairs(files: LocalFiles, data: Path) -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskPairClassification

    table = files.read(data)
    if len(set(table["label"])) < 2 or len(table["label"]) < 2:
        raise ValueError(f"{data} of task {files.name!r}: every label is {table['label'][0]}; both are needed.")
    table["labels"] = table.pop("label")
    dataset = DatasetDict(test=Dataset.from_dict(table))
    return files.build(AbsTaskPairClassification, dataset, "max_ap")


def _make_classification(files: LocalFiles, train: Path, data: Path) -> Any:
    from datasets import ClassLabel, Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification

    tables = {"train": files.read(train), "test": files.read(data)}
    names = sorted(set(tables["train"]["label"]))
    if len(names) < 2:
        raise ValueError(f"{train} of task {files.name!r} has one label only, {names[0]!r}.")
    if unknown := set(tables["test"]["label"]) - set(names):
        raise ValueError(
            f"{data} of task {files.name!r} has labels that {train.name} lacks: {sorted(unknown)[:5]}. Take "
            "a larger limit, if there is one."
        )
    labels = ClassLabel(names=names)
    for table in tables.values():
        table["label"] = labels.str2int(table["label"])
    dataset = DatasetDict({split: Dataset.from_dict(table) for split, table in tables.items()})
    return files.build(AbsTaskClassification, dataset, "accuracy")


def _make_clustering(files: LocalFiles, data: Path) -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClustering

    table = files.read(data)
    if len(set(table["label"])) < 2:
        raise ValueError(f"{data} of task {files.name!r} has one label only, {table['label'][0]!r}.")
    dataset = DatasetDict(test=Dataset.from_dict({"sentences": table["text"], "labels": table["label"]}))
    limits = {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": MAX_CLUSTERED_TEXTS}
    return files.build(AbsTaskClustering, dataset, "v_measure", **limits)


def _make_retrieval(files: LocalFiles, data: Path) -> Any:
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval

    corpus, queries = _read_texts(files, data / "corpus.jsonl"), _read_texts(files, data / "queries.jsonl")
    judged = _read_judgements(files, data, corpus, queries)
    chosen = [list(judged)[index] for index in sample_indices(len(judged), files.limit)]
    split = {
        "corpus": Dataset.from_list([{"id": key, **row} for key, row in corpus.items()]),
        "queries": Dataset.from_list([{"id": key, "text": queries[key]["text"]} for key in chosen]),
        "relevant_docs": {key: judged[key] for key in chosen},
        "top_ranked": None,
    }
    return files.build(AbsTaskRetrieval, {"default": {"test": split}}, "ndcg_at_10")


def _read_texts(files: LocalFiles, path: Path) -> dict[str, dict[str, str]]:
    """Documents or queries in BEIR's layout, by id."""
    texts: dict[str, dict[str, str]] = {}
    for number, row in enumerate(_list_rows(path, files.name), start=1):
        key, text = row.get("_id", row.get("id")), row.get("text")
        if key is None or not isinstance(text, str):
            raise ValueError(f"{path} of task {files.name!r}: row {number} needs _id and text, but has {list(row)}.")
        if str(key) in texts:
            raise ValueError(f"{path} of task {files.name!r}: row {number} repeats the id {key!r}.")
        texts[str(key)] = {"text": text, "title": row.get("title") or ""}
    files.digest.update(path.read_bytes())
    return texts


def _read_judgements(
    files: LocalFiles, data: Path, corpus: Mapping[str, Any], queries: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Relevant documents of each query that has one, in the order of the queries."""
    found = [path for path in (data / "qrels" / "test.tsv", data / "qrels.tsv") if path.exists()]
    if not found:
        raise ValueError(f"{data} of task {files.name!r} holds neither qrels.tsv nor qrels/test.tsv.")
    path, columns = found[0], ("query-id", "corpus-id", "score")
    judged: dict[str, dict[str, int]] = {key: {} for key in queries}
    for number, row in enumerate(_list_rows(path, files.name), start=1):
        if not set(columns) <= set(row):
            raise ValueError(f"{path} of task {files.name!r} must have the columns {columns}, but has {list(row)}.")
        query, document, score = (row[column] for column in columns)
        if query not in queries or document not in corpus:
            kind, key = ("query", query) if query not in queries else ("document", document)
            raise ValueError(f"{path} of task {files.name!r}: row {number} names a {kind} {key!r} that is not there.")
        try:
            judged[query][document] = int(score)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path} of task {files.name!r}: score of row {number} must be a whole number, got {score!r}."
            ) from None
    files.digest.update(path.read_bytes())
    judged = {query: documents for query, documents in judged.items() if any(s > 0 for s in documents.values())}
    if not judged:
        raise ValueError(f"{path} of task {files.name!r} judges no document relevant.")
    return judged


MAKERS: dict[str, Callable[..., Any]] = {
    "STS": _make_sts,
    "PairClassification": _make_pairs,
    "Classification": _make_classification,
    "Clustering": _make_clustering,
    "Retrieval": _make_retrieval,
}


# --------------------------------------------------------------------------------------------------------------------
# Texts


def read_texts_of(suite: Suite, num_texts: int) -> list[str]:
    """Texts of a suite, on which generators are compared and vectors examined: those of its first perplexity task.

    Without one, texts of its embedding tasks in turn, or of the files of its other generation tasks.

    Args:
        suite: The suite.
        num_texts: Texts wanted; there may be fewer.
    """
    for task in suite.knowledge:
        if task.type == "perplexity" and task.data is not None:
            return read_lines(task.data)[:num_texts]
    for task in suite.tasks:
        task.load_data()
    sources = [_texts_in(task.dataset) for task in suite.tasks]
    if not sources:
        files = [task.data for task in suite.knowledge if task.data is not None]
        sources = [_texts_in([row for _, row in read_rows(path)]) for path in files]
    in_turn = itertools.zip_longest(*sources)
    texts: dict[str, None] = {}
    for text in itertools.chain.from_iterable(in_turn):
        if len(texts) == num_texts:
            break
        if text is not None:
            texts[text] = None
    return list(texts)


NO_TEXT = ("id", "_id", "label", "labels", "score", "title", "answer", "subject", "relevant_docs", "top_ranked")
"""Names of columns that are not read for texts."""


def _texts_in(data: Any) -> Iterator[str]:
    """Texts of a task's data, however it is nested."""
    if isinstance(data, str):
        if data.strip():
            yield data
    elif isinstance(data, Mapping):
        for key, part in data.items():
            if key not in NO_TEXT:
                yield from _texts_in(part)
    elif isinstance(data, Iterable):
        for part in data:
            yield from _texts_in(part)
