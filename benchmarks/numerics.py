"""How far vectors differ between ways to compute them that should agree, and what that does to a ranking.

    python benchmarks/numerics.py --model runs/demo/frozen --num 128    # the tables of docs/numerics.md

For a trained model, and for random ones of five families in both modes: the largest difference of an element of unit
vectors, the smallest cosine, and how many of the ten nearest neighbours of a text stay among its ten, on the average
and at worst. Texts of 3 to 200 words.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from gem_st import GemTransformer, hub
from gem_st.training.measures import describe_versions

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
FAMILIES = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": 16, "num_key_value_heads": 2},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
}
"""Small configurations; windows are shorter than most of the texts."""


class Difference(NamedTuple):
    """Of two sets of vectors of the same texts."""

    largest: float
    cosine: float
    kept: float
    kept_at_worst: float


def load(
    path: str, dtype: str = "float32", attention: str | None = None, padding_side: str = "right"
) -> SentenceTransformer:
    """A checkpoint; its attention is sdpa unless asked otherwise, where the family has it."""
    return hub.load(
        path,
        model_kwargs={"dtype": dtype, **({"attn_implementation": attention} if attention else {})},
        processor_kwargs={"padding_side": padding_side},
    )


def encode(model: SentenceTransformer, texts: list[str], batch_size: int = 32) -> np.ndarray:
    return model.encode(texts, batch_size=batch_size, convert_to_tensor=True).double().cpu().numpy()


def in_other_company(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    order = np.random.default_rng(0).permutation(len(texts))
    vectors = encode(model, [texts[row] for row in order], batch_size=7)
    return vectors[np.argsort(order)]


def summarize(model: SentenceTransformer, texts: list[str], num_tokens: int | None = None) -> np.ndarray:
    """Embed through caches; with ``num_tokens``, read so many of each text at once and the others one by one."""
    gem, vectors = model[0], []
    for start in range(0, len(texts), 32):
        cache = gem.prefill(texts[start : start + 32])
        if num_tokens is not None:
            rest = [
                ids[real].tolist()[num_tokens:] for ids, real in zip(cache.input_ids, cache.attention_mask, strict=True)
            ]
            cache = gem.reader.append(cache.crop(num_tokens), rest)
        vectors.append(gem.summarize(cache))
    return torch.cat(vectors).double().cpu().numpy()


def stock(path: str, texts: list[str]) -> np.ndarray:
    """By Sentence Transformers' own modules, from an export that needs no gem_st."""
    with tempfile.TemporaryDirectory() as scratch:
        hub.export(load(path), Path(scratch, "stock"), format="stock")
        return encode(SentenceTransformer(str(Path(scratch, "stock")), model_kwargs={"dtype": "float32"}), texts)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray, num: int = 10) -> list[set[int]]:
    """The nearest neighbours of each text among the others."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return [set(row) for row in np.argsort(-cosines, axis=1, kind="stable")[:, :num].tolist()]


def compare(vectors: np.ndarray, reference: np.ndarray) -> Difference:
    first, second = unit(vectors), unit(reference)
    kept = [len(a & b) for a, b in zip(nearest(first), nearest(second), strict=True)]
    return Difference(np.abs(first - second).max(), (first * second).sum(axis=1).min(), np.mean(kept), min(kept))


def differences(path: str, texts: list[str], *, can_be_stock: bool) -> dict[str, Difference]:
    """Against float32, sdpa, batches of 32, padded on the right; those of lower precision also among themselves."""
    found = {}
    model = load(path)
    reference = encode(model, texts)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "the same again": lambda: encode(load(path), texts),
        "batches of 1": lambda: encode(model, texts, batch_size=1),
        "another order, batches of 7": lambda: in_other_company(model, texts),
        "padding on the left": lambda: encode(load(path, padding_side="left"), texts),
        "eager attention": lambda: encode(load(path, attention="eager"), texts),
        "a cache: summarize(prefill(texts))": lambda: summarize(model, texts),
        "a cache, all but 3 tokens read one by one": lambda: summarize(model, texts, num_tokens=3),
    }
    if can_be_stock:
        ways["a stock export"] = lambda: stock(path, texts)
    for name, compute in ways.items():
        found[name] = compare(compute(), reference)
    for dtype in ("bfloat16", "float16"):
        low = load(path, dtype=dtype)
        vectors = encode(low, texts)
        found[dtype] = compare(vectors, reference)
        found[f"{dtype}: batches of 1, against batches of 32"] = compare(encode(low, texts, batch_size=1), vectors)
    return found


def make_random(family: str, folder: Path, **options: object) -> str:
    """A random model of a family, with the tokenizer of base-8m."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "base-8m")
    sizes = {"hidden_size": SIZES["hidden_size"]} if family == "gpt_neo" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, "vocab_size": len(tokenizer), **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    gem = GemTransformer(str(folder / "base"), max_seq_length=256, **options)
    with torch.no_grad():
        for name, weight in gem.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    SentenceTransformer(modules=[gem], device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


def print_table(rows: dict[str, Difference]) -> None:
    print(
        "| float32, sdpa, batches of 32, padding on the right, against | largest difference | smallest cosine |", end=""
    )
    print(" of 10 neighbours kept, mean | at worst |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.largest:.1e} | {row.cosine:.7f} | {row.kept:.2f} | {row.kept_at_worst:.0f} |")
    print(flush=True)


def build_texts(num: int) -> list[str]:
    """Texts of 3 to 200 words."""
    lines = (EXAMPLES / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    draw, texts = random.Random(0), []
    for _ in range(num):
        length = int(3 * (200 / 3) ** draw.random())
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a GEM checkpoint")
    parser.add_argument("--num", type=int, default=128)
    args = parser.parse_args()

    texts = build_texts(args.num)
    if args.model:
        print(f"{args.model}\n")
        print_table(differences(args.model, texts, can_be_stock=False))
    worst: dict[str, Difference] = {}
    for family in FAMILIES:
        for options in ({}, {"num_gem_tokens": 3}, {"freeze_base": True, "num_gem_tokens": 3}):
            with tempfile.TemporaryDirectory() as scratch:
                path = make_random(family, Path(scratch), **options)
                found = differences(path, texts, can_be_stock=not options)
            for name, row in found.items():
                old = worst.get(name, row)
                worst[name] = Difference(max(old[0], row[0]), *map(min, old[1:], row[1:]))
    print(f"The worst of {', '.join(FAMILIES)}, random, K = 1 and 3, both modes\n")
    print_table(worst)
    print(describe_versions())


if __name__ == "__main__":
    main()
