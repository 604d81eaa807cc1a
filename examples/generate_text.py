"""Let a base model write its own training sentences: GEM needs no data set to start from.

    python examples/generate_text.py --base examples/base-8m --num 5000 --output examples/data/train.txt

made the text that the demo trains on. `gem-st train --self-generate 5000` does the same on its way. At a temperature of
1 the sentences follow the model's own distribution, so that next-token prediction on them pulls it nowhere: less
forgetting than on cooler, more fluent samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from gem_st.training.data import sample_texts


def is_plain(sentence: str) -> bool:
    """True for 6 to 25 plain words that start with a capital."""
    return 6 <= len(sentence.split()) <= 25 and sentence[0].isupper() and sentence.isascii()


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
    options = {"batch_size": args.batch_size, "temperature": args.temperature, "keep": is_plain}
    sentences = sample_texts(model, tokenizer, args.num, **options)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(sentences) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
