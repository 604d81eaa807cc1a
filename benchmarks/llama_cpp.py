"""A frozen GEM model in llama.cpp, beside the untouched GGUF that people run: vectors, answers, latency, memory.

    python benchmarks/llama_cpp.py                                      # trains a few steps first
    python benchmarks/llama_cpp.py --checkpoint runs/gem --data DATA    # one of yours; STS-B test and titles, too

SmolLM2-135M-Instruct as its own Q4_1 file, and as one of the same weights in float16, each with the adapter that
`gem-st export --format alora` writes for it. Exit status 1 if a vector is too far from ours in float32, an answer is
not what the same server gives without the adapter, or a score differs by more than 0.01. DATA is described in
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from engines import build_texts
from llama_server import Server, unit
from sentence_transformers import SentenceTransformer
from train_step import read_status

from gem_st.hub import export, load
from gem_st.training.measures import describe_versions

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "quality")]
from models import resolve, resolve_gguf  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "llama_cpp.jsonl"
BOUNDS = {"q4_1": 0.985, "f16": 0.9995}
"""Least cosine with our vectors in float32."""

PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at a temperature of"]
QUESTION = "Why is the sky blue? Answer in one sentence."
CONTEXT = 2048
LENGTHS = ((0, 0), (1, 2), (3, 9), (10, CONTEXT))
KINDS = ("chat", "chat and embeddings", "all-MiniLM beside it")


class Served(SentenceTransformer):
    """A model whose vectors are a server's."""

    def use(self, server: Server, end: str) -> Served:
        self.server, self.end = server, end
        return self

    def encode(self, inputs: Any, batch_size: int = 64, convert_to_tensor: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        texts = [text + self.end for text in ([inputs] if isinstance(inputs, str) else inputs)]
        parts = [self.server.embed(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        vectors = np.concatenate(parts).astype(np.float32)
        return torch.from_numpy(vectors) if convert_to_tensor else vectors


def answer_all(server: Server) -> list[str]:
    """Greedy answers, to prompts, in a chat, and as it is streamed."""
    found = [server.complete(prompt, max_tokens=40) for prompt in PROMPTS]
    return [*found, server.chat(QUESTION, max_tokens=40), "".join(server.stream(QUESTION, max_tokens=40))]


def train(base: str, folder: Path, steps: int) -> Path:
    """Train a few steps, so that the adapter is not nothing."""
    options = ["--mode", "frozen", "--gem-tokens", "reserved", "--steps", str(steps), "--max-length", "48"]
    options += ["--data", str(ROOT / "examples" / "data" / "train.txt"), "--base", resolve(base), "--overwrite"]
    subprocess.run([sys.executable, "-m", "gem_st.cli", "train", *options, "--output", str(folder)], check=True)
    return folder


def write_float16(source: Path, target: Path) -> None:
    """The same model with matrices in float16, as llama.cpp's converter would have written it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(name: str, file: Path, folder: Path, model: SentenceTransformer, quality: Quality | None) -> dict[str, Any]:
    """All that is compared for one file."""
    (token,), adapter = model[0].gem_tokens.names, folder / "gem-adapter.gguf"
    end = json.loads((folder / "reference_vectors.json").read_text(encoding="utf-8"))["end"]
    texts = [*build_texts(), f"a text that spells {token} and goes on"]
    ours, ended = unit(model.encode(texts)), [text + end for text in texts]
    base, server = Server(file), Server(file, adapter, "CLS")
    plain, before = answer_all(base), answer_all(server)
    vectors = {"together": server.embed(ended), "alone": np.concatenate([server.embed([text]) for text in ended])}
    after = answer_all(server)
    answers: list[list[str]] = []
    chat = threading.Thread(target=lambda: answers.append(answer_all(server)))
    chat.start()
    vectors["during answers"] = np.concatenate([server.embed([text]) for text in ended])
    chat.join()
    spelled, off = f"What does {token} mean?", {"lora": [{"id": 0, "scale": 0}]}
    expected = base.chat(spelled, max_tokens=20)
    lengths = np.array([len(model.tokenizer(text)["input_ids"]) for text in texts])
    result: dict[str, Any] = {
        "cosines, least and median": {way: cosines(ours, found) for way, found in vectors.items()},
        "the same by tokens in a text": {
            f"{first} to {last}": cosines(ours[chosen], vectors["alone"][chosen])
            for first, last in LENGTHS
            if (chosen := (lengths >= first) & (lengths <= last)).any()
        },
        "one GEM token and pooling last": cosines(ours, Server(file, adapter).embed([text + token for text in texts])),
        "two slots": cosines(ours, Server(file, adapter, "CLS", num_slots=2).embed(ended)),
        "without the token": cosines(ours, server.embed([text or " " for text in texts])),
        "answers equal": {"before": plain == before, "after": plain == after, "during": plain == answers[0]},
        "a chat that spells the token equals the base's": {
            "with the adapter": expected == server.chat(spelled, max_tokens=20),
            "lora scale 0": expected == server.chat(spelled, max_tokens=20, **off),
        },
        "seconds over mean pooling's": compare_latency(server, Server(file, pooling="MEAN"), texts[8:20], end),
        "MiB": {kind: ask_for_memory(kind, file, adapter, end) for kind in KINDS},
    }
    result["passed"] = min(each[0] for each in result["cosines, least and median"].values()) >= BOUNDS[name]
    result["passed"] &= all(result["answers equal"].values())
    if quality is not None:
        served = quality.score(Served(modules=[model[0]], device="cpu").use(server, end))
        result["quality, ours and served"] = [quality.ours, served]
        result["passed"] &= all(abs(value - served[key]) <= 0.01 for key, value in quality.ours.items())
    return result


class Quality:
    """STS-B and two groups of titles of their test splits; all groups would take hours.

    Args:
        model: Ours, scored at once.
        data: Where they are.
    """

    def __init__(self, model: SentenceTransformer, data: Path) -> None:
        from real_data import evaluators

        self.evaluators = evaluators(["sts", "titles"], data, "test")
        del self.evaluators["titles"].evaluators[2:]
        self.ours = self.score(model)

    def score(self, model: SentenceTransformer) -> dict[str, float]:
        from real_llm import score

        return score(model, self.evaluators)


def ask_for_memory(kind: str, file: Path, adapter: Path, end: str) -> int:
    """Memory that a process of its own, or two, take after they have answered and embedded."""
    command = [sys.executable, __file__, "--memory", kind, str(file), str(adapter), end]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.split()[-1])


def use_memory(kind: str, file: str, adapter: str, end: str) -> float:
    """Answer, and embed where it is asked for; memory of this process, and of the embedder beside it, in MiB."""
    texts, total = build_texts(), 0.0
    if kind == KINDS[2]:
        command = [sys.executable, __file__, "--memory", "all-MiniLM", file, adapter, end]
        total = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    if kind == "all-MiniLM":
        SentenceTransformer(resolve("all-minilm-l6-v2"), device="cpu").encode(texts)
        return read_status("VmRSS")
    before = read_status("VmRSS")  # of what this script imports, which a server does not
    server = Server(Path(file), Path(adapter), "CLS") if kind == KINDS[1] else Server(Path(file))
    server.chat(QUESTION, max_tokens=40)
    if kind == KINDS[1]:
        server.embed([text + end for text in texts])
    return total + read_status("VmRSS") - before


def cosines(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """The least, and the median."""
    found = (ours * theirs).sum(axis=1)
    return [round(float(found.min()), 5), round(float(np.median(found)), 5)]


def compare_latency(server: Server, mean: Server, texts: list[str], ending: str, rounds: int = 5) -> float:
    """Time for texts one by one over that of stock mean pooling, in turn; the median."""
    ratios = []
    for round_ in range(rounds + 1):
        times = [time.perf_counter()]
        for each, end in ((server, ending), (mean, "")):
            for text in texts:
                each.embed([text + end])
            times.append(time.perf_counter())
        if round_:  # the first warms up
            ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return round(statistics.median(ratios), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--checkpoint", help="a frozen model whose GEM token is an existing one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "llama_cpp")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(round(use_memory(*args.memory)))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or train(args.base, args.output / "checkpoint", args.steps)
    model = load(str(checkpoint), model_kwargs={"dtype": "float32"}, trust_remote_code=True)
    model.max_seq_length = CONTEXT  # the server cuts nothing
    files = {"q4_1": Path(resolve_gguf(args.base)), "f16": args.output / "f16.gguf"}
    write_float16(files["q4_1"], files["f16"])
    quality = Quality(model, args.data) if args.data else None
    passed = True
    for name, file in files.items():
        folder = args.output / name
        if not folder.exists():
            export(model, folder, format="alora", gguf=file)
        result = measure(name, file, folder, model, quality if name == "q4_1" else None)
        print(name, json.dumps(result, indent=1), flush=True)
        versions = {**describe_versions(), "xllamacpp": version("xllamacpp")}
        with RESULTS.open("a", encoding="utf-8") as target:
            target.write(json.dumps({"file": name, "result": result, "versions": versions}) + "\n")
        passed &= result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
