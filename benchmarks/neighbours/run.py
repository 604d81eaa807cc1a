"""Sentence Transformers' own tests with a GEM model in place of the one of their fixture, and with a stock model.

    git clone --branch v6.2.0 https://github.com/huggingface/sentence-transformers   # the version that is installed
    python benchmarks/neighbours/run.py sentence-transformers

What a stock model (a decoder and the last token) passes, a GEM model has to pass, but for exceptions.txt, which says
why. Prints what else fails, and what is an exception without need. Tests that need the Hub fail with both, and do not
count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from gem_st import GemTransformer

HERE = Path(__file__).resolve().parent
BASE_8M = HERE.parents[1] / "examples/base-8m"
PARTS = ("tests/sentence_transformer", "tests/base", "tests/util")
NAMES = ("stsb_bert_tiny_model", "stsb-bert-tiny-safetensors")
"""The fixture and what it loads; other files of tests have nothing to do with it."""


def make_models(folder: Path) -> dict[str, Path]:
    """Folders of a stock and of a GEM model of the same small base, by name."""
    set_seed(0)
    base = folder / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASE_8M)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=512)
    models = {
        "stock": [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")],
        "gem": [GemTransformer(str(base), max_seq_length=512)],
    }
    for name, modules in models.items():
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / name))
    return {name: folder / name for name in models}


def run_tests(source: Path, model: Path, report: Path, options: list[str]) -> dict[str, str]:
    """What became of each test: passed, or the first line of why not."""
    env = {**os.environ, "NEIGHBOUR": str(model), "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "off"}
    files = [file for part in PARTS for file in sorted((source / part).rglob("test_*.py"))]
    files = [file for file in files if any(name in file.read_text(encoding="utf-8") for name in NAMES)]
    command = ["-m", "pytest", "-q", "--tb=line", "-p", "in_place_of_the_fixture", "--junitxml", str(report), *options]
    command += [str(file.relative_to(source)) for file in files]
    subprocess.run([sys.executable, *command], cwd=source, env=env, stdout=sys.stderr, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "passed" if bad is None else str(bad.get("message")).partition("\n")[0]
    return found


def read_exceptions() -> dict[str, str]:
    """Tests that cannot hold, and why; lines of a test each, under a line of the reason."""
    reason, found = "", {}
    for line in (HERE / "exceptions.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            reason = line.removeprefix("# ")
        elif line:
            found[line] = reason
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkout of Sentence Transformers")
    parser.add_argument("pytest", nargs="*", help="options of pytest, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = make_models(Path(scratch))
        found = {
            name: run_tests(args.source, model, Path(scratch, f"{name}.xml"), args.pytest)
            for name, model in models.items()
        }
    held = [test for test, outcome in found["stock"].items() if outcome == "passed"]
    failed = {test: found["gem"].get(test, "missing") for test in held if found["gem"].get(test) != "passed"}
    exceptions = read_exceptions()
    new = {test: why for test, why in failed.items() if test not in exceptions}
    print(f"{len(held)} pass with the stock model, {len(held) - len(failed)} of them with GEM.")
    for test, why in sorted(new.items()):
        print(f"{test}\n    {why}")
    if idle := sorted({*exceptions} & {*held} - {*failed}):
        print("Exceptions that pass:", *idle, sep="\n")
    sys.exit(bool(new or idle))


if __name__ == "__main__":
    main()
