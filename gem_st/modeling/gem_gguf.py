"""A base that is one GGUF file: how it is named, and what of it transformers would not read."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

GGUF = ".gguf"
"""How the names of llama.cpp's files end, which are config, tokenizer and weights in one."""

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""Kinds of model, and what llama.cpp calls them, of which vectors and answers were compared with llama.cpp's."""

UNREAD_TENSORS = ("rope_freqs.", "rope_factors_")
UNREAD_KEYS = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
"""What transformers leaves out when it reads a file, beside the values that change nothing."""

LLAMA3_CONTEXT = 8192
"""Positions that all of Llama 3 was first trained with."""


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        ImportError: If it is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files need a package of llama.cpp's: pip install gguf")
    return importlib.import_module("gguf")


def open_gguf(path: str | Path) -> Any:
    """A file's header and tensors.

    Raises:
        ImportError: If the package is missing.
        ValueError: If it is no GGUF file.
    """
    try:
        return import_gguf().GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file, or was not downloaded completely: {error}") from error


def split_gguf(name: str) -> tuple[str, str | None]:
    """Folder or Hub id, and the GGUF file in it, of a base that is one; a name of something else and None.

    Args:
        name: ``"folder/model.gguf"``, ``"org/name/model.gguf"``, ``"org/name/folder/model.gguf"``, or of another base.
    """
    path, parts = Path(name), name.split("/")
    if not name.endswith(GGUF) or path.is_dir():
        return name, None
    if path.is_absolute() or path.is_file():
        return str(path.parent), path.name
    if len(parts) > 2:
        return "/".join(parts[:2]), "/".join(parts[2:])
    return name, None


def find_gguf(source: str, file: str, **kwargs: Any) -> Path:
    """Where a file is on this machine; transformers would take one of the same name in the working directory.

    Args:
        source: Folder or Hub id.
        file: The GGUF file in it.
        **kwargs: How files are read from the Hub.

    Raises:
        OSError: If it is not there.
        ValueError: If it is no GGUF file.
    """
    path = Path(str(cached_file(source, file, **kwargs))).absolute()
    with open(path, "rb") as content:
        if len(start := content.read(24)) < 24 or not start.startswith(b"GGUF"):
            raise ValueError(f"{path} is no GGUF file, or was not downloaded completely.")
    return path


def name_pretrained(name: str) -> dict[str, str]:
    """What ``from_pretrained`` of transformers gets for a base: folder or Hub id, and the GGUF file in it."""
    source, file = split_gguf(name)
    if file and Path(source).is_dir():
        file = str(Path(source, file).absolute())
    return {"pretrained_model_name_or_path": source, **({"gguf_file": file} if file else {})}


def check_gguf(path: str, config: Any) -> None:
    """Fill into a configuration what a file says and transformers does not read, or refuse the file.

    Args:
        path: The file.
        config: What transformers made of it.

    Raises:
        ImportError: If the package `gguf` is missing.
        ValueError: If the file says more than that, or is of an architecture that was not compared.
    """
    reader = open_gguf(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.")}
    kind = keys.get("general.architecture")
    unread = [tensor.name for tensor in reader.tensors if tensor.name.startswith(UNREAD_TENSORS)]
    if unread == ["rope_freqs.weight"] and kind == "llama":
        (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == unread[0])
        unread = [] if _fill_llama3(config, torch.tensor(factors)) else unread
    unread += [name for name in UNREAD_KEYS if keys.get(f"{kind}.{name}") not in (None, "none", 0.0, 1.0)]
    if kind == "gemma3" and config.query_pre_attn_scalar != keys.get("gemma3.attention.key_length", 256):
        unread.append("attention.key_length")
    width = config.hidden_size // config.num_attention_heads
    if kind == "phi3" and keys.get("phi3.rope.dimension_count", width) != width:
        unread.append("rope.dimension_count")
    known = {*ARCHITECTURES.values()}
    if kind not in known or unread:
        problem = f"it has {', '.join(unread)}" if kind in known else f"{kind!r} is none of {', '.join(sorted(known))}"
        raise ValueError(
            f"{path} cannot be a base: transformers may not read it as llama.cpp does, as {problem}. Train beside the "
            "model that the file was made of, and give the file to `gem-st export --format alora --gguf`."
        )


def _fill_llama3(config: Any, factors: torch.Tensor) -> bool:
    """Scale rotary frequencies as Llama 3.1 and later do, if the file's factors are these.

    Args:
        config: Gets ``rope_parameters``.
        factors: What each frequency is divided by. Shape: ``(D / 2,)``
    """
    theta, largest = config.rope_parameters["rope_theta"], float(factors.max())
    turns = theta ** -(torch.arange(len(factors), dtype=torch.float64) / len(factors))
    share = (LLAMA3_CONTEXT * turns / (2 * math.pi) - 1) / 3  # 0 to 1 from low_freq_factor 1 to high_freq_factor 4
    expected = 1 / ((1 - share) / largest + share)
    expected = torch.where(share < 0, largest, torch.where(share > 1, 1.0, expected))
    if not torch.allclose(expected, factors.double(), rtol=1e-3):
        return False
    scaling: dict[str, Any] = {"factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": LLAMA3_CONTEXT, "rope_type": "llama3", "rope_theta": theta}
    config.rope_parameters = scaling
    return True
