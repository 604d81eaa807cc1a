"""Small models x {mean pooling, last token, Echo, GEM full, GEM frozen} x K, over a suite of local tasks and seeds.

    python benchmarks/quality/leaderboard.py run --data DATA --models MODELS --results runs/leaderboard
    python benchmarks/quality/leaderboard.py table --results runs/leaderboard --output docs/leaderboard.md

DATA holds what leaderboard.yaml names, nli/pairs.csv to train on and text/*.txt to measure perplexity on; MODELS the
base models. What is done is not done again; results/leaderboard holds what has been, to go on from. Both modes are
trained alike, on sentences of NLI and what follows from them (10,176 pairs); ``RATES`` says what differs. How settings
were chosen is in docs/log.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from stsb import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st.evaluation import perplexity
from gem_st.evaluation.baselines import BASELINES, build_baseline
from gem_st.evaluation.mteb_scores import fingerprint, score_task
from gem_st.evaluation.suites import load_suite
from gem_st.training.measures import describe_versions

SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "max_length": 48,
    "steps": 150,
    "scheduler": "cosine",
    "warmup": 20,
    "dtype": "float32",
    "bf16": False,
    "pooling": "mean",
    "lora_rank": 32,
    "lora_kwargs": {"lora_alpha": 64},
    "tasks": None,
    "plain_ratio": None,
    "token_dropout": None,
    "scale": None,
    "alpha": None,
    "ntp_steps": 30,
    "final_alpha": 0.9,
    "rise_steps": 120,
}
RATES = {
    "stories260K": {"full": 1e-3, "frozen": 2e-3},
    "stories3M": {"full": 4e-4, "frozen": 1e-3},
    "tinystories-instruct-3M-chat": {"full": 4e-4, "frozen": 1e-3},
    "base-8m": {"full": 4e-4, "frozen": 1e-3},
}
"""Bases, and their learning rates by mode."""

STORIES, BOOKS = "tiny_stories_944k", "classic_books_sentences_200k"
NUM_HELD_OUT = 400
MAX_LENGTH = 64
"""Tokens read of each text, by all models alike."""

TYPES = {
    "STS": ["STSB"],
    "Pair": ["MRPC", "Quora"],
    "Cls": ["Banking77", "Emotion"],
    "Clust": ["StackOverflow"],
    "Retr": ["CISI"],
}
"""Task types by the names of the paper's table, and their tasks."""


def arms(num_seeds: int) -> list[dict[str, Any]]:
    """What is compared of each base; seeds in turn, so that a run that is cut short has one of each."""
    result: list[dict[str, Any]] = [{"mode": name, "k": None, "seed": None} for name in BASELINES]
    result += [
        {"mode": mode, "k": k, "seed": s} for s in range(num_seeds) for mode in ("full", "frozen") for k in (1, 4)
    ]
    return result


class Board:
    """Files of a leaderboard, one a base; a line for each arm that is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, args.data
        args.results.mkdir(parents=True, exist_ok=True)
        text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
        for folder in ("sts", "pairs", "classification", "clustering", "ir"):
            text = text.replace(f": {folder}/", f": {self.data.resolve() / folder}/")
        file = args.results / "suite.yaml"
        file.write_text(text, encoding="utf-8")
        self.tasks, self.pairs = load_suite(str(file)).tasks, read_pairs(self.data)

    def held_out(self, base: str) -> list[str]:
        """Lines of the kind of text that the base was made for; no training reads them."""
        name = BOOKS if base == "base-8m" else STORIES
        lines = (self.data / f"text/{name}.txt").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()][-NUM_HELD_OUT:]

    def build(self, base: str, arm: dict[str, Any]) -> tuple[SentenceTransformer, Any, Any]:
        """The embedder of an arm, and the generator that goes with it."""
        path, mode = str(self.args.models / base), arm["mode"]
        if mode in BASELINES:
            model = build_baseline(mode, path, max_seq_length=MAX_LENGTH, model_kwargs={"dtype": "float32"})
            generator = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
            return model, generator, AutoTokenizer.from_pretrained(path)
        settings = {"base": path, "num_gem_tokens": arm["k"], "freeze_base": mode == "frozen"}
        settings["learning_rate"] = RATES[base][mode]
        model, _ = train(argparse.Namespace(**SETTINGS, **settings), self.pairs, arm["seed"])
        model.max_seq_length = MAX_LENGTH + arm["k"]
        return model, model[0].model, model[0].tokenizer

    def measure(self, base: str, arm: dict[str, Any]) -> dict[str, Any]:
        """Train if there is something to train, and put it through the suite."""
        start = time.perf_counter()
        model, generator, tokenizer = self.build(base, arm)
        trained = time.perf_counter() - start
        revision = fingerprint(model)
        scores = {
            t.metadata.name: score_task(model, t, name="arm", revision=revision, batch_size=128) for t in self.tasks
        }
        return {
            "base": base,
            **arm,
            "scores": {name: round(100 * score["main_score"], 3) for name, score in scores.items()},
            "perplexity": perplexity(generator, tokenizer, self.held_out(base)),
            "seconds": [round(trained), round(time.perf_counter() - start - trained)],
            "threads": torch.get_num_threads(),
        }

    def run(self) -> None:
        """Measure what has not been measured."""
        (self.args.results / "versions.json").write_text(json.dumps(describe_versions("mteb")))
        for base in self.args.bases:
            path = self.args.results / f"{base}.jsonl"
            for arm in arms(self.args.seeds):
                if any(all(line[key] == value for key, value in arm.items()) for line in read_lines(path)):
                    continue
                result = self.measure(base, arm)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)


def read_pairs(data: Path) -> Dataset:
    """Premises of NLI, and hypotheses that follow from them."""
    with open(data / "nli/pairs.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "entailment"]
    return Dataset.from_dict(
        {"anchor": [row["premise"] for row in rows], "positive": [row["hypothesis"] for row in rows]}
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Results of a file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------------------
# Tables


def by_type(run: dict[str, Any]) -> list[float]:
    """Scores of a run by task type, and their mean."""
    scores = [mean(run["scores"][task] for task in tasks) for tasks in TYPES.values()]
    return [*scores, mean(scores)]


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean scores of each arm over its seeds, and how its perplexity compares with the base's."""
    names = list(dict.fromkeys((line["mode"], line["k"]) for line in lines))
    base = lines[0]["perplexity"]
    summary = {}
    for mode, k in names:
        runs = [line for line in lines if (line["mode"], line["k"]) == (mode, k)]
        columns = list(zip(*map(by_type, runs), strict=True))
        summary[mode if k is None else f"GEM {mode}, K = {k}"] = {
            "scores": [mean(column) for column in columns],
            "spread": (max(columns[-1]) - min(columns[-1])) / 2,
            "ratios": [run["perplexity"] / base for run in runs],
            "num_seeds": len(runs),
        }
    return summary


def render(results: Path) -> str:
    """The leaderboard: a table of each base, and one of the best of each."""
    head = ["| base | best baseline | GEM full | GEM frozen | lower than a baseline in |", "|---|---|---|---|---|"]
    tables = []
    for base in RATES:
        lines = read_lines(results / f"{base}.jsonl")
        if not lines:
            continue
        summary = summarize(lines)
        tables += [
            f"\n## {base}\n",
            f"| | {' | '.join(TYPES)} | mean | seeds | perplexity |",
            "|---" * (len(TYPES) + 4) + "|",
        ]
        for name, arm in summary.items():
            ratio = f"x {mean(arm['ratios']):.3f}"
            spread = f" ± {arm['spread']:.2f}" if arm["num_seeds"] > 1 else ""
            cells = [*(f"{score:.2f}" for score in arm["scores"][:-1]), f"{arm['scores'][-1]:.2f}{spread}"]
            tables.append(f"| {name} | {' | '.join(cells)} | {arm['num_seeds']} | {ratio} |")
        best = max(BASELINES, key=lambda name: summary[name]["scores"][-1])
        chosen = {mode: best_of(summary, mode) for mode in ("full", "frozen")}
        winner = max(chosen.values(), key=lambda name: summary[name]["scores"][-1])
        tops = [max(summary[name]["scores"][i] for name in BASELINES) for i in range(len(TYPES))]
        lost = [kind for kind, own, top in zip(TYPES, summary[winner]["scores"], tops, strict=False) if own < top]
        cells = [f"{summary[best]['scores'][-1]:.1f} ({best})"]
        cells += [f"{summary[name]['scores'][-1]:.1f} ({name.partition(', ')[2]})" for name in chosen.values()]
        head.append(f"| {base} | {' | '.join(cells)} | {', '.join(lost) or 'none'} |")
    versions = json.loads((results / "versions.json").read_text(encoding="utf-8"))
    made = ", ".join(f"{name} {value}" for name, value in versions.items())
    return "\n".join([HEADER, *head, NOTES.format(made=made), *tables]) + "\n"


def best_of(summary: dict[str, dict[str, Any]], mode: str) -> str:
    """The K with the higher mean of a mode."""
    return max(
        (name for name in summary if name.startswith(f"GEM {mode}")), key=lambda name: summary[name]["scores"][-1]
    )


HEADER = "# Leaderboard\n\nMeans over five task types of mteb's main scores, in percent.\n"
NOTES = f"""
Baselines: mean pooling, the last token, and Echo (each text read twice) of the untouched base, by stock modules of
Sentence Transformers. GEM: {SETTINGS["steps"]} steps on 10,176 pairs of NLI (a sentence, and one that follows from it),
batches of {SETTINGS["batch_size"]}, learning rates in the script. Every model reads {MAX_LENGTH} tokens of a text.
The suite, `benchmarks/quality/leaderboard.yaml`, takes fixed samples of some tasks: scores are not those of the whole
data sets. Perplexity is of held-out text of the kind that the base was made for, as a multiple of the base's. Spread:
half of what lies between the highest and the lowest seed. Made by `benchmarks/quality/leaderboard.py` with {{made}}."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--results", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--bases", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file of the tables; printed without")
    args = parser.parse_args()
    if args.command == "run":
        Board(args).run()
    elif args.output:
        args.output.write_text(render(args.results), encoding="utf-8")
    else:
        print(render(args.results))


if __name__ == "__main__":
    main()
