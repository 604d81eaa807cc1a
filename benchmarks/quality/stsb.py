"""STS-B and perplexity before and after training, in full mode or with a frozen base, over seeds.

    python benchmarks/quality/stsb.py --data DATA --base MODELS/base-8m --seeds 0 1 2
    python benchmarks/quality/stsb.py --data DATA --base MODELS/base-8m --seeds 0 1 2 --freeze-base

DATA holds sts/stsb-{dev,test}.csv and text/*.txt. Settings are chosen on the dev split; the test split is the report.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import set_seed

from gem_st import AlphaSchedule, GemLoss, GemTransformer
from gem_st.evaluation import perplexity

TEXTS = {
    "wiki": "text/wikipedia_sentences.txt",
    "books": "text/classic_books_sentences_200k.txt",
    "stories": "text/tiny_stories_944k.txt",
    "nli": "nli/pairs.csv",
}
SPLITS = ("dev", "test")
NUM_HELD_OUT = 400


def read_sentences(data: Path, num: int, shares: dict[str, float]) -> list[str]:
    """Sentences of each text in its share, without the last ones, which are held out."""
    sentences = []
    for name, share in shares.items():
        lines = (data / TEXTS[name]).read_text(encoding="utf-8").splitlines()
        if name == "nli":  # the sentences alone, not which follows from which
            lines = sorted({row[key] for row in csv.DictReader(lines) for key in ("premise", "hypothesis")})
        elif name == "stories":
            lines = [piece for line in lines for piece in re.split(r"(?<=[.!?])\s+", line)]
        lines = [line.strip() for line in lines if len(line.split()) > 3][:-NUM_HELD_OUT]
        sentences += random.Random(0).sample(lines, min(round(num * share), len(lines)))
    return sentences


def read_held_out(data: Path) -> list[str]:
    lines = (data / TEXTS["books"]).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()][-NUM_HELD_OUT:]


def sts_evaluator(data: Path, split: str) -> EmbeddingSimilarityEvaluator:
    with open(data / f"sts/stsb-{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return EmbeddingSimilarityEvaluator(
        [row["sentence1"] for row in rows],
        [row["sentence2"] for row in rows],
        [float(row["score_0_5"]) / 5 for row in rows],
        main_similarity="cosine",
        batch_size=128,
    )


def spearman(model: SentenceTransformer, evaluators: list[EmbeddingSimilarityEvaluator]) -> np.ndarray:
    return np.array([evaluator(model)[evaluator.primary_metric] for evaluator in evaluators])


def train(args: argparse.Namespace, texts: list[str] | Dataset, seed: int) -> tuple[SentenceTransformer, float]:
    """Train on texts, or on a data set with other columns."""
    dataset = texts if isinstance(texts, Dataset) else Dataset.from_dict({"text": texts})
    set_seed(seed)
    gem = GemTransformer(
        args.base,
        num_gem_tokens=args.num_gem_tokens,
        max_seq_length=args.max_length,
        freeze_base=args.freeze_base,
        lora_rank=args.lora_rank if args.freeze_base else None,
        lora_kwargs=args.lora_kwargs if args.freeze_base else None,
        pooling=args.pooling,
        model_kwargs={"dtype": args.dtype},
    )
    model = SentenceTransformer(modules=[gem])
    alpha: AlphaSchedule | float | None = args.alpha
    if alpha is None and not args.freeze_base:
        alpha = AlphaSchedule(args.ntp_steps, args.final_alpha, args.rise_steps)
    loss = GemLoss(
        model,
        plain_ratio=args.plain_ratio,
        tasks=args.tasks,
        token_dropout=args.token_dropout,
        alpha=alpha,
        scale=args.scale,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.scheduler,
            warmup_steps=args.warmup,
            weight_decay=0.0,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=seed,
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
        start = time.perf_counter()
        trainer.train()
    return model, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--num-texts", type=int, default=18_000)
    parser.add_argument("--texts", nargs="+", default=["wiki=0.67", "books=0.33"], help=f"NAME=SHARE of {[*TEXTS]}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--freeze-base", action="store_true")
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--lora-kwargs", type=json.loads, default={"lora_alpha": 64}, help="JSON, for PEFT")
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--num-gem-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--scheduler", default="cosine")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has bf16 instructions")
    parser.add_argument("--plain-ratio", type=float, help="default: GemLoss's own, which depends on the mode")
    parser.add_argument("--tasks", nargs="+", default=["reconstruction", "continuation"])
    parser.add_argument("--token-dropout", type=float, help="default: GemLoss's own")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--alpha", type=float, help="a number instead of the schedule below")
    parser.add_argument("--ntp-steps", type=int, default=30)
    parser.add_argument("--final-alpha", type=float, default=0.9)
    parser.add_argument("--rise-steps", type=int, default=120)
    args = parser.parse_args()

    shares = {name: float(share) for name, share in (text.split("=") for text in args.texts)}
    texts, held_out = read_sentences(args.data, args.num_texts, shares), read_held_out(args.data)
    evaluators = [sts_evaluator(args.data, split) for split in SPLITS]
    backbone = Transformer(args.base, model_kwargs={"dtype": "float32"})
    base = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
    before = spearman(base, evaluators)
    plain = GemTransformer(args.base, model_kwargs={"dtype": "float32"})
    base_perplexity = perplexity(plain.model, plain.tokenizer, held_out)
    after, ratios, seconds = [], [], []
    for seed in args.seeds:
        model, duration = train(args, texts, seed)
        after.append(spearman(model, evaluators))
        ratios.append(perplexity(model[0].model.float(), model[0].tokenizer, held_out) / base_perplexity)
        seconds.append(round(duration))
        print(
            f"seed {seed}: dev, test {after[-1].round(4)}, perplexity x {ratios[-1]:.3f}, {duration:.0f} s", flush=True
        )
    result = {
        "base": Path(args.base).name,
        **{f"{split}_mean_pooling": round(float(before[i]), 4) for i, split in enumerate(SPLITS)},
        **{f"{split}_gem": [round(float(row[i]), 4) for row in after] for i, split in enumerate(SPLITS)},
        **{f"{split}_gain": round(float(np.mean(after, axis=0)[i] - before[i]), 4) for i, split in enumerate(SPLITS)},
        "base_perplexity": round(base_perplexity, 2),
        "perplexity_ratio": [round(ratio, 3) for ratio in ratios],
        "seconds": seconds,
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("data", "base")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
