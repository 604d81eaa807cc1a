"""The paper's ablations at a small scale: one factor changed at a time from one recipe in full mode, over seeds.

    python benchmarks/quality/ablations.py --data DATA --base MODELS/stories3M
    python benchmarks/quality/ablations.py --plot

DATA is that of stsb.py; the recipe is for a model of TinyStories. Each finished run is a line of --results, one file
for a base, and is not run again. --plot draws a picture of these lines and prints them as a Markdown table; it needs
matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from stsb import SPLITS, TEXTS, read_held_out, read_sentences, spearman, sts_evaluator, train
from torch import Tensor
from transformers import set_seed

from gem_st import GemTransformer
from gem_st.evaluation import perplexity
from gem_st.modeling import gem_base, gem_passes

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "num_texts": 8_000,
    "texts": {"stories": 0.67, "wiki": 0.33},
    "num_gem_tokens": 1,
    "positions": "shared",
    "steps": 80,
    "batch_size": 32,
    "max_length": 32,
    "learning_rate": 2e-4,
    "scheduler": "cosine",
    "warmup": 10,
    "plain_ratio": 0.8,
    "token_dropout": 0.7,
    "alpha": None,  # the schedule below
    "ntp_steps": 20,
    "final_alpha": 0.9,
    "rise_steps": 60,
}
CHANGES = {"base-8m": {"texts": {"wiki": 0.5, "nli": 0.5}, "learning_rate": 4e-4}}
"""What else the recipe has for other bases than stories3M, by the name of their folder."""
FIXED = {
    "freeze_base": False,
    "pooling": "mean",
    "dtype": "float32",
    "bf16": False,
    "tasks": ["reconstruction", "continuation"],
    "scale": None,
}
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "p, share of plain rows": {str(p): {"plain_ratio": p} for p in (0.0, 0.5, 0.8, 0.95)},
    "objective": {"NTP": {"alpha": 0.0}, "contrastive": {"alpha": 1.0}, "both": {}},
    "K, GEM tokens": {str(k): {"num_gem_tokens": k} for k in (1, 2, 5, 10)},
    "positions, K = 5": {
        position: {"num_gem_tokens": 5, "positions": position} for position in ("shared", "consecutive")
    },
    "tokens deleted": {str(rate): {"token_dropout": rate} for rate in (0.0, 0.3, 0.5, 0.7, 0.85)},
    "different sentences": {f"{num:,}": {"num_texts": num} for num in (125, 500, 2_000, 8_000)},
}
NOMINAL = ("objective", "positions, K = 5")
BASE = "base, mean pooling"
UNTRAINED = "base, untrained GEM token"
NUM_HELD_OUT = 80


def consecutive_position_ids(segments: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions as a decoder has them without GEM, to stand in for :func:`gem_st.modeling.gem_mask.gem_position_ids`.

    Shapes: ``(B, T)`` each -> ``(B, T)``
    """
    return (attention_mask.bool().cumsum(dim=1) - 1).clamp(min=0)


def use_positions(name: str) -> Any:
    """Patch the positions of rows with GEM tokens, in training and in ``encode`` of full mode (not of a cache)."""
    if name == "shared":
        return nullcontext()
    stack = ExitStack()
    for module in (gem_base, gem_passes):
        stack.enter_context(patch.object(module, "gem_position_ids", consecutive_position_ids))
    return stack


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    """A whole recipe. Raises KeyError for an option that it does not have."""
    if unknown := set(changes) - set(RECIPE):
        raise KeyError(f"Not in the recipe: {sorted(unknown)}.")
    return {**RECIPE, **changes}


def arms() -> Iterator[dict[str, Any]]:
    """The settings to be run, each once, the recipe itself first."""
    seen: list[dict[str, Any]] = []
    for changes in [{}, *(changes for arm in FACTORS.values() for changes in arm.values())]:
        settings = settings_of(changes)
        if settings not in seen:
            seen.append(settings)
            yield settings


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def find_results(results: list[dict[str, Any]], settings: Any) -> list[dict[str, Any]]:
    """The runs of the same settings, one for each seed."""
    return [result for result in results if result["settings"] == settings]


def append_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def read_held_out_text(data: Path) -> list[str]:
    """The last paragraphs of TinyStories, or lines of books, all of whose sentences read_sentences holds out."""
    if "stories" not in RECIPE["texts"]:
        return read_held_out(data)[-200:]
    lines = (data / TEXTS["stories"]).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()][-NUM_HELD_OUT:]


@cache
def cached_sentences(data: Path, num: int, shares: tuple[tuple[str, float], ...]) -> list[str]:
    return read_sentences(data, num, dict(shares))


class Bench:
    """Data and evaluators, read once, and the untouched base's perplexity."""

    def __init__(self, data: Path, base: str) -> None:
        self.data, self.base = data, base
        self.held_out = read_held_out_text(data)
        self.evaluators = [sts_evaluator(data, split) for split in SPLITS]
        dev = self.evaluators[0]  # a third of it, which takes a third of the time
        dev.sentences1, dev.sentences2, dev.scores = dev.sentences1[::3], dev.sentences2[::3], dev.scores[::3]
        plain = GemTransformer(base, model_kwargs={"dtype": "float32"})
        self.base_perplexity = perplexity(plain.model, plain.tokenizer, self.held_out)

    def measure_base(self) -> dict[str, Any]:
        backbone = Transformer(self.base, model_kwargs={"dtype": "float32"})
        model = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
        scores = spearman(model, self.evaluators)
        return {"settings": BASE, "seed": 0, **self._round(scores, 1.0), "perplexity": round(self.base_perplexity, 2)}

    def measure_untrained(self, seed: int) -> dict[str, Any]:
        """The recipe's model before its first step."""
        set_seed(seed)
        gem = GemTransformer(
            self.base,
            num_gem_tokens=RECIPE["num_gem_tokens"],
            max_seq_length=RECIPE["max_length"],
            model_kwargs={"dtype": FIXED["dtype"]},
        )
        scores = spearman(SentenceTransformer(modules=[gem]), self.evaluators)
        return {"settings": UNTRAINED, "seed": seed, **self._round(scores, 1.0)}

    def measure(self, settings: Any, seed: int) -> dict[str, Any]:
        return self.measure_untrained(seed) if settings == UNTRAINED else self.run(settings, seed)

    def run(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train with a recipe and a seed, and measure the model."""
        start = time.perf_counter()
        texts = cached_sentences(self.data, settings["num_texts"], tuple(settings["texts"].items()))
        args = argparse.Namespace(base=self.base, **FIXED, **settings)
        with use_positions(settings["positions"]):
            model, seconds = train(args, texts, seed)
            scores = spearman(model, self.evaluators)
        gem: Any = model[0]
        ratio = perplexity(gem.model, gem.tokenizer, self.held_out) / self.base_perplexity
        result = {"settings": settings, "seed": seed, **self._round(scores, ratio), "num_read": len(texts)}
        return {**result, "train_seconds": round(seconds), "seconds": round(time.perf_counter() - start)}

    @staticmethod
    def _round(scores: np.ndarray, ratio: float) -> dict[str, float]:
        values = {split: round(float(score), 4) for split, score in zip(SPLITS, scores, strict=True)}
        return {**values, "perplexity_ratio": round(ratio, 4)}


def run_all(args: argparse.Namespace) -> None:
    """Run what is not in the results yet, seed by seed, so that what is there at any time can be read."""
    bench = Bench(args.data, args.base)
    if not find_results(read_results(args.results), BASE):
        append_result(args.results, bench.measure_base())
    for seed in args.seeds:
        for settings in (UNTRAINED, *arms()):
            if seed not in [result["seed"] for result in find_results(read_results(args.results), settings)]:
                append_result(args.results, bench.measure(settings, seed))


def format_values(runs: list[dict[str, Any]], name: str, digits: int) -> str:
    values = [run[name] for run in runs]
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(results: list[dict[str, Any]]) -> None:
    (base,) = find_results(results, BASE)
    print(f"Untouched base: dev {base['dev']:.3f}, test {base['test']:.3f}, perplexity {base['perplexity']:.1f}")
    if untrained := find_results(results, UNTRAINED):
        print(f"Untrained GEM token: {', '.join(f'{split} {format_values(untrained, split, 3)}' for split in SPLITS)}")
    print()
    print("| factor | | seeds | dev | test | perplexity | seconds |")
    print("|---|---|---|---|---|---|---|")
    for factor, levels in FACTORS.items():
        for level, changes in levels.items():
            if runs := find_results(results, settings_of(changes)):
                cells = [format_values(runs, name, 3) for name in (*SPLITS, "perplexity_ratio")]
                name = f"**{level}**" if settings_of(changes) == RECIPE else level
                seconds = round(mean(run["train_seconds"] for run in runs))
                print(f"| {factor} | {name} | {len(runs)} | {' | '.join(cells)} | {seconds} |")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One column for each factor: STS-B test above, perplexity below; dots are seeds, dashes their mean."""
    from matplotlib import pyplot as plt

    (base,) = find_results(results, BASE)
    figure, axes = plt.subplots(2, len(FACTORS), figsize=(15, 5.4), sharey="row", sharex="col", layout="constrained")
    for column, (factor, levels) in enumerate(FACTORS.items()):
        for axis, measure, color in zip(axes[:, column], ("test", "perplexity_ratio"), ("C0", "C3"), strict=True):
            axis.axhline(base[measure], color="0.4", linestyle="--", linewidth=1, label="untouched base, mean pooling")
            means = []
            for place, changes in enumerate(levels.values()):
                values = [run[measure] for run in find_results(results, settings_of(changes))]
                means.append(mean(values) if values else np.nan)
                axis.plot([place] * len(values), values, "o", color=color, alpha=0.5, markersize=5)
                if settings_of(changes) == RECIPE:
                    axis.axvspan(place - 0.25, place + 0.25, color="0.92", zorder=0, label="the recipe")
            style: dict[str, Any] = {"marker": "_", "markersize": 16, "markeredgewidth": 2, "color": color}
            style["linestyle"] = "none" if factor in NOMINAL else "-"
            axis.plot(means, **style, label="mean of the seeds (dots)")
            axis.grid(axis="y", alpha=0.3)
            axis.set_xlim(-0.5, len(levels) - 0.5)
        axes[0, column].set_title(factor, fontsize=11)
        axes[1, column].set_xticks(range(len(levels)), list(levels), fontsize=9)
    axes[0, 0].set_ylabel("STS-B test, Spearman")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes[1, 0].minorticks_off()
    axes[1, 0].set_ylabel("perplexity of stories,\nmultiple of the base's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/quality/results/ablations.jsonl")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/ablations.png")
    args = parser.parse_args()
    if args.plot:
        results = read_results(args.results)
        print_table(results)
        draw(results, args.picture)
    elif args.data is None or args.base is None:
        parser.error("Training needs --data, a folder as stsb.py describes it, and --base, a model.")
    else:
        torch.set_num_threads(1)
        RECIPE.update(CHANGES.get(Path(args.base).name, {}))
        run_all(args)


if __name__ == "__main__":
    main()
