"""Local tasks: they load, score as mteb and Sentence Transformers score, and say what is wrong with a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from gem_st.evaluation.identity import fingerprint
from gem_st.evaluation.mteb_scores import limit_task, score_task
from gem_st.evaluation.suites import PAPER_TASKS, load_suite, read_texts_of, sample_indices

from ..conftest import CORPUS, SHARED

pytestmark = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb needs Python 3.11")

SUBJECTS = ["cat", "dog", "horse", "train", "bus", "boat"]
VERBS = ["sleeps", "waits", "moves", "stops", "turns", "shines"]
TEXTS = [
    f"The {subject} {verb} near the {place}." for subject in SUBJECTS for verb in VERBS for place in ("sea", "wall")
]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    """A suite of all types, over files of this test."""
    pairs = list(zip(TEXTS, TEXTS[5:] + TEXTS[:5], strict=True))
    write_csv(tmp_path / "sts.csv", ["a", "b", "grade"], [[a, b, (i * 7) % 11 / 2] for i, (a, b) in enumerate(pairs)])
    write_jsonl(
        tmp_path / "pairs.jsonl", [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(pairs)]
    )
    labelled = [[text, text.split()[1]] for text in TEXTS]
    write_csv(tmp_path / "train.csv", ["text", "label"], labelled[::2])
    write_csv(tmp_path / "test.csv", ["text", "label"], labelled[1::2])
    write_jsonl(tmp_path / "ir/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(TEXTS)])
    write_jsonl(tmp_path / "ir/queries.jsonl", [{"_id": f"q{i}", "text": t} for i, t in enumerate(CORPUS)])
    judged = [f"q{i}\td{(i * 5 + j) % len(TEXTS)}\t1\n" for i in range(6) for j in range(4)]
    (tmp_path / "ir/qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    (tmp_path / "lines.txt").write_text("\n".join(CORPUS))
    path = tmp_path / "suite.yaml"
    path.write_text(
        """
tasks:
  - {name: Graded, type: STS, data: sts.csv, columns: {sentence1: a, sentence2: b, score: grade}}
  - {name: Same, type: PairClassification, data: pairs.jsonl}
  - {name: Subject, type: Classification, train: train.csv, data: test.csv, columns: {text: text, label: label}}
  - {name: Groups, type: Clustering, data: test.csv}
  - {name: Search, type: Retrieval, data: ir}
knowledge:
  - {name: lines, type: perplexity, data: lines.txt}
"""
    )
    return path


def score(model: SentenceTransformer, task: Any, **kwargs: Any) -> float:
    return score_task(model, task, name="model", revision=fingerprint(model), **kwargs)["main_score"]


def task_of(path: Path, name: str) -> Any:
    return next(task for task in load_suite(str(path)).tasks if task.metadata.name == name)


def test_a_suite_has_the_tasks_of_its_file(suite_file: Path) -> None:
    suite = load_suite(str(suite_file))
    assert suite.name == "suite"
    assert {task.metadata.name: task.metadata.type for task in suite.tasks} == {
        "Graded": "STS",
        "Same": "PairClassification",
        "Subject": "Classification",
        "Groups": "Clustering",
        "Search": "Retrieval",
    }
    assert [(task.name, task.type, task.data) for task in suite.knowledge] == [
        ("lines", "perplexity", suite_file.parent / "lines.txt")
    ]
    assert load_suite(str(suite_file), knowledge=[]).knowledge == []


def test_scores_are_those_of_sentence_transformers(suite_file: Path, make_model: Callable[..., Any]) -> None:
    model = make_model(num_gem_tokens=2)
    rows = read_csv(suite_file.parent / "sts.csv")
    graded = EmbeddingSimilarityEvaluator(
        [r["a"] for r in rows], [r["b"] for r in rows], [float(r["grade"]) for r in rows]
    )
    assert score(model, task_of(suite_file, "Graded")) == pytest.approx(graded(model)["spearman_cosine"], abs=1e-6)

    pairs = [json.loads(line) for line in (suite_file.parent / "pairs.jsonl").read_text().splitlines()]
    same = BinaryClassificationEvaluator(
        *([p[key] for p in pairs] for key in ("sentence1", "sentence2", "label")),
        similarity_fn_names=["cosine", "euclidean", "manhattan", "dot"],
    )
    metrics, result = same(model), score_task(model, task_of(suite_file, "Same"), name="model", revision="")
    assert result["main_score"] == pytest.approx(metrics["max_ap"], abs=1e-6)
    assert result["metrics"]["cosine_ap"] == pytest.approx(metrics["cosine_ap"], abs=1e-6)
    assert metrics["cosine_ap"] != pytest.approx(metrics["max_ap"], abs=1e-6)

    queries = {f"q{i}": text for i, text in enumerate(CORPUS[:6])}
    relevant = {f"q{i}": {f"d{(i * 5 + j) % len(TEXTS)}" for j in range(4)} for i in range(6)}
    search = InformationRetrievalEvaluator(queries, {f"d{i}": text for i, text in enumerate(TEXTS)}, relevant)
    ndcg = search(model)["cosine_ndcg@10"]
    assert ndcg > 0
    assert score(model, task_of(suite_file, "Search")) == pytest.approx(ndcg, abs=1e-5)  # mteb rounds to five digits


def test_classification_and_clustering_are_those_of_mteb(suite_file: Path, make_model: Callable[..., Any]) -> None:
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering

    model = make_model()
    read = {split: read_csv(suite_file.parent / f"{split}.csv") for split in ("train", "test")}
    names = sorted({row["label"] for row in read["train"]})
    for name, base, attributes in (
        ("Subject", AbsTaskClassification, {}),
        ("Groups", AbsTaskClustering, {"max_fraction_of_documents_to_embed": 1.0}),
    ):
        ours = task_of(suite_file, name)
        columns = ("sentences", "labels") if name == "Groups" else ("text", "label")
        data = {
            split: {columns[0]: [r["text"] for r in rows], columns[1]: [names.index(r["label"]) for r in rows]}
            for split, rows in read.items()
        }
        theirs = type("Theirs", (base,), {"metadata": ours.metadata, **attributes})()
        theirs.dataset = DatasetDict({split: Dataset.from_dict(table) for split, table in data.items()})
        theirs.data_loaded = True
        expected = mteb.evaluate(model, theirs, cache=None, show_progress_bar=False).task_results[0].get_score()
        assert 0 < expected < 1
        assert score(model, ours) == pytest.approx(expected, abs=1e-6)


def test_what_is_done_is_read_and_other_weights_are_not(
    suite_file: Path, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_model(), make_model("qwen3")
    scores = [score(model, task_of(suite_file, "Graded"), cache=tmp_path / "cache") for model in (first, second)]
    assert scores[0] != scores[1]
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: pytest.fail("was encoded again"))
    again = [score(model, task_of(suite_file, "Graded"), cache=tmp_path / "cache") for model in (first, second)]
    assert again == scores


def test_a_changed_file_is_scored_again(suite_file: Path, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, data = make_model(), suite_file.parent / "sts.csv"
    before = score(model, task_of(suite_file, "Graded"), cache=tmp_path / "cache")
    rows = read_csv(data)
    write_csv(data, list(rows[0]), [[row["a"], row["b"], 5 - float(row["grade"])] for row in rows])
    assert score(model, task_of(suite_file, "Graded"), cache=tmp_path / "cache") == pytest.approx(-before, abs=1e-6)


def test_batches_shrink_when_memory_runs_out(
    suite_file: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encode, sizes = make_model(), SentenceTransformer.encode, []
    expected = score(model, task_of(suite_file, "Graded"))

    def encode_small(self: Any, *args: Any, batch_size: int = 32, **kwargs: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 8:
            raise RuntimeError("CUDA out of memory.")
        return encode(self, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", encode_small)
    assert score(model, task_of(suite_file, "Graded"), batch_size=32) == pytest.approx(expected, abs=1e-6)
    assert sizes[:3] == [32, 16, 8]


def test_a_fingerprint_is_of_all_that_vectors_depend_on(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model(num_gem_tokens=2)
    before = fingerprint(model)
    assert fingerprint(make_model(num_gem_tokens=2)) == before
    model.prompts["query"] = "Find: "
    with_prompt = fingerprint(model)
    model.max_seq_length = 20
    shorter = fingerprint(model)
    model[0].model.get_input_embeddings().weight.data[3, 3] += 1e-6
    assert len({before, with_prompt, shorter, fingerprint(model)}) == 4


def test_a_limit_takes_a_fixed_sample(suite_file: Path) -> None:
    limits = load_suite(str(suite_file)).tasks
    for task in limits:
        limit_task(task, 5)
    graded, same, subject, groups, search = (task.dataset for task in limits)
    assert [len(data["test"]) for data in (graded, same, subject, groups)] == [5] * 4
    assert len(subject["train"]) == len(TEXTS) // 2
    split = search["default"]["test"]
    assert len(split["queries"]) == len(split["relevant_docs"]) == 5
    assert len(split["corpus"]) == len(TEXTS)
    assert sample_indices(10, 4) == sample_indices(10, 4) != [0, 1, 2, 3]
    assert sample_indices(3, 4) == sample_indices(3, None) == [0, 1, 2]


def test_texts_of_a_suite(suite_file: Path) -> None:
    assert read_texts_of(load_suite(str(suite_file)), 5) == CORPUS[:5]
    without = read_texts_of(load_suite(str(suite_file), knowledge=[]), 20)
    assert len(without) == 20
    assert set(without) <= {*TEXTS, *CORPUS}


def test_the_paper_names_sixteen_tasks_which_mteb_has() -> None:
    tasks = load_suite("paper").tasks
    assert [task.metadata.name for task in tasks] == list(PAPER_TASKS)
    assert len(set(PAPER_TASKS)) == 16
    assert all(task.hf_subsets in (["default"], ["en"], ["en-en"]) for task in tasks)


BAD_ENTRIES = {
    "unknown type": ("{name: X, type: Rank, data: sts.csv}", "of type 'Rank'. Known are STS"),
    "no name": ("{type: STS, data: sts.csv}", "needs name and type"),
    "no data": ("{name: X, type: STS}", "needs `data:`"),
    "no train": ("{name: X, type: Classification, data: test.csv}", "needs `train:`"),
    "unknown setting": ("{name: X, type: STS, data: sts.csv, split: dev}", r"not known: \['split'\]"),
    "unknown column": ("{name: X, type: STS, data: sts.csv, columns: {first: a}}", r"names columns \['first'\]"),
    "missing column": ("{name: X, type: STS, data: sts.csv}", r"no column 'sentence1', but \['a', 'b', 'grade'\]"),
    "missing file": ("{name: X, type: STS, data: none.csv}", "none.csv cannot be read"),
    "unknown kind of file": ("{name: X, type: STS, data: lines.txt}", "no kind that can be read"),
    "bad limit": ("{name: X, type: Clustering, data: test.csv, limit: 0}", "limit of task 'X'"),
    "a path for a name": ("{name: ../../X, type: STS, data: sts.csv}", "'../../X' in .* is no name of a task"),
    "an empty name": ("{name: , type: STS, data: sts.csv}", "None in .* is no name of a task"),
    "two types": ("{name: X, type: [STS], data: sts.csv}", r"type of task 'X' must be text, got \['STS'\]"),
    "columns in a list": ("{name: X, type: STS, data: sts.csv, columns: [a]}", r"must name columns, got \['a'\]"),
    "no corpus": ("{name: X, type: Retrieval, data: .}", "corpus.jsonl cannot be read"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries(suite_file: Path, case: str) -> None:
    entry, message = BAD_ENTRIES[case]
    suite_file.write_text(f"tasks:\n  - {entry}\n")
    with pytest.raises(ValueError, match=message):
        load_suite(str(suite_file))


BAD_FILES = {
    "score": (
        "STS",
        "sentence1,sentence2,score\na,b,1\nc,d,high\n",
        "row 2, column 'score' must be a number, got 'high'",
    ),
    "infinite score": ("STS", "sentence1,sentence2,score\na,b,1\nc,d,nan\n", "must be a number, got 'nan'"),
    "one score": ("STS", "sentence1,sentence2,score\na,b,1\nc,d,1\n", "every score is 1.0"),
    "label of a pair": ("PairClassification", "sentence1,sentence2,label\na,b,2\n", "must be 0 or 1, got '2'"),
    "one label of pairs": ("PairClassification", "sentence1,sentence2,label\na,b,1\nc,d,1\n", "every label is 1"),
    "one cluster": ("Clustering", "text,label\na,x\nb,x\n", "one label only"),
    "a long row": (
        "STS",
        "sentence1,sentence2,score\na,b,1\nIn May, or June,c,3\n",
        "row 2 has more values than the 3",
    ),
    "a lone quote": ("Clustering", 'text,label\n"a,x\nb,y\n"c,x\n', "cannot be read"),
    "a short row": ("Clustering", "text,label\na,x\nb\n", "row 2 has no 'label'"),
    "no rows": ("Clustering", "text,label\n", "has no rows"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    kind, content, message = BAD_FILES[case]
    (tmp_path / "data.csv").write_text(content)
    (tmp_path / "suite.yaml").write_text(f"tasks:\n  - {{name: X, type: {kind}, data: data.csv}}\n")
    with pytest.raises(ValueError, match=message):
        load_suite(str(tmp_path / "suite.yaml"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0\td0\thigh", "score of row 1 must be a whole number, got 'high'"),
        ("q0\td999\t1", "names a document 'd999' that is not there"),
        ("q999\td0\t1", "names a query 'q999' that is not there"),
        ("q0\td0\t0", "judges no document relevant"),
    ],
)
def test_bad_judgements(suite_file: Path, line: str, message: str) -> None:
    (suite_file.parent / "ir/qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_suite(str(suite_file))


def test_labels_that_training_lacks(suite_file: Path) -> None:
    write_csv(suite_file.parent / "test.csv", ["text", "label"], [["a", "cat"], ["b", "bird"]])
    with pytest.raises(ValueError, match=r"labels that train.csv lacks: \['bird'\]"):
        load_suite(str(suite_file))


def test_unknown_names(suite_file: Path) -> None:
    with pytest.raises(ValueError, match=r"no suite 'papers'\. Known are paper, smoke"):
        load_suite("papers")
    with pytest.raises(ValueError, match="trivia"):
        load_suite(str(suite_file), knowledge=["trivia"])
    suite_file.write_text("tasks: 3\n")
    with pytest.raises(ValueError, match=r"`tasks:` in .* must be a list, got 3"):
        load_suite(str(suite_file))
    suite_file.write_text("task: []\n")
    with pytest.raises(ValueError, match=r"must hold `tasks:`, `knowledge:` or both, but holds \['task'\]"):
        load_suite(str(suite_file))


@pytest.mark.skipif(not (SHARED / "data" / "sts").exists(), reason="the shared data is not on this machine")
def test_the_suite_of_the_leaderboard_loads(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "benchmarks/quality/leaderboard.yaml"
    (tmp_path / "suite.yaml").write_text(file.read_text())
    for folder in (SHARED / "data").iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    assert len(load_suite(str(tmp_path / "suite.yaml")).tasks) == 7


def test_without_mteb_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gem_st.evaluation.suites.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need mteb: pip install 'gem-st\[eval\]', with Python 3.11"):
        load_suite("smoke")
