"""What the vectors of an output are of: noted before the first of them, and compared ever after."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, to_json
from .config import FINGERPRINT
from .errors import EncodeError

PATIENCE = 10.0
"""Seconds that another actor, on another machine say, has to write the note."""


def settle(output: str | Path, note: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the note beside the vectors if there is none, and compare with the one that is there then.

    Of several actors one creates the file, on a shared disk too, whether or not that knows locks.

    Args:
        output: Folder of a run.
        note: How the run was asked for; ``columns`` are compared.
        facts: What was found; ``fingerprint`` is compared.

    Raises:
        EncodeError: If they differ, with both.
    """
    path = Path(output) / FINGERPRINT
    content = to_json({**facts, **note})
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        pass
    both = (read_patiently(path), json.loads(content))
    there, now = ({**noted["fingerprint"], "columns": noted["columns"]} for noted in both)
    refuse_other(note["checkpoint"], str(output), there, now)


def read_patiently(path: Path) -> Any:
    """Content of a JSON file that another process may be writing."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            return read_json(path)
        except (ValueError, FileNotFoundError):
            time.sleep(0.1)
    return read_json(path)


def refuse_other(name: str, where: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise EncodeError if two fingerprints differ, with what differs of both.

    Args:
        name: What the second is of.
        where: What the first is of.
        there: The first.
        now: The second.
    """
    differences = [
        f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*there, *now])
        if there.get(key) != now.get(key)
    ]
    if differences:
        raise EncodeError(
            f"{name} does not give the vectors of {where}: {'; '.join(differences)}. Vectors of two models cannot be "
            "compared: choose another --output, or what was used there."
        )
