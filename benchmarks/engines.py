"""Vectors and text of a stock export as other engines serve it, against those of torch in float32.

    python benchmarks/engines.py                  # with gem_st: makes runs/engines/stock and its reference
    ONNX/bin/python benchmarks/engines.py --engine onnx
    OPENVINO/bin/python benchmarks/engines.py --engine openvino
    LLAMA/bin/python benchmarks/engines.py --engine llama.cpp --llama-cpp PATH/TO/llama.cpp    # for its converter

Engines need packages that exclude each other, hence a virtual environment each, in which gem_st is not needed:

    pip install "sentence-transformers[onnx]<6"         # optimum-onnx needs transformers 4
    pip install "sentence-transformers[openvino]>=6"    # torch and torchvision from one index: both for the CPU, say
    pip install "sentence-transformers>=6" xllamacpp gguf sentencepiece

Without --engine, all run whose packages are there. Exit status 1 if an engine's smallest cosine is below its bound.
The run that finds no reference writes it: let that be one where gem_st is, also for a --checkpoint of your own, as an
older transformers may misread an export for all engines alike. Beside the export CHECKPOINT lie CHECKPOINT.json, the
reference, and what the engines load: CHECKPOINT-onnx/, CHECKPOINT-openvino/ and CHECKPOINT-f32.gguf. Remove all of them
when the export has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import runpy
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Once upon a time", "The train to the city", "Knead the dough", "Why is the sky", "In the garden,"]
NUM_NEW_TOKENS = 40
SPECIAL_TEXTS = [
    "",
    "a",
    " a leading space",
    "two  spaces, a\ttab,\n\nand new lines",
    "It's 3 o'clock: I'll pay $12.50 (10 % off)!",
    "def add(a, b):\n    return a + b  # 1e-5",
    "Der Zug hat Verspätung, écoute, 列车晚点了。 متأخر поезд",
    "Hello 🚀 world 👩‍👩‍👧‍👦 ✅",
]


@dataclass(frozen=True)
class Reference:
    """What torch gives in float32, in the environment that wrote it."""

    texts: list[str]
    ids: list[list[int]]
    vectors: list[list[float]]
    prompts: list[str]
    generated: list[list[int]]
    versions: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    vectors: Any
    bound: float
    same_ids: str = ""
    same_text: str = ""


class CannotRunError(Exception):
    """An engine lacks something; the text says what."""


# --------------------------------------------------------------------------------------------------------------------
# Reference


def make_checkpoint(base: str, folder: Path) -> list[list[float]]:
    """Export a model with one GEM token, as drawn, and return its vectors."""
    from gem_st import GemTransformer
    from gem_st.hub import export

    torch.manual_seed(0)
    gem = GemTransformer(base, num_gem_tokens=1, model_kwargs={"dtype": "float32"})
    model = SentenceTransformer(modules=[gem], device="cpu")
    export(model, folder, format="stock")
    return model.encode(build_texts()).tolist()


def build_texts(num: int = 40) -> list[str]:
    """Texts of 2 to 200 words, with some that tokenizers disagree on."""
    lines = (ROOT / "examples" / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    draw = random.Random(0)
    lengths = [round(2 * 100 ** (index / (num - len(SPECIAL_TEXTS) - 1))) for index in range(num - len(SPECIAL_TEXTS))]
    starts = [draw.randrange(len(words) - length) for length in lengths]
    return SPECIAL_TEXTS + [" ".join(words[i : i + length]) for i, length in zip(starts, lengths, strict=True)]


@torch.inference_mode()
def write_reference(checkpoint: Path, path: Path, vectors: list[list[float]] | None) -> None:
    """Write token ids, vectors and greedy text of the export's generator, computed row by row."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    gem_token_id = gem_token_of(checkpoint)
    texts = build_texts()
    ids = [[*tokenizer(text)["input_ids"], gem_token_id] for text in texts]
    if vectors is None:
        vectors = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1].tolist() for row in ids]
    generated = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        generated.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
    reference = Reference(texts, ids, vectors, PROMPTS, generated, versions)
    path.write_text(json.dumps(vars(reference), ensure_ascii=False), encoding="utf-8")


def gem_token_of(checkpoint: Path) -> int:
    return AutoTokenizer.from_pretrained(checkpoint / "embedding")("")["input_ids"][-1]


# --------------------------------------------------------------------------------------------------------------------
# Sentence Transformers on torch, ONNX Runtime and OpenVINO


def run_torch(checkpoint: Path, reference: Reference, args: argparse.Namespace) -> list[Row]:
    model = SentenceTransformer(str(checkpoint), device="cpu", model_kwargs={"dtype": torch.float32})
    return [encode_row("Sentence Transformers, torch", model, reference)]


def run_onnx(checkpoint: Path, reference: Reference, args: argparse.Namespace) -> list[Row]:
    folder = export_graph(checkpoint, "onnx")
    kwargs = {"provider": "CPUExecutionProvider"}
    model = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=kwargs)
    return [encode_row("Sentence Transformers, onnx", model, reference)]


def run_openvino(checkpoint: Path, reference: Reference, args: argparse.Namespace) -> list[Row]:
    folder = export_graph(checkpoint, "openvino")
    kwargs = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}  # bfloat16 by default, where the CPU has it
    model = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs=kwargs)
    return [encode_row("Sentence Transformers, openvino", model, reference)]


def encode_row(name: str, model: SentenceTransformer, reference: Reference) -> Row:
    tokens = model.tokenizer(reference.texts, truncation=True, max_length=model.max_seq_length)
    return Row(name, model.encode(reference.texts), 0.999, count_equal(tokens["input_ids"], reference.ids))


def export_graph(checkpoint: Path, backend: str) -> Path:
    """Write a Sentence-Transformers checkpoint with a graph in place of weights, and return its folder.

    It is the export's folder ``embedding`` with ``model.onnx`` or ``openvino_model.xml`` in a folder of the backend's
    name. The export that Sentence Transformers runs by itself will not do: for most decoders its graph has an input
    ``position_ids`` that nothing fills at inference, an error in ONNX Runtime and NaN in OpenVINO.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}-{backend}")
    if folder.exists():
        return folder
    source = checkpoint / "embedding"
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        partial, graph = Path(scratch) / "checkpoint", Path(scratch) / "graph"
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
        export_files(source, graph, backend)
        (partial / backend).mkdir()
        for file in [*graph.glob("*.onnx*"), *graph.glob("openvino_model.*")]:
            shutil.move(file, partial / backend / file.name)
        partial.rename(folder)
    return folder


def export_files(source: Path, target: Path, backend: str) -> None:
    """Run Optimum's export of the last hidden state, with token ids and attention mask as the only inputs."""
    exporter: Any = import_module(f"optimum.exporters.{backend}")
    import_module(f"optimum.exporters.{backend}.model_configs")  # registers the architectures
    options: dict[str, Any]
    if backend == "onnx":
        keyword, options = "custom_onnx_configs", {"do_validation": False, "no_post_process": True}
    else:
        from optimum.intel import OVConfig

        # Without it, 8-bit weights from a billion parameters on.
        keyword, options = "custom_export_configs", {"ov_config": OVConfig(dtype="fp32")}
    options[keyword] = {"model": graph_config(source, backend)}
    options |= {"task": "feature-extraction", "library_name": "transformers"}
    exporter.main_export(str(source), output=str(target), **options)


def graph_config(source: Path, backend: str) -> Any:
    """Optimum's description of the architecture, less the input ``position_ids``: rows are padded on the right."""
    from optimum.exporters.tasks import TasksManager

    config = AutoConfig.from_pretrained(source)
    find = TasksManager.get_exporter_config_constructor
    graph: Any = find(backend, model_type=config.model_type, task="feature-extraction", library_name="transformers")
    graph = graph(config)
    kind: Any = type(graph)

    def inputs(self: Any) -> dict[str, Any]:
        return {name: axes for name, axes in kind.inputs.fget(self).items() if name != "position_ids"}

    graph.__class__ = type(kind.__name__, (kind,), {"inputs": property(inputs)})
    return graph


# --------------------------------------------------------------------------------------------------------------------
# llama.cpp


def run_llama_cpp(checkpoint: Path, reference: Reference, args: argparse.Namespace) -> list[Row]:
    from llama_server import Server

    path = gguf_path(checkpoint, args)
    if not path.exists():
        convert(checkpoint, path, args)
    server = Server(path, context=max(map(len, reference.ids)) + NUM_NEW_TOKENS)
    check_vocabulary(checkpoint, server)
    gem_token_id = reference.ids[0][-1]
    tokenized = [server.ask("/tokenize", content=text, add_special=True)["tokens"] for text in reference.texts]
    ids = [[*row, gem_token_id] for row in tokenized]
    vectors = server.embed([[text, gem_token_id] for text in reference.texts])
    expected = reference.generated
    written = [generate(server, *pair) for pair in zip(reference.prompts, map(len, expected), strict=True)]
    same_ids, same_text = count_equal(ids, reference.ids), count_equal(written, expected)
    return [Row(f"llama.cpp, {args.outtype}", vectors, 0.99, same_ids, same_text)]


def gguf_path(checkpoint: Path, args: argparse.Namespace) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-{args.outtype}.gguf")


def check_vocabulary(checkpoint: Path, server: Any) -> None:
    num_rows = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    num_tokens = server.ask("/v1/models")["data"][0]["meta"]["n_vocab"]
    if num_tokens != num_rows:
        raise CannotRunError(
            f"the converter found {num_tokens} tokens for {num_rows} rows of the embedding; a tokenizer made "
            "with SentencePiece needs the base's tokenizer.model in the export"
        )


def generate(server: Any, prompt: str, num_tokens: int) -> list[int]:
    options = {"n_predict": num_tokens, "temperature": 0, "repeat_penalty": 1.0, "return_tokens": True}
    return server.ask("/completion", prompt=prompt, ignore_eos=True, **options)["tokens"]


def convert(checkpoint: Path, path: Path, args: argparse.Namespace) -> None:
    """Run llama.cpp's converter on the root of the export."""
    script = args.llama_cpp / "convert_hf_to_gguf.py"
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    arguments = [str(checkpoint), "--outtype", args.outtype, "--outfile", str(path)]
    with named_pre_tokenizer(args.pre_tokenizer), with_arguments([str(script), *arguments]):
        runpy.run_path(str(script), run_name="__main__")


@contextlib.contextmanager
def named_pre_tokenizer(name: str) -> Iterator[None]:
    """Let the converter take a tokenizer that its list of hashes lacks, as it does for a tokenizer of one's own."""
    from conversion.base import TextModel  # in the folder of llama.cpp

    known = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            print(f"llama.cpp does not know this tokenizer; read as {name}")
            return name

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    try:
        yield
    finally:
        TextModel.get_vocab_base_pre = known


@contextlib.contextmanager
def with_arguments(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


# --------------------------------------------------------------------------------------------------------------------
# Table


ENGINES: dict[str, tuple[Callable[..., list[Row]], tuple[str, ...]]] = {
    "torch": (run_torch, ()),
    "onnx": (run_onnx, ("optimum", "optimum.onnxruntime", "onnxruntime")),
    "openvino": (run_openvino, ("optimum", "optimum.intel", "openvino")),
    "llama.cpp": (run_llama_cpp, ("xllamacpp", "gguf", "sentencepiece")),
}


def count_equal(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    same = sum(list(one) == list(other) for one, other in zip(found, expected, strict=True))
    return f"{same} of {len(expected)}"


def cosines(found: Any, expected: Any) -> np.ndarray:
    """Cosine of each row; a NaN counts as -1."""
    first, second = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.nan_to_num((first * second).sum(1) / norms, nan=-1.0)


def check_packages(engine: str, args: argparse.Namespace) -> None:
    for name in ENGINES[engine][1]:
        if find_spec(name) is None:
            raise CannotRunError(f"{name} is not installed in this environment")
    if engine == "llama.cpp" and not gguf_path(args.checkpoint, args).exists():
        if args.llama_cpp is None:
            raise CannotRunError("--llama-cpp is not given, a clone of llama.cpp, which has the converter")
        if not (args.llama_cpp / "conversion" / "base.py").exists():
            raise CannotRunError(f"{args.llama_cpp} has no conversion/base.py; a clone of llama.cpp of 2026 is needed")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a stock export; made of --base by default")
    parser.add_argument("--base", default=str(ROOT / "examples" / "base-8m"))
    parser.add_argument("--engine", action="append", choices=ENGINES, help="repeatable; those installed by default")
    parser.add_argument("--llama-cpp", type=Path, help="a clone of llama.cpp, for its convert_hf_to_gguf.py")
    parser.add_argument("--outtype", default="f32", help="of the GGUF file: f32, f16, q8_0, ...")
    parser.add_argument("--pre-tokenizer", default="gpt-2", help="name of a tokenizer that llama.cpp does not know")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    vectors = None
    if args.checkpoint is None:
        args.checkpoint = ROOT / "runs" / "engines" / "stock"
        if not args.checkpoint.exists():
            vectors = make_checkpoint(args.base, args.checkpoint)
    if not (args.checkpoint / "embedding" / "modules.json").exists():
        sys.exit(f"{args.checkpoint} is no stock export.")
    path = args.checkpoint.with_name(f"{args.checkpoint.name}.json")
    if vectors is not None or not path.exists():
        write_reference(args.checkpoint, path, vectors)
    reference = Reference(**json.loads(path.read_text(encoding="utf-8")))
    print(f"Reference: {reference.versions}")
    rows = []
    for engine in args.engine or ENGINES:
        try:
            check_packages(engine, args)
            rows += ENGINES[engine][0](args.checkpoint, reference, args)
        except CannotRunError as error:
            if args.engine is not None:
                sys.exit(f"{engine} cannot run: {error}.")
            print(f"{engine} is skipped: {error}.")
    return print_table(rows, reference)


def print_table(rows: list[Row], reference: Reference) -> int:
    """Print a table and return 1 if a cosine is below its engine's bound."""
    print("| engine | smallest cosine | median | at least | same token ids | same greedy text |")
    print("|---|---|---|---|---|---|")
    failed = False
    for row in rows:
        values = cosines(row.vectors, reference.vectors)
        failed |= bool(values.min() < row.bound)
        numbers = f"{values.min():.7f} | {statistics.median(values):.7f} | {row.bound}"
        print(f"| {row.engine} | {numbers} | {row.same_ids} | {row.same_text} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
