"""Throughput of `encode` against stock Sentence Transformers on the same base, side by side in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/encode_speed.py

Prints, for each kind of text, the median over rounds of (time of stock) / (time of GEM): above 1, GEM is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from gem_st import GemTransformer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def build_texts(num: int) -> dict[str, list[str]]:
    lines = (EXAMPLES / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    draw = random.Random(0)

    def cut(length: int) -> str:
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return {
        "12 words": [cut(12) for _ in range(num)],
        "50 words": [cut(50) for _ in range(num)],
        "mixed, 3 to 200 words": [cut(int(3 * (200 / 3) ** draw.random())) for _ in range(num)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(EXAMPLES / "base-8m"))
    parser.add_argument("--num", type=int, default=256, help="texts of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    backbone = Transformer(args.base, model_kwargs={"dtype": args.dtype})
    if backbone.tokenizer.pad_token is None:
        backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    models = {
        "stock": SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "lasttoken")])
    }
    for num_gem_tokens in (1, 4):
        gem = GemTransformer(args.base, num_gem_tokens=num_gem_tokens, model_kwargs={"dtype": args.dtype})
        models[f"GEM, K = {num_gem_tokens}"] = SentenceTransformer(modules=[gem])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, batches of {args.batch_size}")
    for kind, texts in build_texts(args.num).items():
        ratios: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds + 1):
            times = {}
            for name, model in models.items():
                start = time.perf_counter()
                model.encode(texts, batch_size=args.batch_size)
                times[name] = time.perf_counter() - start
            for name, seconds in times.items():
                ratios[name].append(times["stock"] / seconds)
        medians = {name: statistics.median(values[1:]) for name, values in ratios.items() if name != "stock"}
        print(f"{kind:<24}" + "".join(f"  {name}: {median:.2f}" for name, median in medians.items()))


if __name__ == "__main__":
    main()
