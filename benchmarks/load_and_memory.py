"""Time and memory to load a GEM model, and memory to embed many texts, against transformers and stock.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/load_and_memory.py
    python benchmarks/load_and_memory.py --base examples/base-8m --num 10000

Each measurement is a process of its own; times and memories are medians of the rounds, memory is what Linux counts as
resident at most, in MiB, above what the process took before loading.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from encode_speed import Texts, find_base
from sentence_transformers import SentenceTransformer
from train_step import read_status
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st import GemTransformer
from gem_st.evaluation.baselines import build_baseline
from gem_st.training.measures import describe_versions

RESULTS = Path(__file__).resolve().parent / "results" / "load_and_memory.jsonl"
LOADED = ("transformers", "full K=1", "frozen K=1")
ENCODED = ("stock", "full K=1", "frozen K=1")


def load(way: str, base: str, dtype: str) -> Any:
    kwargs: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if way == "transformers":
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype), AutoTokenizer.from_pretrained(base)
    if way == "stock":
        return build_baseline("lasttoken", base, **kwargs)
    return SentenceTransformer(base, device="cpu", trust_remote_code=True, **kwargs)


def measure(args: argparse.Namespace) -> None:
    """In a process of its own."""
    before, start = read_status("VmRSS"), time.perf_counter()
    model = load(args.way, args.base, args.dtype)
    result = {"seconds": time.perf_counter() - start, "loaded": read_status("VmRSS") - before}
    if args.num:
        texts = Texts(AutoTokenizer.from_pretrained(args.base))
        draw = random.Random(0)
        sample = [texts.cut(round(8 * (512 / 8) ** draw.random())) for _ in range(args.num)]
        Path("/proc/self/clear_refs").write_text("5")  # what loading took at most is not of interest
        model.encode(sample, batch_size=args.batch_size)
        result["encoded"] = read_status("VmHWM") - before
    print(json.dumps(result))


def run(args: argparse.Namespace, way: str, base: str, num: int) -> dict[str, float]:
    """Medians of the rounds."""
    command = [sys.executable, __file__, "--way", way, "--base", base, "--dtype", args.dtype, "--num", str(num)]
    command += ["--batch-size", str(args.batch_size)]
    rounds = []
    for _ in range(1 if num else args.rounds):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: round(statistics.median(found[name] for found in rounds), 2) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num", type=int, default=1000, help="texts of 8 to 512 tokens")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--way", help="measure this one, here")
    args = parser.parse_args()
    if args.way:
        return measure(args)
    with tempfile.TemporaryDirectory() as scratch:
        base = find_base(args.base, f"{scratch}/base")
        places = {"transformers": base, "stock": base}
        for way, freeze_base in (("full K=1", False), ("frozen K=1", True)):
            places[way] = f"{scratch}/{way}"
            gem = GemTransformer(base, freeze_base=freeze_base, model_kwargs={"dtype": args.dtype})
            SentenceTransformer(modules=[gem]).save_pretrained(places[way])
        found: dict[str, Any] = {"load": {way: run(args, way, places[way], 0) for way in LOADED}}
        print(json.dumps(found), flush=True)
        found["encode"] = {way: run(args, way, places[way], args.num) for way in ENCODED}
    settings = {name: getattr(args, name) for name in ("base", "dtype", "num", "batch_size")}
    line = {"settings": {**settings, "threads": torch.get_num_threads()}, "result": found}
    print(json.dumps(line))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "versions": describe_versions()}) + "\n")


if __name__ == "__main__":
    main()
