"""Train GEM on (anchor, positive) pairs with in-batch negatives; the texts also train the language model.

    python examples/train_supervised.py --base examples/base-8m --pairs pairs.tsv --output runs/supervised

The file has two columns with a header, or three with hard negatives. Without --pairs, the pairs graded 4 or more in
examples/data/similarity.tsv are used: enough to see it run, not to make a good model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers

from gem_st import GemLoss, GemTransformer

EXAMPLE_PAIRS = str(Path(__file__).parent / "data" / "similarity.tsv")


def load_pairs(path: str | None) -> Dataset:
    data = load_dataset("csv", data_files=path or EXAMPLE_PAIRS, delimiter="\t", split="train")
    if path is None:
        data = data.filter(lambda row: row["score"] >= 4).remove_columns("score")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/base-8m")
    parser.add_argument("--pairs", help="tab-separated file with a header")
    parser.add_argument("--output", default="runs/supervised")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    gem = GemTransformer(args.base, num_gem_tokens=2, max_seq_length=128, model_kwargs={"dtype": torch.float32})
    model = SentenceTransformer(modules=[gem], prompts={"query": "", "document": ""})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-4,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_pairs(args.pairs),
        # Reconstruction keeps the whole text in front of the GEM tokens, so that a pair stays a pair.
        loss=GemLoss(model, tasks=["reconstruction"], alpha=0.8),
    )
    trainer.train()
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
