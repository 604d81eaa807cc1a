"""A real LLM as an embedder: similarity, retrieval and what the generator lost, for any mode, data and loss.

    python benchmarks/quality/real_llm.py --data DATA --base smollm2-135m-instruct --mode frozen --train nli+wiki
    python benchmarks/quality/real_llm.py --data DATA --base smollm2-135m-instruct --mode mean
    python benchmarks/quality/real_llm.py --table

Bases are names of examples/models.py, folders or Hub ids; DATA is described in benchmarks/README.md. Settings are
chosen with --split dev; --split test is what is reported. Each run is a line of --results, with its settings, versions
and hardware, and is not run again. --table prints them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.util import cos_sim
from stsb import read_held_out, sts_evaluator
from transformers import set_seed

from gem_st import GemLoss, GemTransformer
from gem_st.evaluation import perplexity
from gem_st.evaluation.baselines import build_baseline
from gem_st.training.data import TrainData
from gem_st.training.measures import describe_versions
from gem_st.training.teacher import follow_teacher

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from demo import build_evaluators  # noqa: E402
from models import resolve  # noqa: E402

RESULTS = Path(__file__).with_name("results") / "real_llm.jsonl"
BASELINES = ("mean", "lasttoken", "echo")
PROMPT = "The capital of France is"


# ---- data


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def nli_sentences(data: Path) -> list[str]:
    return sorted({row[key] for row in read_csv(data / "nli/pairs.csv") for key in ("premise", "hypothesis")})


def wiki_sentences(data: Path) -> list[str]:
    return [line for line in (data / "text/wikipedia_sentences.txt").read_text().splitlines() if len(line.split()) > 3]


def articles(data: Path) -> list[tuple[str, str]]:
    """Heading and paragraph of each section of WikiText-2, whose markup of tokens is undone."""
    found, headings = [], ["", ""]
    for line in (data / "text/wikitext2/train_5k.txt").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if match := re.fullmatch(r"((?:= )+)(.*?)(?: =)+", text):
            headings = [match[2], ""] if match[1].count("=") == 1 else [headings[0], match[2]]
        elif len(text.split()) > 30:
            for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", ".")):
                text = text.replace(mark, plain)
            found.append((", ".join(part for part in headings if part), text))
    return found


def paragraphs(data: Path) -> list[str]:
    """Paragraphs of WikiText-2 and of books."""
    books = (data / "text/classic_books_60m.txt").open(encoding="utf-8").read(6_000_000).split("\n\n")
    return [text for _, text in articles(data)] + [" ".join(b.split()) for b in books if 40 < len(b.split()) < 200]


def first_sentences(data: Path) -> list[tuple[str, str]]:
    """The first sentence of a paragraph, or its heading, against the rest."""
    pairs = []
    for heading, text in articles(data):
        first, _, rest = text.partition(". ")
        if heading:
            pairs.append((heading, text))
        if len(rest.split()) > 20 and 4 < len(first.split()) < 40:
            pairs.append((f"{first}.", rest))
    return pairs


def columns(name: str, data: Path) -> dict[str, list[str]]:
    """Training columns by name: of several, joined by +, as many rows of each."""
    if name == "triplets":
        rows = read_csv(data / "nli/triplets.csv")
        return {key: [row[key] for row in rows] for key in ("anchor", "positive", "negative")}
    if name == "nli-pairs":
        rows = [row for row in read_csv(data / "nli/pairs.csv") if row["label"] == "entailment"]
        return {"anchor": [row["premise"] for row in rows], "positive": [row["hypothesis"] for row in rows]}
    if name == "quora":
        rows = [row for row in read_csv(data / "pairs/quora-dev.csv") if row["is_duplicate"] == "1"]
        return {"anchor": [row["question1"] for row in rows], "positive": [row["question2"] for row in rows]}
    if name == "headings":
        pairs = first_sentences(data)
        return {"anchor": [first for first, _ in pairs], "positive": [second for _, second in pairs]}
    if name == "demo":
        return {"text": (ROOT / "examples/data/train.txt").read_text(encoding="utf-8").splitlines()}
    if name == "own":
        return {"text": (ROOT / "examples/data/written.txt").read_text(encoding="utf-8").splitlines()}
    sources = {"nli": nli_sentences, "wiki": wiki_sentences, "paragraphs": paragraphs}
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
    documents = [json.loads(line) for line in (data / "ir/cisi/corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (data / "ir/cisi/queries.jsonl").read_text().splitlines()]
    relevant: dict[str, set[str]] = {}
    for line in (data / "ir/cisi/qrels.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            relevant.setdefault(query, set()).add(document)
    corpus = {document["_id"]: (document["title"], document["text"]) for document in documents}
    return corpus, {query["_id"]: query["text"] for query in queries if query["_id"] in relevant}, relevant


def search(*queries_corpus_relevant: dict[str, Any]) -> InformationRetrievalEvaluator:
    """nDCG@10 by cosine, of queries, corpus and what is relevant."""
    options = {"score_functions": {"cosine": cos_sim}, "main_score_function": "cosine", "batch_size": 32}
    return InformationRetrievalEvaluator(*queries_corpus_relevant, **options)


def titles_evaluator(data: Path, num: int = 400) -> InformationRetrievalEvaluator:
    """Titles of CISI's documents against the texts of the same documents."""
    corpus, _, _ = cisi(data)
    corpus = dict(random.Random(0).sample(sorted((k, v) for k, v in corpus.items() if v[0] and v[1]), num))
    titles, texts = ({key: document[place] for key, document in corpus.items()} for place in (0, 1))
    return search(titles, texts, {key: {key} for key in corpus})


def cisi_evaluator(data: Path) -> InformationRetrievalEvaluator:
    corpus, queries, relevant = cisi(data)
    return search(queries, {key: f"{title}. {text}" for key, (title, text) in corpus.items()}, relevant)


def evaluators(names: list[str], data: Path, split: str) -> dict[str, Any]:
    makers = {
        "sts": lambda: sts_evaluator(data, split),
        "titles": lambda: titles_evaluator(data),
        "cisi": lambda: cisi_evaluator(data),
        "demo similarity": lambda: build_evaluators()["similarity (Spearman)"],
        "demo retrieval": lambda: build_evaluators()["retrieval (nDCG@10)"],
    }
    return {name: makers[name]() for name in names}


# ---- one run


def build(args: argparse.Namespace, seed: int) -> SentenceTransformer:
    """The model that is to be trained, or a baseline."""
    base, dtype = resolve(args.base), {"dtype": args.dtype}
    if args.mode == "embedder":
        return SentenceTransformer(base)
    if args.mode in BASELINES:
        return build_baseline(args.mode, base, max_seq_length=args.eval_length, model_kwargs=dtype)
    set_seed(seed)
    is_frozen = args.mode == "frozen"
    lora = {"lora_alpha": args.lora_alpha or 8 * args.lora_rank} if is_frozen else None
    gem = GemTransformer(
        base,
        num_gem_tokens=args.num_gem_tokens,
        freeze_base=is_frozen,
        lora_rank=args.lora_rank if is_frozen else None,
        lora_kwargs=lora,
        max_seq_length=args.max_length,
        model_kwargs=dtype if is_frozen else {},
    )
    return SentenceTransformer(modules=[gem])


def train(model: SentenceTransformer, args: argparse.Namespace, seed: int) -> None:
    data = training_set(args.train, args.data, args.num_rows, seed)
    parts = data.values() if isinstance(data, dict) else [data]
    has_texts = any("text" in part.column_names for part in parts)
    options = dict(args.loss)
    if args.teacher:
        found = TrainData(data, list(data.column_names), len(data), held_out=[])
        data = follow_teacher(resolve(args.teacher), model, found).train
        options["loss"] = EmbedDistillLoss(model, distance_metric="cosine")
    loss = GemLoss(model, **options)
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=args.steps // 20,
                bf16=args.mode == "full" and args.dtype == "bfloat16",
                use_cpu=not torch.cuda.is_available(),
                batch_sampler=BatchSamplers.BATCH_SAMPLER if has_texts else BatchSamplers.NO_DUPLICATES,
                logging_steps=25,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=data,
            loss=loss,
        ).train()


@cache
def base_perplexity(base: str, data: Path) -> float:
    plain = GemTransformer(resolve(base), model_kwargs={"dtype": "float32"})
    return perplexity(plain.model, plain.tokenizer, read_held_out(data))


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Build, train, measure."""
    model = build(args, seed)
    is_trained = args.mode in ("frozen", "full")
    start = time.perf_counter()
    if is_trained:
        train(model, args, seed)
    result: dict[str, Any] = {"train_seconds": round(time.perf_counter() - start)}
    model.max_seq_length = args.eval_length
    measures = evaluators(args.evaluate, args.data, args.split)
    for name, evaluator in measures.items():
        metrics = evaluator(model)
        result[name] = round(metrics[evaluator.primary_metric], 4)
    if args.teacher:
        teacher = SentenceTransformer(resolve(args.teacher))
        for name in {"titles", "cisi"} & measures.keys():
            ndcg = [
                measures[name].compute_metrices(query_model, corpus_model=teacher)["cosine"]["ndcg@k"][10]
                for query_model in (model, teacher)
            ]
            result[f"{name}_in_teachers_index"] = [round(value, 4) for value in ndcg]
    if is_trained:
        result["capital"] = model[0].generate(PROMPT, max_new_tokens=8, do_sample=False)
    if args.mode == "full":
        gem = model[0]
        ratio = perplexity(gem.model, gem.tokenizer, read_held_out(args.data)) / base_perplexity(args.base, args.data)
        result["perplexity_ratio"] = round(ratio, 3)
    if args.save:
        model.save_pretrained(f"{args.save}-{seed}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--mode", choices=["frozen", "full", "embedder", *BASELINES], default="frozen")
    parser.add_argument("--train", default="nli+wiki", help="data sets, joined by +")
    parser.add_argument("--num-rows", type=int, default=10_000, help="of each")
    parser.add_argument("--num-gem-tokens", type=int, default=1)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--lora-alpha", type=int)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--eval-length", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss", type=json.loads, default={}, help="JSON, for GemLoss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--evaluate", nargs="+", default=["sts", "titles"])
    parser.add_argument("--save", help="folder for the checkpoint; the seed is added")
    parser.add_argument("--teacher", help="a model whose space is learned")
    parser.add_argument("--note", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.table:
        for entry in done:
            print(json.dumps({**entry["settings"], **entry["result"]}))
        return
    others = ("data", "results", "table", "seeds", "save")
    settings = {name: value for name, value in vars(args).items() if name not in others}
    for seed in args.seeds:
        if any(entry["settings"] == {**settings, "seed": seed} for entry in done):
            continue
        result = run(args, seed)
        versions = describe_versions()
        entry = {"settings": {**settings, "seed": seed}, "result": result, "versions": versions}
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps({**settings, "seed": seed, **result}), flush=True)


if __name__ == "__main__":
    main()
