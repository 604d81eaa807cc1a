"""Search the vectors of `gem-st encode` with LanceDB in this process, or with FAISS.

gem-st encode runs/demo/frozen --data corpus.parquet --columns text --output vectors
python examples/search_corpus.py runs/demo/frozen vectors "How do I keep bread fresh?" --engine faiss
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from gem_st import hub


def unit(vectors: Any) -> np.ndarray:
    """Vectors of length 1, whose dot products are cosines. Shape: ``(N, D)``"""
    array = np.asarray(vectors, dtype=np.float32)
    return array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12)


def batches_of(dataset: Any) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Rows and their unit vectors, some thousand at a time."""
    for batch in dataset.to_batches(batch_size=4096):
        if len(batch):
            yield batch, unit(batch.column("vector").flatten().to_numpy().reshape(len(batch), -1))


def search_lancedb(folder: Path, query: np.ndarray, num: int, index_from: int) -> list[dict[str, Any]]:
    """Load the rows into a table of LanceDB, index it if it is worth it, and search."""
    import lancedb
    from lancedb.index import IvfPq

    dataset, database = ds.dataset(folder / "vectors", format="parquet"), lancedb.connect(folder / "lancedb")
    table = database.create_table("corpus", data=dataset.to_batches(), schema=dataset.schema, mode="overwrite")
    if table.count_rows() >= index_from:
        table.create_index("vector", config=IvfPq(distance_type="cosine"))
    search = table.search(query).distance_type("cosine").refine_factor(10).limit(num)  # distances by whole vectors
    return [{**row, "score": 1 - row["_distance"]} for row in search.to_list()]


def search_faiss(folder: Path, query: np.ndarray, num: int, index_from: int) -> list[dict[str, Any]]:
    """Put unit vectors into FAISS, in a graph if that is worth it, and search."""
    import faiss

    dataset, rows = ds.dataset(folder / "vectors", format="parquet"), []
    kind = "HNSW32" if dataset.count_rows() >= index_from else "Flat"
    index = faiss.index_factory(len(query), kind, faiss.METRIC_INNER_PRODUCT)
    for batch, vectors in batches_of(dataset):
        index.add(vectors)
        rows += batch.drop_columns(["vector"]).to_pylist()
    scores, places = index.search(unit(query)[None], num)
    return [{**rows[place], "score": float(score)} for place, score in zip(places[0], scores[0], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path, help="output of gem-st encode, in float32 or float16")
    parser.add_argument("query")
    parser.add_argument("--engine", choices=["lancedb", "faiss"], default="lancedb")
    parser.add_argument("--num", type=int, default=5)
    parser.add_argument("--index-from", type=int, default=100_000, help="rows that are worth an index, of 256 or more")
    args = parser.parse_args()
    query = hub.load(args.checkpoint).encode_query(args.query)
    search = {"lancedb": search_lancedb, "faiss": search_faiss}[args.engine]
    for row in search(args.folder, query, args.num, args.index_from):
        print(f"{row['score']:.3f}  {row['id']}  {row.get('text', '')}")


if __name__ == "__main__":
    main()
