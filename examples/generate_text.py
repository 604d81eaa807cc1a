"""Let a base model write its own training sentences: GEM needs no data set to start from.

    python examples/generate_text.py --base examples/base-8m --num 5000 --output examples/data/train.txt

made the text that the demo trains on. At a temperature of 1 the sentences follow the model's own distribution, so that
next-token prediction on them pulls it nowhere: less forgetting than on cooler, more fluent samples.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def read_sentences(text: str) -> list[str]:
    """Whole sentences of 6 to 25 plain words; the last piece is cut off by the length limit and left out."""
    pieces = [" ".join(piece.split()) for piece in SENTENCE_END.split(text)[:-1]]
    return [piece for piece in pieces if 6 <= len(piece.split()) <= 25 and piece[0].isupper() and piece.isascii()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/base-8m")
    parser.add_argument("--num", type=int, default=5000, help="sentences to write")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    start = torch.full((args.batch_size, 1), tokenizer.bos_token_id)
    sentences: dict[str, None] = {}  # ordered, without duplicates
    with tqdm(total=args.num, unit="sentence") as progress:
        while len(sentences) < args.num:
            output = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=args.temperature,
                top_k=0,
                max_new_tokens=96,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            for text in tokenizer.batch_decode(output, skip_special_tokens=True):
                sentences.update(dict.fromkeys(read_sentences(text)))
            progress.update(min(len(sentences), args.num) - progress.n)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(list(sentences)[: args.num]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
