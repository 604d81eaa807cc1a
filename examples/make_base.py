"""Pretrain a small Llama with a byte-level BPE tokenizer from a folder of text files.

    python examples/make_base.py --texts my_texts/ --output my-base --steps 2500

With its defaults this is the shape of examples/base-8m: 8 million weights, 2 million tokens in 250 steps of 32 x 256.
That base saw 20 million tokens, with Muon for its matrices, as its README says; this script uses the trainer's AdamW.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


def train_tokenizer(texts: Dataset, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((row["text"] for row in texts), trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=max_length,
    )


def pack(texts: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """Join all texts, <|eos|> between them, and cut the stream into rows of ``length`` tokens."""

    def join(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for row in tokenizer(batch["text"])["input_ids"] for token in [*row, tokenizer.eos_token_id]]
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    return texts.map(join, batched=True, batch_size=10_000, remove_columns=texts.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of .txt files, one paragraph a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()

    files = sorted(map(str, args.texts.glob("*.txt")))
    if not files:
        raise SystemExit(f"No .txt files in {args.texts}.")
    texts = load_dataset("text", data_files=files, split="train").filter(lambda row: bool(row["text"].strip()))
    tokenizer = train_tokenizer(texts, args.vocab_size, 4 * args.length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64 or 1,
        num_key_value_heads=args.width // 128 or 1,
        max_position_embeddings=4 * args.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} weights")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": args.steps // 2},
            warmup_steps=max(1, args.steps // 50),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=pack(texts, tokenizer, args.length),
        data_collator=default_data_collator,
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
