"""What the vectors of an output are of: noted before the first of them, and compared ever after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..files import read_json, write_json
from .config import FINGERPRINT
from .errors import EncodeError


def settle(output: str | Path, note: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the note beside the vectors, or compare with the one that is there.

    Args:
        output: Folder of a run.
        note: How the run was asked for; ``columns`` are compared.
        facts: What was found; ``fingerprint`` is compared.

    Raises:
        EncodeError: If they differ, with both.
    """
    path = Path(output) / FINGERPRINT
    with FileLock(str(Path(output) / "work" / "settling.lock")):  # of several actors one is the first
        if not path.exists():
            write_json(path, {**facts, **note})
            return
    noted = read_json(path)
    there, now = ({**found["fingerprint"], "columns": of["columns"]} for found, of in ((noted, noted), (facts, note)))
    refuse_other(note["checkpoint"], str(output), there, now)


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
