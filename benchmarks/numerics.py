"""How far vectors of one model differ between ways to compute them that should agree: the table of docs/numerics.md.

    python benchmarks/numerics.py --model runs/demo/frozen

Prints the largest absolute difference of an element and the smallest cosine, over texts of 3 to 200 words.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from encode_speed import build_texts
from sentence_transformers import SentenceTransformer


def load(path: str, **kwargs: object) -> SentenceTransformer:
    return SentenceTransformer(
        path,
        trust_remote_code=True,
        model_kwargs={"dtype": kwargs.get("dtype", "float32"), "attn_implementation": kwargs.get("attention", "sdpa")},
        processor_kwargs={"padding_side": kwargs.get("padding_side", "right")},
    )


def encode(model: SentenceTransformer, texts: list[str], batch_size: int = 32) -> np.ndarray:
    return model.encode(texts, batch_size=batch_size, convert_to_tensor=True).double().cpu().numpy()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a GEM checkpoint")
    parser.add_argument("--num", type=int, default=128)
    args = parser.parse_args()

    texts = build_texts(args.num)["mixed, 3 to 200 words"]
    reference = encode(load(args.model), texts)
    bfloat16 = load(args.model, dtype="bfloat16")
    others = {
        "the same again": encode(load(args.model), texts),
        "batches of 1": encode(load(args.model), texts, batch_size=1),
        "left padding": encode(load(args.model, padding_side="left"), texts),
        "summarize(prefill(texts))": summarize(load(args.model), texts),
        "summarize, 3 tokens read first and the rest later": summarize(load(args.model), texts, num_tokens=3),
        "eager attention": encode(load(args.model, attention="eager"), texts),
        "bfloat16": encode(bfloat16, texts),
        "bfloat16, batches of 1": encode(bfloat16, texts, batch_size=1),
    }
    print(f"typical size of an element: {np.abs(reference).mean():.3f}")
    print(
        "| float32, sdpa, batches of 32, right padding, against | largest difference | smallest cosine |\n|---|---|---|"
    )
    prompt = "Represent this text, so that others like it can be found by it: "
    prompted = encode(load(args.model), [prompt + text for text in texts])
    alone = encode(load(args.model), [prompt + text for text in texts], batch_size=1)
    for name, vectors in others.items():
        print_row(name, vectors, reference)
    print_row("with an instruction, read once for a batch, against batches of 1", prompted, alone)


def print_row(name: str, vectors: np.ndarray, reference: np.ndarray) -> None:
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    cosine = (vectors * reference).sum(1) / norms
    print(f"| {name} | {np.abs(vectors - reference).max():.1e} | {cosine.min():.7f} |")


if __name__ == "__main__":
    main()
