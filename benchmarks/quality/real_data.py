"""Data of the experiments on a real LLM: what is trained on, by name, and what is measured.

benchmarks/README.md says where it comes from.
"""

from __future__ import annotations

import csv
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset
from leaderboard import read_lines
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SequentialEvaluator
from sentence_transformers.util import cos_sim
from stsb import sts_evaluator

from gem_st.evaluation.suites import Suite, load_suite, sample_indices
from gem_st.training.teacher import sentences_of, short_spans

ROOT = Path(__file__).resolve().parents[2]
TITLED = ROOT / "runs/titled.jsonl"
"""What write_titles.py wrote."""
sys.path.insert(0, str(ROOT / "examples"))
from demo import build_evaluators  # noqa: E402


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def nli_sentences(data: Path) -> list[str]:
    return sorted({row[key] for row in read_csv(data / "nli/pairs.csv") for key in ("premise", "hypothesis")})


def wiki_sentences(data: Path) -> list[str]:
    return [line for line in (data / "text/wikipedia_sentences.txt").read_text().splitlines() if len(line.split()) > 3]


def wikitext(data: Path) -> list[str]:
    """Paragraphs of WikiText-2, whose markup of tokens is undone."""
    found = []
    for line in (data / "text/wikitext2/train_5k.txt").read_text(encoding="utf-8").splitlines():
        if len(line.split()) > 30:
            for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", ".")):
                line = line.replace(mark, plain)
            found.append(line.strip())
    return found


def paragraphs(data: Path) -> list[str]:
    """Paragraphs of WikiText-2 and of books."""
    books = (data / "text/classic_books_60m.txt").open(encoding="utf-8").read(6_000_000).split("\n\n")
    return wikitext(data) + [" ".join(b.split()) for b in books if 40 < len(b.split()) < 200]


def indexed(data: Path) -> list[str]:
    """What an index of CISI was made of, and its sentences; titles, which are looked for, are not among them."""
    texts = [text for title, text in cisi(data)[0].values() if text != title]
    return [*texts, *sentences_of(texts)]


def spans(data: Path) -> list[str]:
    """Short spans of the texts and sentences of the index."""
    return sorted(set(short_spans(indexed(data))))


def first_sentences(data: Path) -> list[tuple[str, str]]:
    """The first sentence of a paragraph against the rest."""
    cut = [text.partition(". ") for text in paragraphs(data)]
    return [(f"{first}.", rest) for first, _, rest in cut if len(rest.split()) > 20 and 4 < len(first.split()) < 40]


@cache
def columns(name: str, data: Path) -> dict[str, list[str]]:
    """Training columns by name: of several, joined by +, as many rows of each."""
    if name == "triplets":
        rows = read_csv(data / "nli/triplets.csv")
        return {key: [row[key] for row in rows] for key in ("anchor", "positive", "negative")}
    if name == "nli-pairs":
        rows = [row for row in read_csv(data / "nli/pairs.csv") if row["label"] == "entailment"]
        return {"anchor": [row["premise"] for row in rows], "positive": [row["hypothesis"] for row in rows]}
    if name == "quora":
        rows = read_csv(data / "pairs/quora-dev.csv")
        questions = ("question1", "question2")
        tested = {rows[index][key] for index in sample_indices(len(rows), NUM_QUORA_TESTED) for key in questions}
        rows = [row for row in rows if row["is_duplicate"] == "1" and tested.isdisjoint(row[key] for key in questions)]
        return {"anchor": [row["question1"] for row in rows], "positive": [row["question2"] for row in rows]}
    if name == "first":
        pairs = first_sentences(data)
        return {"anchor": [first for first, _ in pairs], "positive": [rest for _, rest in pairs]}
    if name == "written":
        rows = read_lines(ROOT / "examples/data/written.jsonl")
        return {"anchor": [row["subject"] for row in rows], "positive": [row["passage"] for row in rows]}
    if name == "titled":
        rows = read_lines(TITLED)
        return {"anchor": [row["title"] for row in rows], "positive": [row["text"] for row in rows]}
    if name in ("passages", "titles"):  # both columns of such pairs, as single texts
        pairs = columns("written" if name == "passages" else "titled", data)
        return {"text": [*pairs["anchor"], *pairs["positive"]]}
    sources = {
        "nli": nli_sentences,
        "wiki": wiki_sentences,
        "paragraphs": paragraphs,
        "indexed": indexed,
        "spans": spans,
    }
    return {"text": sources[name](data)}


def training_set(names: str, data: Path, num: int, seed: int) -> Dataset | dict[str, Dataset]:
    """One data set, or a dict of them where their columns differ; equal numbers of rows of each."""
    parts = {}
    for name in names.split("+"):
        found = columns(name, data)
        rows = list(zip(*found.values(), strict=True))
        random.Random(seed).shuffle(rows)
        parts[name] = dict(zip(found, zip(*rows[:num], strict=True), strict=True))
    if len({tuple(part) for part in parts.values()}) > 1:
        return {name: Dataset.from_dict({k: list(v) for k, v in part.items()}) for name, part in parts.items()}
    keys = next(iter(parts.values()))
    return Dataset.from_dict({key: [text for part in parts.values() for text in part[key]] for key in keys})


def cisi(data: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str], dict[str, set[str]]]:
    documents, queries = (read_lines(data / f"ir/cisi/{name}.jsonl") for name in ("corpus", "queries"))
    relevant: dict[str, set[str]] = {}
    for line in (data / "ir/cisi/qrels.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            relevant.setdefault(query, set()).add(document)
    corpus = {document["_id"]: (document["title"], document["text"]) for document in documents}
    return corpus, {query["_id"]: query["text"] for query in queries if query["_id"] in relevant}, relevant


NUM_QUORA_TESTED = 800
"""Rows that leaderboard.yaml tests; no training reads their questions."""
GROUP = 119
"""Documents among which a title is looked for."""


def search(*queries_corpus_relevant: dict[str, Any]) -> InformationRetrievalEvaluator:
    """nDCG@10 by cosine, of queries, corpus and what is relevant."""
    options = {"score_functions": {"cosine": cos_sim}, "main_score_function": "cosine", "batch_size": 32}
    return InformationRetrievalEvaluator(*queries_corpus_relevant, **options)


def titles_evaluator(data: Path, split: str) -> SequentialEvaluator:
    """Titles of CISI's documents against the texts of 119 of them at a time: three such groups on dev, nine on test."""
    corpus, _, _ = cisi(data)
    rows = sorted((key, row) for key, row in corpus.items() if all(row))
    random.Random(0).shuffle(rows)
    groups = [dict(rows[start : start + GROUP]) for start in range(0, len(rows) - GROUP + 1, GROUP)][: 3 + 9]
    parts = [
        search(
            {key: row[0] for key, row in group.items()},
            {key: row[1] for key, row in group.items()},
            {key: {key} for key in group},
        )
        for group in (groups[:3] if split == "dev" else groups[3:])
    ]
    return SequentialEvaluator(parts, main_score_function=mean)


def cisi_evaluator(data: Path) -> InformationRetrievalEvaluator:
    corpus, queries, relevant = cisi(data)
    return search(queries, {key: f"{title}. {text}" for key, (title, text) in corpus.items()}, relevant)


def evaluators(names: Sequence[str], data: Path, split: str) -> dict[str, Any]:
    """By name; what is no evaluator of Sentence Transformers is left out, and CISI on dev, as it has one split."""
    makers: dict[str, Callable[[], Any]] = {
        "sts": lambda: sts_evaluator(data, split),
        "titles": lambda: titles_evaluator(data, split),
        "cisi": lambda: cisi_evaluator(data),
        "demo similarity": lambda: build_evaluators()["similarity (Spearman)"],
        "demo retrieval": lambda: build_evaluators()["retrieval (nDCG@10)"],
    }
    if split == "dev":
        del makers["cisi"]
    return {name: makers[name]() for name in names if name in makers}


def local_suite(data: Path) -> Suite:
    """The tasks of leaderboard.yaml, whose paths are put below ``data``."""
    text = Path(__file__).with_name("leaderboard.yaml").read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(re.sub(r": (\w+/[\w/.-]+)", lambda match: f": {data.resolve() / match[1]}", text))
        file.flush()
        return load_suite(file.name)
