"""What stops a run, in one line, wherever it happened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..files import is_full_disk

ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Invalid|Interrupt))(?:: (.*))?$", re.MULTILINE)


class EncodeError(ValueError):
    """What stops a run; its message is one line, which finds its way out of an actor."""


def first_error(error: BaseException) -> Exception:
    """The error that an actor or a task met: as it is, if Ray brings it whole, or found in the text that Ray has."""
    cause, text = getattr(error, "cause", None), re.sub(r"\x1b\[[\d;]*m", "", str(error))
    if is_full_disk(error):
        return OSError("The disk is full. What was written stays: free some space, and the same command goes on.")
    if isinstance(cause, (ValueError, OSError, ImportError)):
        return cause
    lines = [line for line in ERROR_LINE.finditer(text) if line[2]]
    # The last of ours, which says most, or else the first, which caused the others.
    found = next((line for line in reversed(lines) if line[1] == EncodeError.__name__), lines[0] if lines else None)
    if found is None:
        return RuntimeError(f"{type(error).__name__}: {' '.join(text.split())[-500:]}")
    name, message = found[1], found[2]
    known = {"EncodeError": EncodeError, "ValueError": ValueError, "OSError": OSError, "ImportError": ImportError}
    return known[name](message) if name in known else RuntimeError(f"{name}: {message}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """What Ray raises, as what caused it."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise first_error(error) from error
