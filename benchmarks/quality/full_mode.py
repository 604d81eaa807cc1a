"""STS-B and perplexity before and after training in full mode, over seeds.

    python benchmarks/quality/full_mode.py --data DATA --base MODELS/base-8m --seeds 0 1 2

DATA holds sts/stsb-{dev,test}.csv and text/*.txt. Choose settings on --split dev; the test split is for the report.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import set_seed

from gem_st import AlphaSchedule, GemLoss, GemTransformer
from gem_st.evaluation import perplexity

TEXTS = {"wiki": "text/wikipedia_sentences.txt", "books": "text/classic_books_sentences_200k.txt"}
NUM_HELD_OUT = 400


def read_lines(data: Path, names: list[str], num: int) -> list[str]:
    """The same number of lines of each text file, without the held-out last ones."""
    texts = []
    for name in names:
        lines = [line.strip() for line in (data / TEXTS[name]).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line][:-NUM_HELD_OUT]
        texts += random.Random(0).sample(lines, min(num // len(names), len(lines)))
    return texts


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


def spearman(model: SentenceTransformer, evaluator: EmbeddingSimilarityEvaluator) -> float:
    return evaluator(model)[evaluator.primary_metric]


def train(args: argparse.Namespace, texts: list[str], seed: int) -> tuple[SentenceTransformer, float]:
    set_seed(seed)
    gem = GemTransformer(
        args.base,
        num_gem_tokens=args.num_gem_tokens,
        max_seq_length=args.max_length,
        model_kwargs={"dtype": args.dtype},
    )
    model = SentenceTransformer(modules=[gem])
    alpha = AlphaSchedule(args.ntp_steps, args.final_alpha, args.rise_steps)
    loss = GemLoss(model, plain_ratio=args.plain_ratio, tasks=args.tasks, token_dropout=args.token_dropout, alpha=alpha)
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
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), loss=loss
        )
        start = time.perf_counter()
        trainer.train()
    return model, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--texts", nargs="+", default=["wiki", "books"], choices=sorted(TEXTS))
    parser.add_argument("--num-texts", type=int, default=20_000)
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-gem-tokens", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--scheduler", default="cosine")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has bf16 instructions")
    parser.add_argument("--plain-ratio", type=float, default=0.8)
    parser.add_argument("--tasks", nargs="+", default=["reconstruction", "continuation"])
    parser.add_argument("--token-dropout", type=float, default=0.5)
    parser.add_argument("--ntp-steps", type=int, default=100)
    parser.add_argument("--final-alpha", type=float, default=0.9)
    parser.add_argument("--rise-steps", type=int, default=None)
    args = parser.parse_args()

    texts, held_out = read_lines(args.data, args.texts, args.num_texts), read_held_out(args.data)
    evaluator = sts_evaluator(args.data, args.split)
    backbone = Transformer(args.base, model_kwargs={"dtype": "float32"})
    base = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
    before = spearman(base, evaluator)
    plain = GemTransformer(args.base, model_kwargs={"dtype": "float32"})
    base_perplexity = perplexity(plain.model, plain.tokenizer, held_out)
    rows = []
    for seed in args.seeds:
        model, seconds = train(args, texts, seed)
        after = spearman(model, evaluator)
        after_perplexity = perplexity(model[0].model.float(), model[0].tokenizer, held_out)
        rows.append((after, after_perplexity / base_perplexity, seconds))
        print(f"seed {seed}: {after:.4f}, perplexity x {rows[-1][1]:.3f}, {seconds:.0f} s", flush=True)
    result = {
        "base": Path(args.base).name,
        "stsb_mean_pooling": round(before, 4),
        "stsb_gem": [round(row[0], 4) for row in rows],
        "gain": round(statistics.mean(row[0] for row in rows) - before, 4),
        "base_perplexity": round(base_perplexity, 2),
        "perplexity_ratio": [round(row[1], 3) for row in rows],
        "seconds": [round(row[2]) for row in rows],
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("data", "base")},
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
