"""How the time of `encode` grows with the number of texts, with their length, and with K: one picture.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/growth.py         # measures, and draws docs/images/growth.png
    python benchmarks/growth.py --draw

A random Llama of 2 layers and width 256 that reads 8,192 tokens, with the tokenizer of examples/base-8m; stock is the
same base with last-token pooling. Each point is the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from encode_speed import Texts, write_random
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from gem_st import GemTransformer
from gem_st.evaluation.baselines import build_baseline
from gem_st.training.measures import describe_versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PICTURE = ROOT / "docs" / "images" / "growth.png"
NUM_TEXTS, LENGTHS, GEM_TOKENS = (1, 8, 64, 512, 4096, 32768, 65536), (8, 32, 128, 512, 2048, 8150), (1, 2, 4, 8, 16)
AXES = {"texts of 8 tokens": "seconds", "tokens in a text": "seconds a text", "GEM tokens, K": "seconds a text of 64"}
COLORS = {"stock": "tab:gray", "full": "tab:orange", "frozen": "tab:blue"}


def build(scratch: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "base-8m", model_max_length=8192)
    return write_random(
        scratch,
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
    )


def seconds(model: SentenceTransformer, texts: list[str], rounds: int) -> float:
    best = float("inf")
    for _ in range(1 if len(texts) > 1_000 else rounds):
        start = time.perf_counter()
        model.encode(texts)
        best = min(best, time.perf_counter() - start)
    return best


def measure(rounds: int) -> dict[str, Any]:
    """Points of each curve: what is varied, and seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        base = build(scratch)
        texts = Texts(AutoTokenizer.from_pretrained(base))

        def gem(freeze_base: bool, num_gem_tokens: int = 1) -> SentenceTransformer:
            torch.manual_seed(0)
            module = GemTransformer(base, num_gem_tokens=num_gem_tokens, freeze_base=freeze_base)
            return SentenceTransformer(modules=[module], device="cpu")

        models = {"stock": build_baseline("lasttoken", base), "full, K = 1": gem(False), "frozen, K = 1": gem(True)}
        for model in models.values():
            model.encode([texts.cut(8)])
        curves: dict[str, dict[str, list[tuple[int, float]]]] = {axis: {} for axis in AXES}
        by_number, by_length, by_k = curves.values()
        many = [texts.cut(8) for _ in range(max(NUM_TEXTS))]
        for name, model in models.items():
            by_number[name] = [(num, seconds(model, many[:num], rounds)) for num in NUM_TEXTS]
            by_length[name] = []
            for length in LENGTHS:
                sample = [texts.cut(length) for _ in range(max(1, 512 // length))]
                by_length[name].append((length, seconds(model, sample, rounds) / len(sample)))
            print(name, by_number[name], by_length[name], flush=True)
        sample = [texts.cut(64) for _ in range(64)]
        for name, freeze_base in (("full", False), ("frozen", True)):
            by_k[name] = [(k, seconds(gem(freeze_base, k), sample, rounds) / len(sample)) for k in GEM_TOKENS]
    return curves


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for ax, (label, unit) in zip(axes, AXES.items(), strict=True):
        for name, points in curves[label].items():
            color = COLORS[name.partition(",")[0]]
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=color)
        ax.set(xlabel=label, ylabel=unit, xscale="log")
        ax.set_yscale("linear" if label.startswith("GEM") else "log")
        ax.set_ylim(bottom=0 if label.startswith("GEM") else None)
        ax.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="only the picture, of what was measured")
    args = parser.parse_args()
    if not args.draw:
        found = {"curves": measure(args.rounds), "threads": torch.get_num_threads(), "versions": describe_versions()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(found), encoding="utf-8")
    draw(json.loads(RESULTS.read_text(encoding="utf-8"))["curves"])


if __name__ == "__main__":
    main()
