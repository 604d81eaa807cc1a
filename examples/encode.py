"""Embed texts with a GEM model and let the same model write.

python examples/encode.py runs/demo/frozen
"""

from __future__ import annotations

import argparse

from sentence_transformers import SentenceTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a GEM checkpoint")
    args = parser.parse_args()

    # gem_st need not be installed: the checkpoint brings its one file of code.
    model = SentenceTransformer(args.model, trust_remote_code=True)
    queries = ["How do I keep bread fresh?", "When does the train leave?"]
    passages = [
        "Store the loaf in a paper bag, cut side down.",
        "The first departure from the station is at six in the morning.",
        "Cats sleep for most of the day.",
    ]
    similarities = model.similarity(model.encode_query(queries), model.encode_document(passages))
    for query, row in zip(queries, similarities, strict=True):
        print(f"{query}\n    {row.max():.2f}  {passages[int(row.argmax())]}")
    print(model[0].generate("Once upon a time", max_new_tokens=40, do_sample=False, repetition_penalty=1.3))


if __name__ == "__main__":
    main()
