"""A million texts of every kind, each embedded in two companies: is its vector the same, and finite?

    python benchmarks/many_texts.py --num 1000000

Texts are drawn from all of Unicode but surrogates, special tokens and names of GEM tokens among them, and are embedded
twice: in another order, batch size and padding side. Prints, for each setting, the largest difference of a component
of a unit vector, and how many are not finite. What tests/modeling/test_properties.py looks for in a few thousand.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from gem_st import GemTransformer
from gem_st.training.measures import describe_versions

SETTINGS = [
    {"num_gem_tokens": 1},
    {"num_gem_tokens": 3},
    {"freeze_base": True},
    {"freeze_base": True, "num_gem_tokens": 2},
]
BLOCKS = [(0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE00), (0x2000, 0x2800)]
BLOCKS += [(0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0xFE00, 0xFFFF), (0x1F300, 0x1FB00)]
BLOCKS += [(0x10000, 0x110000)]
"""Ranges of code points, none of which holds surrogates."""


def draw(rng: random.Random, words: list[str], spelled: list[str]) -> str:
    """One text: words, characters of one range or of all, special tokens, nothing, or a long one."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(rng.choices(words, k=rng.randrange(1, 30)))
    if kind < 0.6:
        low, high = rng.choice(BLOCKS)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(40)))
    if kind < 0.8:
        return "".join(chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(rng.randrange(40)))
    if kind < 0.95:
        return "".join(rng.choice([*spelled, " ", "\n", rng.choice(words)]) for _ in range(rng.randrange(12)))
    if kind < 0.999:
        return rng.choice(["", " ", "\0", "\u200d", "\u202e", "\ufeff"]) * rng.randrange(3)
    return " ".join(rng.choices(words, k=3000))


def chunks(num: int, size: int) -> Iterator[int]:
    return (min(size, num - start) for start in range(0, num, size))


def make_base(folder: Path, tokenizer: str) -> str:
    """A random model of two layers, in float32, with a real tokenizer."""
    set_seed(0)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rows = AutoConfig.from_pretrained(tokenizer).vocab_size
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(folder)
    return str(folder)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="examples/base-8m")
    parser.add_argument("--num", type=int, default=1_000_000, help="of all settings together")
    parser.add_argument("--chunk", type=int, default=5_000)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    scratch = tempfile.TemporaryDirectory()
    base = make_base(Path(scratch.name), args.tokenizer)
    for options in SETTINGS:
        set_seed(args.seed)
        gem = GemTransformer(base, max_seq_length=args.max_length, **options)
        with torch.no_grad():
            for name, weight in gem.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
        model = SentenceTransformer(modules=[gem])
        rng, tokenizer = random.Random(args.seed), model.tokenizer
        words = [tokenizer.decode([row]) for row in range(len(tokenizer))]
        spelled = [*tokenizer.all_special_tokens, "<gem>", "<|gem_0|>", "<|endoftext|>", "<s>", "[PAD]"]
        spelled += list(tokenizer.get_added_vocab())
        worst, not_finite, seen, start = 0.0, 0, set(), time.perf_counter()
        num = args.num // len(SETTINGS)
        for size in chunks(num, args.chunk):
            texts = [draw(rng, words, spelled) for _ in range(size)]
            seen.update(map(hash, texts))
            model.tokenizer.padding_side = "left"
            first = model.encode(texts, batch_size=64)
            order = rng.sample(range(size), size)
            model.tokenizer.padding_side = "right"
            second = np.empty_like(first)
            second[order] = model.encode([texts[row] for row in order], batch_size=rng.choice([7, 33, 256]))
            not_finite += int((~np.isfinite(first)).any(axis=1).sum())
            worst = max(worst, float(np.abs(unit(first) - unit(second)).max()))
        result = {"texts": num, "different": len(seen), "largest difference": worst, "not finite": not_finite}
        print(json.dumps({**options, **result, "seconds": round(time.perf_counter() - start)}), flush=True)
    print(json.dumps({"tokenizer": args.tokenizer, "seed": args.seed, "versions": describe_versions()}))


if __name__ == "__main__":
    main()
