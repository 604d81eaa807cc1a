"""Rows of local files that are evaluated on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a csv, tsv or jsonl file, and the lines that they end in; values of csv and tsv are text.

    Args:
        path: The file, in UTF-8.

    Raises:
        ValueError: If it is no such file, or a line is not JSON; the message names it.
    """
    if path.suffix not in (*DELIMITERS, ".jsonl"):
        raise ValueError(f"{path} is of no kind that can be read: .csv, .tsv or .jsonl.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                yield from ((number, _parse(line, path, number)) for number, line in enumerate(file, 1) if line.strip())
                return
            reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix], strict=True)
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}). Expected one object a line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, not {line.strip()[:40]!r}.")
    return row


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Args:
        path: The file, in UTF-8.

    Raises:
        ValueError: If it cannot be read, or there is none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            texts = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not texts:
        raise ValueError(f"{path} is empty. Expected one text a line.")
    return texts
