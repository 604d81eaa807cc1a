"""Throughput of `encode` at the size people use, against stock Sentence Transformers, peers and the bare backbone.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/encode_speed.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/encode_speed.py --only one instruction --threads 1 --dtype bfloat16
    python benchmarks/encode_speed.py --table

All ways embed the same texts in turn, in one process; ratios are of one round, and the median of the rounds is given.
The floor is the backbone alone on as many tokens as the texts have, GEM tokens included: no padding, no mask, no
tokenizer, 2,048 tokens at a time in rows as long as the texts are on average. Bases are names of examples/models.py,
folders, Hub ids, `random-135m` and `random-1b`, random Llamas of those shapes, and `random-narrow`, half as wide: in
float32 products take about the share of its time that they take of `random-135m` in bfloat16. `stock` pools the last
token and `mean` all of them, which is what GritLM and LLM2Vec compute; `echo` reads texts twice; `all-minilm-l6-v2` is
an embedder of 22 million parameters. Other `--ways`: `gritlm`, that package (pip install --no-deps gritlm) on the same
base, and any way of Sentence Transformers with ` compiled` behind it, after `model.compile(dynamic=True)`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gem_st import GemTransformer
from gem_st.evaluation.baselines import build_baseline
from gem_st.training.measures import describe_versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from models import resolve  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "encode_speed.jsonl"
SHAPES: dict[str, dict[str, Any]] = {
    "random-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "random-narrow": {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "random-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
GEM = {"full K=1": (False, 1), "full K=4": (False, 4), "frozen K=1": (True, 1), "frozen K=4": (True, 4)}
PEERS = {"stock": "lasttoken", "mean": "mean", "echo": "echo"}
EMBEDDER = "all-minilm-l6-v2"
COMPILED = " compiled"
FLOOR_TOKENS = 2048
NOT_SETTINGS = ("results", "table", "only", "rounds")


def find_base(name: str, scratch: str) -> str:
    """A folder or Hub id; a random model is written first."""
    if name not in SHAPES:
        return str(resolve(name))
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    return write_random(scratch, tokenizer, torch.bfloat16, vocab_size=49_152, tie_word_embeddings=True, **SHAPES[name])


def write_random(folder: str, tokenizer: Any, dtype: torch.dtype = torch.float32, **config: Any) -> str:
    """A random Llama that has another base's tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(dtype=dtype, **config)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Texts:
    """Texts of given numbers of tokens, cut from examples/data."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        lines = (ROOT / "examples" / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
        joined = " ".join(json.loads(line)["text"] for line in lines)
        self.ids = tokenizer(joined, add_special_tokens=False)["input_ids"]

    def cut(self, length: int) -> str:
        start = self.random.randrange(len(self.ids) - length)
        return self.tokenizer.decode(self.ids[start : start + length])

    def make(self, name: str, num: int) -> tuple[list[str], str | None]:
        """Texts of one set, and the prompt they share."""
        if name == "one":
            return [self.cut(9)], None
        if name == "instruction":
            return [self.cut(16) for _ in range(num)], self.cut(64)
        if name == "mixed":
            return [self.cut(round(8 * (512 / 8) ** self.random.random())) for _ in range(num)], None
        return [self.cut(int(name)) for _ in range(num)], None

    def count(self, texts: list[str], prompt: str | None) -> int:
        return sum(len(self.tokenizer(f"{prompt or ''}{text}")["input_ids"]) for text in texts)


def run_floor(backbone: Any, num_tokens: int, length: int) -> None:
    rows = max(1, FLOOR_TOKENS // length)
    ids = torch.full((rows, length), 100)
    with torch.inference_mode():
        for start in range(0, num_tokens, rows * length):
            left = min(num_tokens - start, rows * length)
            backbone(input_ids=ids[: max(1, left // length), : min(length, left)], use_cache=False)


class Grit:
    """GritLM's own `encode`, with the arguments of Sentence Transformers."""

    def __init__(self, base: str, dtype: str) -> None:
        from gritlm import GritLM

        self.model = GritLM(base, mode="embedding", device="cpu", dtype=dtype)

    def encode(self, texts: list[str], prompt: str | None, batch_size: int) -> Any:
        return self.model.encode(texts, instruction=prompt or "", batch_size=batch_size, max_length=1024)


def load(way: str, base: str, dtype: str) -> Any:
    """What embeds in one of the ways."""
    kwargs: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if way.endswith(COMPILED):
        model = load(way.removesuffix(COMPILED), base, dtype)
        model.compile(dynamic=True)
        return model
    if way == "gritlm":
        return Grit(base, dtype)
    if way in PEERS:
        return build_baseline(PEERS[way], base, **kwargs).to("cpu")
    if way == EMBEDDER:
        return SentenceTransformer(str(resolve(EMBEDDER)), device="cpu", **kwargs)
    freeze_base, num_gem_tokens = GEM[way]
    torch.manual_seed(0)
    gem = GemTransformer(base, num_gem_tokens=num_gem_tokens, freeze_base=freeze_base, **kwargs)
    return SentenceTransformer(modules=[gem], device="cpu")


def count_gem_tokens(way: str) -> int:
    """K of a way; 1 of others, which end in a token as well."""
    return GEM.get(way.removesuffix(COMPILED), (False, 1))[1]


def measure(name: str, args: argparse.Namespace, models: dict[str, Any], backbone: Any) -> dict:
    """Seconds of each round by way, and what they are to stock and to the floor."""
    texts = Texts(AutoTokenizer.from_pretrained(backbone.config._name_or_path))
    sample, prompt = texts.make(name, args.num)
    num_tokens = texts.count(sample, prompt)
    ways: dict[str, Callable[[], object]] = {}
    for way, model in models.items():
        ways[way] = partial(model.encode, sample, prompt=prompt, batch_size=args.batch_size)
    for num_gem_tokens in sorted({count_gem_tokens(way) for way in models}):
        total = num_tokens + num_gem_tokens * len(sample)
        ways[f"floor K={num_gem_tokens}"] = partial(run_floor, backbone, total, round(total / len(sample)))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    repeats = 8 if len(sample) == 1 else 1
    for round_ in range(args.rounds + 1):
        for way, function in ways.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if round_:  # the first warms up
                seconds[way].append((time.perf_counter() - start) / repeats)

    def ratio(above: str, below: str) -> float:
        pairs = zip(seconds[above], seconds[below], strict=True)
        return round(statistics.median(one / other for one, other in pairs), 3)

    result: dict[str, Any] = {"tokens": num_tokens, "texts": len(sample)}
    result["seconds"] = {way: round(statistics.median(values), 4) for way, values in seconds.items()}
    result["of floor"] = {way: ratio(f"floor K={count_gem_tokens(way)}", way) for way in models}
    result["times stock"] = {way: ratio("stock", way) for way in models if "stock" in models}
    result["times echo"] = {way: ratio("echo", way) for way in models if "echo" in models}
    return result


def print_table(results: Path) -> None:
    """Each measurement as a row of Markdown."""
    print("| base, dtype, threads, batch | texts | way | times stock | times Echo | of the floor |")
    print("|---|---|---|---|---|---|")
    for line in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
        settings, result = line["settings"], line["result"]
        place = f"{settings['base']}, {settings['dtype']}, {settings['threads']}, {settings['batch_size']}"
        for way, share in result["of floor"].items():
            ratios = (result[key].get(way, "") for key in ("times stock", "times echo"))
            print(f"| {place} | {settings['texts']} | {way} | {' | '.join(map(str, ratios))} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--only", nargs="+", default=["9", "64", "256", "mixed", "one", "instruction"])
    parser.add_argument("--ways", nargs="+", default=[*PEERS, *GEM, EMBEDDER])
    parser.add_argument("--num", type=int, default=128, help="texts of each set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a line is added for each set")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    args = parser.parse_args()
    if args.table:
        return print_table(args.results)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = find_base(args.base, scratch)
        models = {way: load(way, base, args.dtype) for way in args.ways}
        backbone = AutoModel.from_pretrained(base, dtype=args.dtype).eval()
        for name in args.only:
            result = measure(name, args, models, backbone)
            line = {"settings": {**settings, "texts": name}, "result": result, "versions": describe_versions()}
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
