"""Writing a checkpoint with reference vectors in it: it appears in its folder when it is whole."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers import __version__ as sentence_transformers_version
from transformers import __version__ as transformers_version

from .._version import __version__
from ..cards.card_data import render_card
from ..files import hash_file, is_full_disk, write_json
from ..finding import require_gem
from ..modeling.gem_cache import write_tensors
from .gguf_adapter import check_activated, save_activated
from .layout import CARD, FORMATS, REFERENCE_FILES, REFERENCE_PROMPT, REFERENCE_TEXTS, list_files
from .stock import check_stock, save_stock


def export(
    model: SentenceTransformer, path: str | Path, *, format: str = "gem", gguf: str | Path | None = None
) -> Path:
    """Write a checkpoint with reference vectors in it, so that :func:`verify` can tell whether it still gives them.

    Args:
        model: A model whose first module is a GemTransformer.
        path: A folder that does not exist yet, or is empty.
        format: ``"gem"``, what ``save_pretrained`` writes, for every model; or ``"stock"``, for K = 1 in full mode: a
            checkpoint of Sentence Transformers' own modules that needs no remote code. Its root is a plain generator
            with a clean tokenizer, its folder ``embedding`` a checkpoint by itself, for serving engines, whose
            tokenizer appends the GEM token; the weights are one file under two names. ``"alora"``, for K = 1 beside a
            frozen base whose GEM token is an existing one: a file that llama.cpp loads beside the base's own GGUF.
        gguf: That GGUF file, for ``"alora"``.

    Returns:
        The folder.

    Raises:
        ImportError: If ``"alora"`` needs the `gguf` package, and it is not installed.
        ValueError: If the model is not a GEM model or cannot be written in this format, or ``gguf`` is another base's.
        FileExistsError: If the folder holds files.
        OSError: If it cannot be written, e.g. to a full disk; nothing is left then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    gem = require_gem(model)
    if (format == "alora") != (gguf is not None):
        raise ValueError(
            f'format="alora" needs gguf=, the file of its base, and no other does; got {format!r}, {gguf!r}.'
        )
    if format == "stock":
        check_stock(model)
    elif format == "alora":
        check_activated(model)
    with _all_or_nothing(Path(path)) as folder, gem.as_saved():
        if gguf is not None:
            save_activated(model, Path(gguf), folder)
            return Path(path)
        if format == "stock":
            save_stock(model, folder, REFERENCE_TEXTS)
        else:
            model.save_pretrained(str(folder), create_model_card=False)
        (folder / CARD).write_text(render_card(model, is_stock=format == "stock"), encoding="utf-8")
        _write_reference(model, gem, folder, format)
    return Path(path)


def require_new(folder: Path) -> None:
    """Make sure that nothing would be overwritten.

    Raises:
        FileExistsError: If there is a file of that name, or a folder with files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Export to a new folder, or remove it first.")


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder beside the one wanted, which takes its name when all is written, and is removed when something fails."""
    folder = folder.resolve()
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (scratch / "whole").mkdir()
        yield scratch / "whole"
        if folder.exists():
            folder.rmdir()
        (scratch / "whole").rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        message = f"The disk is full: {folder} was not written. Free some space, or choose another disk"
        raise OSError(errno.ENOSPC, message) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@torch.inference_mode()
def _write_reference(model: SentenceTransformer, gem: Any, folder: Path, format: str) -> None:
    """Write texts, their vectors, the logits of a prompt, and the hashes of all files but the card."""
    embeddings = model.encode(REFERENCE_TEXTS, convert_to_tensor=True, show_progress_bar=False)
    ids = torch.tensor(gem.base.text.encode([REFERENCE_PROMPT]), device=gem.model.device)
    logits = gem.model(ids).logits[0, -1]
    tensors = {"embeddings": embeddings.float().cpu().contiguous(), "logits": logits.float().cpu().contiguous()}
    write_tensors(tensors, folder / REFERENCE_FILES[1])
    reference = {
        "format": format,
        "texts": REFERENCE_TEXTS,
        "prompt": REFERENCE_PROMPT,
        "dtype": str(gem.model.dtype).removeprefix("torch."),
        "gem_token_ids": gem.gem_token_ids,
        "holds_base": (folder / "config.json").exists(),
        "versions": {
            "gem_st": __version__,
            "sentence_transformers": sentence_transformers_version,
            "transformers": transformers_version,
            "torch": torch.__version__,
        },
        "files": {
            name: hash_file(folder / name) for name in list_files(folder) if name not in (CARD, REFERENCE_FILES[0])
        },
    }
    write_json(folder / REFERENCE_FILES[0], reference)
