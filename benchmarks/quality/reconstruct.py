"""How much of a text K GEM tokens hold: train the reconstruction task, then write held-out texts from their memory.

    python benchmarks/quality/reconstruct.py --data DATA --base smollm2-135m-instruct --full --num-gem-tokens 1 4 10

DATA is described in benchmarks/README.md. Prints, for each K, exact matches and chrF by the length of the text in
tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed
from transformers.utils import logging

from gem_st import GemLoss, GemTransformer
from gem_st.evaluation import ReconstructionEvaluator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from models import resolve

NUM_HELD_OUT = 500


def read_sentences(path: Path, min_length: int, max_length: int) -> list[str]:
    """Different sentences of so many characters, shuffled."""
    pieces = re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8"))
    sentences = sorted({piece.strip() for piece in pieces if min_length <= len(piece.strip()) <= max_length})
    random.Random(0).shuffle(sentences)
    return sentences


def train(args: argparse.Namespace, num_gem_tokens: int, texts: list[str]) -> SentenceTransformer:
    set_seed(args.seed)
    gem = GemTransformer(
        resolve(args.base),
        num_gem_tokens=num_gem_tokens,
        freeze_base=not args.full,
        lora_rank=None if args.full else args.lora_rank,
        lora_kwargs=None if args.full else {"lora_alpha": 2 * args.lora_rank},
        max_seq_length=128,
        model_kwargs={"dtype": "float32"},
    )
    model = SentenceTransformer(modules=[gem])
    loss = GemLoss(model, alpha=args.alpha, plain_ratio=0.0, tasks=["reconstruction"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts}),
            loss=loss,
        )
        trainer.train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--num-gem-tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA on a frozen base")
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.0, help="weight of the contrastive part")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--text", default="text/wikipedia_sentences.txt", help="file below DATA")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--min-length", type=int, default=20, help="characters")
    parser.add_argument("--max-length", type=int, default=200)
    parser.add_argument(
        "--bounds", type=int, nargs="+", default=[8, 16, 32], help="of the lengths in the table, tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()

    sentences = read_sentences(args.data / args.text, args.min_length, args.max_length)
    held_out, texts = sentences[:NUM_HELD_OUT], sentences[NUM_HELD_OUT:]
    for num_gem_tokens in args.num_gem_tokens:
        start = time.perf_counter()
        model = train(args, num_gem_tokens, texts)
        seconds = round(time.perf_counter() - start)
        gem = model[0]
        lengths = [len(ids) for ids in gem.tokenizer(held_out, add_special_tokens=False)["input_ids"]]
        result = {"all": ReconstructionEvaluator(held_out)(model)}
        for low, high in zip([0, *args.bounds], [*args.bounds, 10**9], strict=True):
            group = [text for text, length in zip(held_out, lengths, strict=True) if low < length <= high]
            if group:
                name = f"{low + 1} to {min(high, max(lengths))} tokens ({len(group)})"
                result[name] = ReconstructionEvaluator(group)(model)
        texts_and_copies = list(zip(held_out[:3], gem.reconstruct(gem.compress(held_out[:3])), strict=True))
        print(json.dumps({"K": num_gem_tokens, "seconds": seconds, **result, "examples": texts_and_copies}), flush=True)


if __name__ == "__main__":
    main()
