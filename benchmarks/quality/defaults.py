"""What training is worth without any option: the snippet of the README, on small bases, in both modes, over seeds.

    python benchmarks/quality/defaults.py --data DATA --bases MODELS/base-8m MODELS/stories3M

250 steps of 32 sentences at 2e-4, everything else as it is by default. DATA as for stsb.py. Prints a table in markdown;
--output takes the same as JSON, with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from stsb import read_held_out, read_sentences, spearman, sts_evaluator
from transformers import set_seed

from gem_st import GemLoss, GemTransformer
from gem_st.evaluation import perplexity
from gem_st.training.measures import describe_versions

TEXTS = {"books": 0.2, "nli": 0.8}
NUM_TEXTS = 8_000


def train(base: str, freeze_base: bool, sentences: list[str], seed: int) -> SentenceTransformer:
    """The untouched snippet; what it leaves behind as a user would load it."""
    set_seed(seed)
    model = SentenceTransformer(modules=[GemTransformer(base, freeze_base=freeze_base)])
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder, max_steps=250, per_device_train_batch_size=32, learning_rate=2e-4, **quiet
            ),
            train_dataset=Dataset.from_dict({"text": sentences}),
            loss=GemLoss(model),
        ).train()
        model.save_pretrained(f"{folder}/model")
        return SentenceTransformer(f"{folder}/model", trust_remote_code=True)


def measure_base(base: str, evaluators: list, held_out: list[str]) -> tuple[list[float], float]:
    """Mean pooling on each split, and the perplexity of held-out text."""
    backbone = Transformer(base, model_kwargs={"dtype": "float32"})
    pooled = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
    plain = GemTransformer(base, model_kwargs={"dtype": "float32"})
    return spearman(pooled, evaluators).tolist(), perplexity(plain.model, plain.tokenizer, held_out)


def describe(values: list[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", required=True)
    parser.add_argument("--modes", nargs="+", choices=["full", "frozen"], default=["full", "frozen"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["dev", "test"], default="dev", help="test is for what is reported, once")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    sentences, held_out = read_sentences(args.data, NUM_TEXTS, TEXTS), read_held_out(args.data)
    evaluators = [sts_evaluator(args.data, args.split)]
    results = []
    names = ("base", "mode", "mean pooling", f"{args.split}, by seed", "gain", "perplexity x", "seconds")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for base in args.bases:
        (before,), base_perplexity = measure_base(base, evaluators, held_out)
        for mode in args.modes:
            after, ratios, seconds = [], [], []
            for seed in args.seeds:
                start = time.perf_counter()
                model = train(base, mode == "frozen", sentences, seed)
                seconds.append(time.perf_counter() - start)
                after.append(float(spearman(model, evaluators)[0]))
                ratios.append(perplexity(model[0].model.float(), model[0].tokenizer, held_out) / base_perplexity)
            gain = sum(after) / len(after) - before
            cells = (f"{before:.3f}", describe(after), f"{gain:.3f}", describe(ratios), describe(seconds, 0))
            print(f"| {Path(base).name} | {mode} | {' | '.join(cells)} |", flush=True)
            results.append({"base": Path(base).name, "mode": mode, "before": before, "after": after, "gain": gain})
            results[-1] |= {"seeds": args.seeds, "perplexity_ratio": ratios, "seconds": seconds}
    if args.output:
        environment = {**describe_versions(), "threads": torch.get_num_threads()}
        report = {"split": args.split, "texts": TEXTS, "num_texts": NUM_TEXTS, "results": results, **environment}
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
