"""Train GEM on plain texts, one a line, no labels: all weights, or a LoRA for the GEM tokens beside a frozen base.

python examples/train_self_supervised.py --base examples/base-8m --texts examples/data/train.txt --output runs/self
python examples/train_self_supervised.py --freeze-base
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from gem_st import AlphaSchedule, GemLoss, GemTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/base-8m")
    parser.add_argument("--texts", default="examples/data/train.txt")
    parser.add_argument("--output", default="runs/self-supervised")
    parser.add_argument("--freeze-base", action="store_true")
    parser.add_argument("--num-gem-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    # float32 weights: small optimizer steps would be lost to rounding in bfloat16.
    gem = GemTransformer(
        args.base,
        num_gem_tokens=args.num_gem_tokens,
        freeze_base=args.freeze_base,
        model_kwargs={"dtype": torch.float32},
    )
    model = SentenceTransformer(modules=[gem])
    model.max_seq_length = 128
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            # Of all weights of a small model; 1e-5 to 1e-4 for billions. A LoRA takes more.
            learning_rate=5e-4 if args.freeze_base else 2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("text", data_files=args.texts, split="train"),
        loss=GemLoss(model, alpha=None if args.freeze_base else AlphaSchedule(num_ntp_steps=args.steps // 5)),
    )
    trainer.train()
    model.save_pretrained(args.output)
    print(model.similarity(*model.encode(["It is raining.", "The rain falls."], convert_to_tensor=True)[:, None]))


if __name__ == "__main__":
    main()
