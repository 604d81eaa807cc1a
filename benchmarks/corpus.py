"""`gem-st encode` with two actors against two plain processes, and its memory for ten times the texts.

    python benchmarks/corpus.py --data DATA
    python benchmarks/corpus.py --data DATA --only throughput --ways plain Ray "Ray, niceness 15" "Ray, memory watched"
    python benchmarks/corpus.py --data DATA --only batches --num 2048 [--checkpoint CHECKPOINT --dtype bfloat16]

The model is examples/base-8m with a LoRA of random weights beside it, and vectors of length 1, or that of --checkpoint.
Texts are made of DATA/text/classic_books_sentences_200k.txt: of a hundred, eighty are one sentence, nineteen two, four
or eight, one forty. A plain process loads the model, reads its half, calls `model.encode` once, with batches of 32, and
writes parquet. Times are of whole processes, from their start to their end; `steady` is without start and loading: of
plain processes the time in `encode`, of Ray the rows that were written after the second part, by the time since then.
`niceness 15` is the priority that Ray gives its workers by itself, and `memory watched` looks at memory meanwhile.
`batches` is the rate of one Encoder with one thread, by tokens of a batch, the median of three rounds.
Memory is the sum of PSS over the driver and all processes that it started, looked at twice a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gem_st import GemTransformer, hub
from gem_st.ray import Encoder
from gem_st.training.measures import describe_versions

PLAIN_WAY = "plain"
WAYS = {
    "Ray": ({}, False),
    "Ray, niceness 15": ({"RAY_worker_niceness": "15"}, False),
    "Ray, memory watched": ({}, True),
}
"""Variables, and whether memory is looked at."""
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "corpus.jsonl"
PLAIN = """
import sys, time
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from gem_st import hub
checkpoint, data, output, start, stop, dtype = sys.argv[1:]
texts = pq.read_table(data).slice(int(start), int(stop) - int(start))
model = hub.load(checkpoint, model_kwargs={"dtype": dtype}, device="cpu")
begin = time.perf_counter()
vectors = model.encode(texts["text"].to_pylist(), batch_size=32, show_progress_bar=False)
print(time.perf_counter() - begin)
column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
pq.write_table(texts.select(["id"]).append_column("vector", column), output)
"""


def write_corpus(data: Path, num: int, path: Path, *, is_mixed: bool, seed: int = 0) -> None:
    """A parquet file of so many texts."""
    lines = (data / "text" / "classic_books_sentences_200k.txt").read_text(encoding="utf-8").split("\n")
    lines, draw, texts, place = [line.strip() for line in lines if line.strip()], random.Random(seed), [], 0
    for _ in range(num):
        kinds = [1] * 80 + [draw.choice([2, 4, 8])] * 19 + [40]
        count = draw.choice(kinds) if is_mixed else 1
        texts.append(" ".join(lines[(place + index) % len(lines)] for index in range(count)))
        place += count
    pq.write_table(pa.table({"id": list(range(num)), "text": texts}), path, row_group_size=2048)


def make_checkpoint(folder: Path) -> str:
    """The model of the committed base, with an adapter that is drawn."""
    torch.manual_seed(0)
    gem = GemTransformer(str(ROOT / "examples" / "base-8m"), freeze_base=True)
    with torch.no_grad():
        for name, weight in gem.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return str(hub.export(SentenceTransformer(modules=[gem, Normalize()], device="cpu"), folder))


def environment() -> dict[str, str]:
    """One thread for each process, of all ways."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def run_encode(
    checkpoint: str, data: Path, output: Path, *args: str, variables: dict[str, str] | None = None, has_memory: bool
) -> dict[str, float]:
    """Run `gem-st encode` with two actors; seconds, and the largest sum of PSS in MiB, which takes time itself."""
    command = [sys.executable, "-m", "gem_st.cli", "encode", checkpoint, "--data", str(data), "--output", str(output)]
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([*command, "--num-actors", "2", *args], env=environment() | (variables or {})) as process:
        while process.poll() is None:
            peak = max(peak, measure_tree(process.pid)) if has_memory else peak
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": time.perf_counter() - start, "MiB": peak}


def measure_tree(pid: int) -> float:
    """Sum of PSS of a process and all below it, in MiB."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def steady_rate(output: Path) -> float:
    """Texts a second, of those that were written after the second part."""
    files = sorted((output / "work" / "done").glob("*.parquet"), key=lambda file: file.stat().st_mtime)
    seconds = files[-1].stat().st_mtime - files[1].stat().st_mtime
    return sum(pq.read_metadata(file).num_rows for file in files[2:]) / seconds


def run_plain(
    args: argparse.Namespace, checkpoint: str, data: Path, scratch: Path
) -> tuple[dict[str, float], np.ndarray]:
    """Two plain processes, each with half of the texts; texts a second, and the vectors."""
    start, num = time.perf_counter(), args.num
    halves = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PLAIN,
                *map(str, (checkpoint, data, scratch / f"{place}.parquet", place, end)),
                args.dtype,
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for place, end in ((0, num // 2), (num // 2, num))
    ]
    inside = [float(process.communicate()[0].split()[-1]) for process in halves]
    rates = {"whole": num / (time.perf_counter() - start), "steady": num / max(inside)}
    tables = [pq.read_table(scratch / f"{place}.parquet") for place in (0, num // 2)]
    return rates, as_array(pa.concat_tables(tables).sort_by("id"))


def measure_throughput(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The ways, one after another, on the same texts; and how far their vectors are from those of plain processes."""
    data, checkpoint = scratch / "corpus.parquet", args.checkpoint or make_checkpoint(scratch / "checkpoint")
    write_corpus(args.data, args.num, data, is_mixed=True)
    rates, result, expected = {}, {}, None
    for way in args.ways:
        if way == PLAIN_WAY:
            rates[way], expected = run_plain(args, checkpoint, data, scratch)
            continue
        output, (variables, has_memory) = scratch / way, WAYS[way]
        options = ["--dtype", args.dtype, "--rows-per-part", str(args.rows_per_part)]
        found = run_encode(checkpoint, data, output, *options, variables=variables, has_memory=has_memory)
        rates[way] = {"whole": args.num / found["seconds"], "steady": steady_rate(output)}
        if expected is not None:
            result |= compare(as_array(pq.read_table(output / "vectors").sort_by("id")), expected)
    for name in ("whole", "steady"):
        result[f"texts/s, {name}"] = {way: round(found[name], 1) for way, found in rates.items()}
    return result


def compare(vectors: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far vectors are apart. Shapes: ``(N, D)``"""
    errors = np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return {
        "largest difference of an element": float(np.abs(vectors - expected).max()),
        "largest relative error of a vector": float(errors.max()),
    }


def as_array(table: pa.Table) -> np.ndarray:
    """Vectors. Shape: ``(N, D)``"""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def measure_memory(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Peak memory for some texts and for ten times as many, by a random model of one layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, **shape)).save_pretrained(scratch / "base")
    AutoTokenizer.from_pretrained(ROOT / "examples" / "base-8m").save_pretrained(scratch / "base")
    model = SentenceTransformer(modules=[GemTransformer(str(scratch / "base"))], device="cpu")
    checkpoint = str(hub.export(model, scratch / "checkpoint"))
    result = {}
    for num in (args.num, 10 * args.num):
        write_corpus(args.data, num, scratch / f"{num}.parquet", is_mixed=False)
        found = run_encode(checkpoint, scratch / f"{num}.parquet", scratch / f"out-{num}", has_memory=True)
        result[f"{num} texts"] = {"MiB": round(found["MiB"]), "seconds": round(found["seconds"])}
    return result


def measure_batches(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Texts a second of one Encoder, by tokens of a batch."""
    checkpoint = args.checkpoint or make_checkpoint(scratch / "checkpoint")
    write_corpus(args.data, args.num, scratch / "corpus.parquet", is_mixed=True)
    table, rates = pq.read_table(scratch / "corpus.parquet"), {tokens: [] for tokens in (1024, 2048, 4096, 8192, 16384)}
    encoder = Encoder(checkpoint, dtype=args.dtype, device="cpu", num_threads=1)
    encoder(table.slice(0, 64))
    for _ in range(3):
        for tokens in rates:
            start, encoder.batch_tokens = time.perf_counter(), tokens
            encoder(table)
            rates[tokens].append(args.num / (time.perf_counter() - start))
    return {"texts/s, by tokens of a batch": {tokens: round(median(found), 1) for tokens, found in rates.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the layout of benchmarks/README.md")
    parser.add_argument("--checkpoint", help="folder of another checkpoint, for throughput and batches")
    parser.add_argument(
        "--only", nargs="+", choices=["throughput", "memory", "batches"], default=["throughput", "memory"]
    )
    parser.add_argument("--ways", nargs="+", choices=[PLAIN_WAY, *WAYS], default=[PLAIN_WAY, "Ray"])
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--rows-per-part", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    ways = {"throughput": measure_throughput, "memory": measure_memory, "batches": measure_batches}
    settings = {"checkpoint": args.checkpoint and Path(args.checkpoint).name}
    settings |= {key: getattr(args, key) for key in ("num", "dtype", "rows_per_part")}
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            result = ways[name](args, Path(scratch))
        line = {"settings": {"measured": name, **settings}, "result": result}
        line["versions"] = describe_versions("ray", "pyarrow")
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
