"""Retrieval-augmented generation with one model: every document is read once, to be found and to answer from.

    python examples/rag_one_model.py runs/demo/frozen

Compares with the two usual ways: an embedder and a generator side by side, where each reads every document, and one
model that reads the found document again for every question. Models of a few million weights find and answer badly; it
is the work saved that can be seen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, util

DATA = Path(__file__).resolve().parent / "data"
ANSWER = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.3}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def read_documents(size: int) -> list[str]:
    """Documents of several passages each."""
    lines = (DATA / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line)["text"] for line in lines]
    return [" ".join(passages[start : start + size]) for start in range(0, len(passages), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a GEM checkpoint")
    parser.add_argument("--passages", type=int, default=8, help="passages in a document")
    args = parser.parse_args()

    # In float32, since rounding in bfloat16 can turn a near-tie between two next tokens the other way.
    model = SentenceTransformer(args.model, trust_remote_code=True, model_kwargs={"dtype": "float32"})
    gem = model[0]
    gem.max_seq_length = None  # as long as the model allows; training may have set less
    documents = read_documents(args.passages)
    questions = ["How do I get a loaf to rise?", "What should I feed a young dog?", "Why is the train late?"]

    # Index: one pass over the documents gives what is searched and what is answered from.
    caches, reading = timed(lambda: [gem.prefill(document) for document in documents])
    vectors, summarizing = timed(lambda: util.normalize_embeddings(gem.summarize(type(caches[0]).join(caches))))

    answering, answering_again = 0.0, 0.0
    for question in questions:
        best = int(model.similarity(model.encode(question), vectors).argmax())
        ask = f" Question: {question} Answer:"
        (answer,), seconds = timed(lambda: gem.generate(cache=gem.extend(caches[best], ask), **ANSWER))  # noqa: B023
        again, seconds_again = timed(lambda: gem.generate(documents[best] + ask, **ANSWER))  # noqa: B023
        assert answer == again
        answering, answering_again = answering + seconds, answering_again + seconds_again
        print(f"{question}\n  document {best}: {documents[best][:60]}...\n  {answer.strip()!r}")

    tokens = sum(int(cache.lengths.sum()) for cache in caches)
    print(
        f"\n{len(documents)} documents, {tokens} tokens; {sum(p.numel() for p in model.parameters())} parameters, once"
    )
    print(
        f"indexing: {(2 * reading) / (reading + summarizing):.2f} times as fast as an embedder and a generator apiece"
    )
    print(f"answering: {answering_again / answering:.2f} times as fast as reading the document again, same answers")


if __name__ == "__main__":
    main()
