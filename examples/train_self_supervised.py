"""Train GEM on plain texts, one a line, no labels, in one of four modes.

    python examples/train_self_supervised.py --base examples/base-8m --texts examples/data/train.txt --output runs/self
    python examples/train_self_supervised.py --mode frozen

full trains all weights; lora a LoRA on every token; qlora the same on a base in 4 bits (pip install bitsandbytes);
frozen a LoRA for the GEM tokens alone, beside a base that stays as it is. The same command with --resume goes on where
a run was stopped. More than one process: docs/distributed.md.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import BitsAndBytesConfig

from gem_st import GemLoss, GemTransformer, last_checkpoint


def build_model(base: str, mode: str, num_gem_tokens: int) -> SentenceTransformer:
    # float32 weights: small optimizer steps would be lost to rounding in bfloat16.
    options = {"dtype": torch.float32}
    if mode == "qlora":
        compute_dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    gem = GemTransformer(
        base, num_gem_tokens=num_gem_tokens, max_seq_length=128, freeze_base=mode == "frozen", model_kwargs=options
    )
    model = SentenceTransformer(modules=[gem])
    if mode in ("lora", "qlora"):
        model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/base-8m")
    parser.add_argument("--texts", default="examples/data/train.txt")
    parser.add_argument("--output", default="runs/self-supervised")
    parser.add_argument("--mode", choices=["full", "frozen", "lora", "qlora"], default="full")
    parser.add_argument("--num-gem-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in the output folder")
    args = parser.parse_args()

    model = build_model(args.base, args.mode, args.num_gem_tokens)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            # Of all weights of a small model; 1e-5 to 1e-4 for billions. A LoRA takes more.
            learning_rate=1e-4 if args.mode == "full" else 5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=10,
            save_steps=50,
            save_total_limit=1,
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("text", data_files=args.texts, split="train"),
        loss=GemLoss(model),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output) if args.resume else None)
    trainer.save_model(args.output)  # by all processes, where there are several


if __name__ == "__main__":
    main()
