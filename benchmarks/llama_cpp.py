"""A frozen GEM model in llama.cpp, beside the untouched GGUF that people run: vectors, answers, latency, memory.

    pip install xllamacpp                                    # llama.cpp's server as a wheel, without dependencies
    python benchmarks/llama_cpp.py                           # trains a few steps first, unless there is a --checkpoint
    python benchmarks/llama_cpp.py --checkpoint runs/gem --data DATA    # STS-B test and titles, too

SmolLM2-135M-Instruct as its own Q4_1 file, and as one of the same weights in float16, each with the adapter that
`gem-st export --format alora` writes for it. Exit status 1 if a vector is too far from ours in float32, or an answer is
not what the same server gives without the adapter. DATA is described in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp as cpp
from engines import build_texts
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
CONTEXT, NUM_SLOTS, NUM_THREADS = 2048, 2, 2
LENGTHS = ((0, 0), (1, 2), (3, 9), (10, CONTEXT))


class Server:
    """llama.cpp's server in this process.

    Args:
        file: The GGUF file.
        adapter: The adapter, or None.
        pooling: How states become a vector.
    """

    def __init__(self, file: Path, adapter: Path | None = None, pooling: str = "LAST") -> None:
        params = cpp.CommonParams()
        params.model.path = str(file)
        params.embedding, params.pooling_type = True, getattr(cpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT * NUM_SLOTS, CONTEXT, CONTEXT
        params.n_parallel = NUM_SLOTS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = NUM_THREADS
        if adapter is not None:
            params.lora_adapters = [cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = cpp.Server(params)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors. Shape: ``(B, D)``"""
        rows = decode(self.server.handle_embeddings({"input": list(texts)}))["data"]
        return unit(np.array([row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]))

    def answers(self, **options: Any) -> list[str]:
        """Greedy answers, to prompts and in a chat."""
        greedy = {"temperature": 0, "max_tokens": 40, "seed": 0, **options}
        found = [decode(self.server.handle_completions({"prompt": prompt, **greedy})) for prompt in PROMPTS]
        return [answer["choices"][0]["text"] for answer in found] + [self.chat(QUESTION, **greedy)]

    def chat(self, question: str, **options: Any) -> str:
        messages = [{"role": "user", "content": question}]
        answer = decode(self.server.handle_chat_completions({"messages": messages, **options}))
        return answer["choices"][0]["message"]["content"]


class Served(SentenceTransformer):
    """A model whose vectors are a server's."""

    def use(self, server: Server, token: str) -> Served:
        self.server, self.token = server, token
        return self

    def encode(self, inputs: Any, batch_size: int = 64, convert_to_tensor: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        texts = [text + self.token for text in ([inputs] if isinstance(inputs, str) else inputs)]
        parts = [self.server.embed(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        vectors = np.concatenate(parts).astype(np.float32)
        return torch.from_numpy(vectors) if convert_to_tensor else vectors


def decode(answer: Any) -> Any:
    return json.loads(answer) if isinstance(answer, str | bytes) else answer


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


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


def measure(name: str, file: Path, folder: Path, model: SentenceTransformer, data: Path | None) -> dict[str, Any]:
    """All that is compared for one file."""
    (token,) = model[0].gem_tokens.names
    texts = [*build_texts(), f"a text that spells {token} and goes on"]
    ours, ended = unit(model.encode(texts)), [text + token for text in texts]
    base = Server(file)
    plain = base.answers()
    before_memory = read_status("VmRSS")
    server = Server(file, folder / "gem-adapter.gguf")
    memory = read_status("VmRSS") - before_memory
    before = server.answers()
    vectors = {"together": server.embed(ended), "alone": np.concatenate([server.embed([text]) for text in ended])}
    after = server.answers()
    answers: list[list[str]] = []
    chat = threading.Thread(target=lambda: answers.append(server.answers()))
    chat.start()
    vectors["during answers"] = np.concatenate([server.embed([text]) for text in ended])
    chat.join()
    spelled = f"What does {token} mean?"
    short: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    off = {**short, "lora": [{"id": 0, "scale": 0}]}
    lengths = np.array([len(model.tokenizer(text)["input_ids"]) for text in texts])
    result: dict[str, Any] = {
        "cosines, least and median": {way: cosines(ours, found) for way, found in vectors.items()},
        "the same by tokens in a text, alone": {
            f"{first} to {last}": cosines(ours[chosen], vectors["alone"][chosen])
            for first, last in LENGTHS
            if (chosen := (lengths >= first) & (lengths <= last)).any()
        },
        "without the token, median": cosines(ours[20:], server.embed(texts[20:]))[1],
        "answers equal": {"before": plain == before, "after": plain == after, "during": plain == answers[0]},
        "a chat that spells the token equals the base's": {
            "with the adapter": base.chat(spelled, **short) == server.chat(spelled, **short),
            "lora scale 0": base.chat(spelled, **short) == server.chat(spelled, **off),
        },
        "seconds over mean pooling's": compare_latency(server, Server(file, pooling="MEAN"), texts[8:20], token),
        "MiB of a server with the adapter": round(memory),
    }
    if data is not None:
        from real_data import evaluators
        from real_llm import score

        served = Served(modules=[model[0]], device="cpu").use(server, token)
        found = evaluators(["sts", "titles"], data, "test")
        result["quality, ours and served"] = [score(each, found) for each in (model, served)]
    result["passed"] = min(each[0] for each in result["cosines, least and median"].values()) >= BOUNDS[name]
    result["passed"] &= all(result["answers equal"].values())
    return result


def cosines(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """The least, and the median."""
    found = (ours * theirs).sum(axis=1)
    return [round(float(found.min()), 5), round(float(np.median(found)), 5)]


def compare_latency(server: Server, mean: Server, texts: list[str], token: str, rounds: int = 3) -> float:
    """Time for texts one by one over that of stock mean pooling, in turn; the median."""
    ratios = []
    for round_ in range(rounds + 1):
        times = [time.perf_counter()]
        for each, end in ((server, token), (mean, "")):
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
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or train(args.base, args.output / "checkpoint", args.steps)
    model = load(str(checkpoint), model_kwargs={"dtype": "float32"}, trust_remote_code=True)
    model.max_seq_length = CONTEXT  # the server cuts nothing
    files = {"q4_1": Path(resolve_gguf(args.base)), "f16": args.output / "f16.gguf"}
    write_float16(files["q4_1"], files["f16"])
    passed = True
    for name, file in files.items():
        folder = args.output / name
        if not folder.exists():
            export(model, folder, format="alora", gguf=file)
        result = measure(name, file, folder, model, args.data)
        print(name, json.dumps(result, indent=1), flush=True)
        versions = {**describe_versions(), "xllamacpp": version("xllamacpp")}
        with RESULTS.open("a", encoding="utf-8") as target:
            target.write(json.dumps({"file": name, "result": result, "versions": versions}) + "\n")
        passed &= result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
