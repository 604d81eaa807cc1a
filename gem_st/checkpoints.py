"""Checkpoints of a training: which one is whole, to be resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

from .modeling.gem_checkpoint import CHECKPOINT, PART
from .modeling.gem_settings import UNFINISHED


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a training that was written to its end, to be resumed from.

    ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))`` starts a training, and goes on with it
    after it was killed, even in the middle of writing a checkpoint.

    Args:
        folder: The ``output_dir`` of the training arguments.

    Returns:
        Path of ``checkpoint-N`` with the largest N that is complete; None if there is none, or no such folder.
    """
    numbered = {int(match[1]): path for path in Path(folder).glob("*") if (match := CHECKPOINT.match(path.name))}
    return next((str(numbered[step]) for step in sorted(numbered, reverse=True) if _is_complete(numbered[step])), None)


def _is_complete(checkpoint: Path) -> bool:
    """True if the trainer's state, which it writes last, can be read, and no file before it was cut short."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        modules = checkpoint / "modules.json"
        if modules.exists() and UNFINISHED in modules.read_text(encoding="utf-8"):
            return False
    except (OSError, ValueError):
        return False
    weights = [file for file in checkpoint.rglob("*.safetensors") if not file.parent.name.startswith(PART)]
    archives = [file for suffix in ("pt", "pth", "bin") for file in checkpoint.glob(f"*.{suffix}")]
    return isinstance(state, dict) and all(map(_is_whole_safetensors, weights)) and all(map(is_zipfile, archives))


def _is_whole_safetensors(file: Path) -> bool:
    """True if a file is as long as its header says: 8 bytes, as many bytes of JSON as they say, then the tensors."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= file.stat().st_size - 8:
            return False
        try:
            header = json.loads(stream.read(size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + size + max(ends, default=0)
