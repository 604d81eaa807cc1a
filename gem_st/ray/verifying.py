"""`gem-st encode --verify`: whether all texts have their vector, once, and the model still gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import read_json
from ..hub.verifying import Check, Verification
from .config import DONE, EMPTY, FINGERPRINT, NULL, PLAN, REPORT, REPORTS, VECTORS
from .encoder import Encoder
from .errors import EncodeError
from .parts import PART, VECTOR, Part, find_repeated, hash_all, hash_ids, read_ids, read_part, read_plan, spread
from .settling import refuse_other

SHOWN = 5
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "int8": 0.05, "binary": 0.3}
"""Relative error allowed of a vector that is computed again, in other company; 0.05 at least of a model in 16 bits."""


def verify(
    output: str | Path, *, sample: int = 32, token: str | None = None, trust_remote_code: bool = False
) -> Verification:
    """Check the vectors of a run against its plan, its data and its checkpoint.

    Args:
        output: Folder of a run.
        sample: Texts that are embedded again.
        token: Hub token.
        trust_remote_code: Run code of the checkpoint that is not this gem_st's.

    Returns:
        The checks: ``files``, ``ids``, ``vectors``, ``fingerprint`` and ``sample``.

    Raises:
        ValueError: If there is no run.
    """
    folder = Path(output)
    plan = read_plan(folder / "work" / PLAN)
    if not plan or not (folder / FINGERPRINT).exists():
        raise ValueError(f"{folder} is no output of `gem-st encode`: it has no plan or no {FINGERPRINT}.")
    noted = read_json(folder / FINGERPRINT)
    checks = [check_files(folder)]
    if checks[0].passed:
        checks.append(_finding("ids", lambda: check_ids(folder, plan, noted["columns"]["id"])))
        checks.append(_finding("vectors", lambda: check_vectors(folder, noted["columns"]["id"])))
        options = {"token": token, "trust_remote_code": trust_remote_code}
        checks += check_model(folder, plan, noted, sample, options)
    return Verification(str(folder), checks)


def _finding(name: str, check: Callable[[], str]) -> Check:
    """The result of a check that raises EncodeError where it fails."""
    try:
        return Check(name, True, check())
    except (ValueError, OSError, pa.ArrowException) as error:
        return Check(name, False, " ".join(str(error).split()))


def files_of(folder: Path) -> list[Path]:
    """Files of vectors."""
    return sorted((folder / VECTORS).glob("*.parquet"))


def check_files(folder: Path) -> Check:
    """Whether files can be read, and a run came to its end."""
    broken, num_rows = [], 0
    for file in files_of(folder):
        try:
            num_rows += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            broken.append(file.name)
    pending = list((folder / "work" / DONE).glob("*.pending.parquet"))
    if broken or pending:
        finding = f"a run was cut off: {len(broken)} files cannot be read, {len(pending)} are not known to be whole"
        return Check("files", False, f"{finding}. Run `gem-st encode` again, which puts that right")
    return Check("files", True, f"{num_rows:,} vectors in {len(files_of(folder))} files")


def without_vector(folder: Path) -> set[Any]:
    """Ids of texts that have no vector, and are known to have none."""
    found = []
    for path in (
        [folder / REPORT] if (folder / REPORT).exists() else sorted((folder / "work" / REPORTS).glob("*.jsonl"))
    ):
        with path.open(encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines]
    return {line["id"] for line in found if line["reason"] in (NULL, EMPTY)}


def is_among(hashes: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Which of some hashes are among others, which are sorted. Shapes: ``(N,)``, ``(M,)`` -> ``(N,)``"""
    if not len(there):
        return np.zeros(len(hashes), bool)
    places = np.searchsorted(there, hashes)
    return there[np.minimum(places, len(there) - 1)] == hashes


def check_ids(folder: Path, plan: Sequence[Part], column: str) -> str:
    """Whether each text of the data has one vector, or a reason why not."""

    def written() -> Iterator[Any]:
        for file in files_of(folder):
            yield pq.read_table(file, columns=[column])[column].to_numpy()

    if repeated := find_repeated(written):
        raise EncodeError(f"{len(repeated)} ids at least have several vectors: {repeated[:SHOWN]}")
    there, without = hash_all(written()), without_vector(folder)
    missing, strange = [], len(there)
    for ids in read_ids(plan, column):
        is_there = is_among(hash_ids(ids), there)
        strange -= int(is_there.sum())
        missing += [value for value in np.asarray(ids)[~is_there].tolist() if value not in without]
    if missing or strange:
        raise EncodeError(
            f"{len(missing)} texts have no vector, ids {missing[:SHOWN]}; {strange} vectors are of no text. "
            "Run `gem-st encode` again, if it was not at its end"
        )
    return f"{len(there):,} have one vector each, {len(without):,} have none and are in {REPORT}"


def check_vectors(folder: Path, column: str) -> str:
    """Whether vectors are there, finite and not zero."""
    bad, width = [], None
    for file in files_of(folder):
        for batch in pq.ParquetFile(file).iter_batches(4096, columns=[column, VECTOR]):
            values, ids = batch.column(VECTOR), batch.column(column)
            width = values.type.list_size
            rows = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
            is_bad = ~np.isfinite(rows).all(axis=1) | ~rows.any(axis=1)
            bad += ids.filter(pa.array(is_bad)).to_pylist()
    if bad:
        raise EncodeError(f"{len(bad)} are not finite or zero, ids {bad[:SHOWN]}")
    return f"finite, not zero, {width} elements"


def check_model(
    folder: Path, plan: Sequence[Part], noted: dict[str, Any], sample: int, options: dict[str, Any]
) -> list[Check]:
    """Whether the checkpoint is the one of the vectors, and gives some of them again."""
    names = noted["columns"]
    same = {name: noted[name] for name in ("checkpoint", "revision", "dtype", "prompt_name", "truncate_dim", "ranges")}
    try:
        encoder = Encoder(
            **same,
            **options,
            text_column=names["text"],
            id_column=names["id"],
            precision=noted["fingerprint"]["precision"],
        )
    except (ValueError, OSError, ImportError) as error:
        return [Check("fingerprint", False, " ".join(str(error).split())), Check("sample", None, "no model")]

    def compare() -> str:
        refuse_other(noted["checkpoint"], str(folder), noted["fingerprint"], encoder.fingerprint)
        return f"weights {encoder.fingerprint['weights']}, gem_st {encoder.fingerprint['gem_st']}"

    return [
        _finding("fingerprint", compare),
        _finding("sample", lambda: check_sample(folder, plan, encoder, sample)),
    ]


def check_sample(folder: Path, plan: Sequence[Part], encoder: Encoder, sample: int) -> str:
    """Embed some texts again, of parts spread over the corpus, and compare."""
    worst, num = 0.0, 0
    files = files_of(folder)
    chosen = spread(files, 8)
    for file in chosen:
        stored = pq.read_table(file, columns=[encoder.id_column, VECTOR, PART])
        stored = stored.take(np.linspace(0, len(stored) - 1, min(len(stored), -(-sample // len(chosen)))).astype(int))
        vectors = dict(zip(stored[encoder.id_column].to_pylist(), stored[VECTOR].to_pylist(), strict=True))
        for part in set(stored[PART].to_pylist()):
            table = read_part(plan[part], [encoder.id_column, encoder.text_column])
            wanted = [row for row, value in enumerate(table[encoder.id_column].to_pylist()) if value in vectors]
            again = encoder(table.take(pa.array(wanted, pa.int64())))
            for value, vector in zip(*(again[name].to_pylist() for name in (encoder.id_column, VECTOR)), strict=True):
                worst, num = max(worst, distance(vector, vectors[value], encoder.precision)), num + 1
    if not num:
        raise EncodeError("no text of the data has an id that is here")
    allowed = TOLERANCES[encoder.precision]
    if encoder.fingerprint["dtype"] != "float32":
        allowed = max(allowed, 0.05)
    finding = f"{num} texts again, relative error {worst:.1e}, {allowed:g} allowed"
    if not worst <= allowed:
        raise EncodeError(finding)
    return finding


def distance(vector: Sequence[float], stored: Sequence[float], precision: str) -> float:
    """Relative error of a vector; of bits the share of them that differs."""
    pair = [np.asarray(values) for values in (vector, stored)]
    if precision == "binary":
        bits = [np.unpackbits((values + 128).astype(np.uint8)) for values in pair]
        return float(np.mean(bits[0] != bits[1]))
    new, old = (values.astype(np.float32) for values in pair)
    return float(np.linalg.norm(new - old) / max(float(np.linalg.norm(old)), 1e-9))
