"""Files: read and written as a whole, and hashed."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: If it is not JSON, with its name.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON; what it does not know becomes text."""
    write_text(path, to_json(content))


def to_json(content: Any) -> str:
    """Text of a JSON file; what JSON does not know becomes text."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def is_full_disk(error: BaseException) -> bool:
    """True for errors of a full disk, also as safetensors and Ray word them."""
    texts = ("No space left on device", "Errno 28")
    return getattr(error, "errno", None) == errno.ENOSPC or any(text in str(error) for text in texts)


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
