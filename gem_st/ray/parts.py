"""Parts: the rows of a corpus by a few thousand, read, embedded and written as wholes.

A part is a range of rows within a parquet file. The same part is the same table on every machine and after every
restart, which is why its vectors are the same to the bit. What is not parquet, or has large row groups, is copied to
parquet first, beside the output.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import EncodeError

PART, VECTOR = "part", "vector"
SAVED = "state.json"
"""What is in the folder of a data set that `datasets` saved."""
LARGE_GROUPS = 8
"""Row groups of more than so many parts are copied: each part would read all of its group."""


class Part(NamedTuple):
    """A part: ``num_rows`` rows from the ``start``-th of some row groups of a file."""

    part: int
    file: str
    group: int
    num_groups: int
    start: int
    num_rows: int


class Source(NamedTuple):
    """A corpus: a file, a folder, or the Hub id of a data set, see :func:`gem_st.training.data.load_source`."""

    name: str
    subset: str | None = None
    split: str = "train"
    token: str | None = None


class Columns(NamedTuple):
    """Names of the columns that are read."""

    text: str
    id: str
    others: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """All of them."""
        return list(dict.fromkeys([self.id, self.text, *self.others]))


class File(NamedTuple):
    """What is to be known of a parquet file: rows of each row group, and types of the columns that are kept."""

    path: Path
    sizes: tuple[int, ...]
    types: dict[str, str]


# --------------------------------------------------------------------------------------------------------------------
# Files


def find_files(
    source: Source, columns: Columns, rows_per_part: int, folder: Path, say: Callable[[str], object]
) -> list[File]:
    """Parquet files of a corpus, copied to ``folder`` where that is needed.

    Args:
        source: The corpus.
        columns: Columns to be read.
        rows_per_part: Rows of a part.
        folder: Where copies lie.
        say: Told of what takes long.

    Raises:
        ValueError: If there is nothing to read, a column is missing or of the wrong type, or a copy is of other data.
    """
    path = Path(source.name).expanduser()
    if not path.exists() or (path / SAVED).exists():
        files = list_files(path, say) if path.exists() else []
        return [look_into(_copy(source, files, columns, rows_per_part, folder, say), columns)]
    if source.subset is not None or source.split != "train":
        raise ValueError(f"{source.name} is on this machine, without subsets and splits. Name its files, or a folder.")
    found = []
    for file in [path] if path.is_file() else list_files(path, say):
        known = look_into(file, columns) if file.suffix == ".parquet" else None
        if known is None or max(known.sizes, default=0) > LARGE_GROUPS * rows_per_part:
            copy = _copy(source._replace(name=str(file)), [file], columns, rows_per_part, folder, say)
            known = look_into(copy, columns)
        found.append(known)
    check_types(found)
    return found


def list_files(folder: Path, say: Callable[[str], object]) -> list[Path]:
    """All files of a folder and those below it, links followed, but for what tools leave beside data.

    Raises:
        ValueError: If there are none, or they are several data sets that `datasets` saved.
    """
    files, hidden, seen = [], [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        hidden += [Path(root, name) for name in [*names, *folders] if name.startswith((".", "_"))]
        files += [Path(root, name) for name in names if not name.startswith((".", "_"))]
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
    if hidden:
        say(f"Left out, as their names begin with . or _: {len(hidden)}, such as {hidden[0]}")
    if not files:
        raise ValueError(f"{folder} holds no files.")
    if saved := [file.parent for file in files if file.name == SAVED and file.parent != folder]:
        raise ValueError(f"{folder} holds data sets that `datasets` saved. Name one of them, such as {saved[0]}.")
    return sorted(files)


def is_text(kind: pa.DataType) -> bool:
    """True for columns of text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def check_types(files: Sequence[File]) -> None:
    """Raise ValueError if files cannot be one table."""
    first = files[0]
    for file in files[1:]:
        if file.types != first.types:
            raise ValueError(
                f"{first.path} has columns {first.types}, and {file.path} has {file.types}. Bring them to the same "
                "types."
            )


def look_into(path: Path, columns: Columns) -> File:
    """Read the footer of a parquet file, which must have the columns."""
    try:
        with pq.ParquetFile(path) as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    check_schema(str(path), schema, columns)
    sizes = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return File(path, sizes, {name: str(schema.field(name).type) for name in (columns.id, *columns.others)})


def check_schema(name: str, schema: pa.Schema, columns: Columns) -> None:
    """Raise ValueError if a column is missing or of the wrong type."""
    options = {columns.text: "--text-column", columns.id: "--id-column"}
    for column in columns.all:
        if column not in schema.names:
            option = options.get(column, "--columns")
            raise ValueError(f"{name} has no column {column!r}. It has: {schema.names}. Name one of them: {option}.")
    if taken := {PART, VECTOR} & {columns.id, *columns.others}:
        raise ValueError(f"Columns of the output are called {PART!r} and {VECTOR!r}; rename {sorted(taken)[0]!r}.")
    if not is_text(schema.field(columns.text).type):
        raise ValueError(f"Column {columns.text!r} of {name} holds {schema.field(columns.text).type}, and not text.")
    kind = schema.field(columns.id).type
    if pa.types.is_string_view(kind) or not (is_text(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"Ids are text or integers, but column {columns.id!r} of {name} holds {kind}.")


def _copy(
    source: Source,
    files: Sequence[Path],
    columns: Columns,
    rows_per_part: int,
    folder: Path,
    say: Callable[[str], object],
) -> Path:
    """A parquet file of the columns of a data set, with row groups of one part; made once."""
    path = Path(source.name).resolve() if files else source.name
    name = hashlib.sha256(f"{path} {source.subset} {source.split} {columns}".encode()).hexdigest()[:16]
    stamp = " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    digest = hashlib.sha256(f"{stamp} {rows_per_part}".encode()).hexdigest().encode()
    copy = folder / f"{name}.parquet"
    if copy.exists():
        if (pq.read_schema(copy).metadata or {}).get(b"source") != digest:
            raise ValueError(
                f"{source.name} changed since this run began, or is cut into other parts. Choose another --output."
            )
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    writing = copy.with_suffix(".writing")
    try:
        with open_writer(writing) as write:
            for index, table in enumerate(read_tables(source, files, columns, rows_per_part)):
                if not index:
                    say(f"Copying {source.name} to {copy}")
                write(table, digest)
        if not writing.exists():
            raise ValueError(f"{source.name} has no rows (split {source.split!r}). Check how it was made.")
        writing.rename(copy)
    finally:
        writing.unlink(missing_ok=True)
    return copy


def read_tables(source: Source, files: Sequence[Path], columns: Columns, num_rows: int) -> Iterator[pa.Table]:
    """Tables of so many rows of any data set; the last may have fewer."""
    if len(files) == 1 and files[0].suffix == ".parquet":
        with pq.ParquetFile(files[0]) as opened:
            for batch in opened.iter_batches(num_rows, columns=columns.all):
                yield pa.Table.from_batches([batch])
        return
    from ..training.data import load_source  # which imports torch

    try:
        options: dict[str, Any] = {"subset": source.subset, "split": source.split, "token": source.token}
        rows = load_source(source.name, streaming=True, text_columns=(columns.id, columns.text), **options)
        for table in rows.with_format("arrow").iter(num_rows):
            check_schema(source.name, table.schema, columns)
            yield as_strings(table.select(columns.all))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source.name} cannot be read: {error}") from error
    except StopIteration:  # of `datasets`, which looks at the first row of an empty file
        return


def as_strings(table: pa.Table) -> pa.Table:
    """The table with one type for all columns of text, whoever read them."""
    fields = [field.with_type(pa.string()) if is_text(field.type) else field for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def check_cast(name: str, now: pa.DataType, first: pa.DataType) -> None:
    """Raise ValueError if values would come out as others, as ``"007"`` would as 7."""
    kinds = (is_text, pa.types.is_integer, pa.types.is_floating)
    if not (now == first or pa.types.is_null(now) or any(is_kind(now) and is_kind(first) for is_kind in kinds)):
        raise ValueError(f"Column {name!r} holds {first} first and {now} later. Bring all to the same type.")


@contextmanager
def open_writer(path: Path) -> Iterator[Callable[[pa.Table, bytes], None]]:
    """A function that writes one row group at a time, of the types of the first one."""
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table, digest: bytes) -> None:
        nonlocal writer
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema.with_metadata({"source": digest}))
        if table.schema.remove_metadata() != writer.schema.remove_metadata():
            for now, first in zip(table.schema, writer.schema, strict=True):
                check_cast(now.name, now.type, first.type)
            table = table.cast(writer.schema)
        writer.write_table(table.replace_schema_metadata(writer.schema.metadata), row_group_size=max(1, len(table)))

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


# --------------------------------------------------------------------------------------------------------------------
# Parts


def make_parts(files: Sequence[File], rows_per_part: int, limit: int | None) -> list[Part]:
    """Parts of files, in order: small row groups together, large ones in pieces, none beyond its file."""
    parts: list[Part] = []
    left = float("inf") if limit is None else limit
    for file in files:
        path = str(file.path.resolve())
        for group, num_groups, start, num_rows in cut_groups(file.sizes, rows_per_part):
            num_rows = int(min(num_rows, left))
            left -= num_rows
            if num_rows:
                parts.append(Part(len(parts), path, group, num_groups, start, num_rows))
    return parts


def cut_groups(sizes: Sequence[int], rows_per_part: int) -> Iterator[tuple[int, int, int, int]]:
    """First row group, number of them, first row and number of rows of each part of a file."""
    first, rows = 0, 0
    for group, size in enumerate(sizes):
        if rows and rows + size > rows_per_part:
            yield first, group - first, 0, rows
            first, rows = group, 0
        if size > rows_per_part:
            yield from ((group, 1, start, min(rows_per_part, size - start)) for start in range(0, size, rows_per_part))
            first, rows = group + 1, 0
        else:
            rows += size
    if rows:
        yield first, len(sizes) - first, 0, rows


def read_part(part: Part, columns: Sequence[str]) -> pa.Table:
    """The rows of a part.

    Raises:
        EncodeError: If they cannot be read.
    """
    groups = list(range(part.group, part.group + part.num_groups))
    try:
        with pq.ParquetFile(part.file) as file:
            table = file.read_row_groups(groups, columns=list(columns)).slice(part.start, part.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise EncodeError(
            f"{part.file}: row groups {groups[0]} to {groups[-1]} cannot be read "
            f"({' '.join(str(error).split())[:200]}). Put a whole file of as many rows in its place and run the same "
            "command, which goes on with what is left."
        ) from error
    if len(table) != part.num_rows:
        raise EncodeError(f"{part.file} changed: {len(table)} rows, and {part.num_rows} were planned.")
    return table


def spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most so many of some items, from the first to the last, as far from each other as can be."""
    places = np.linspace(0, len(items) - 1, min(num, len(items)))
    return [items[int(place)] for place in places]


def write_plan(path: Path, parts: Sequence[Part]) -> None:
    """Write parts as a whole, or not at all."""
    columns = zip(*parts, strict=True)
    writing = path.with_suffix(".writing")
    pq.write_table(pa.table(dict(zip(Part._fields, map(list, columns), strict=True))), writing)
    writing.rename(path)


def read_plan(path: Path) -> list[Part]:
    """What :func:`write_plan` wrote; nothing if there is no such file."""
    return [Part(**row) for row in pq.read_table(path).to_pylist()] if path.exists() else []


def extend_plan(known: Sequence[Part], found: Sequence[Part]) -> list[Part]:
    """Parts of a plan, and behind them those of files that it does not have.

    Raises:
        ValueError: If a file of the plan is cut otherwise now.
    """

    def by_file(parts: Sequence[Part]) -> dict[str, list[tuple[Any, ...]]]:
        files: dict[str, list[tuple[Any, ...]]] = {}
        for part in parts:
            files.setdefault(part.file, []).append(part[2:])
        return files

    there, now = by_file(known), by_file(found)
    for file in there.keys() & now.keys():
        if there[file] != now[file]:
            rows = [sum(part[-1] for part in parts) for parts in (there[file], now[file])]
            raise ValueError(
                f"{file} was planned with {rows[0]} rows in {len(there[file])} parts, and would be {rows[1]} in "
                f"{len(now[file])} now: the file, --limit or --rows-per-part changed. Choose another --output."
            )
    new = [part for part in found if part.file not in there]
    return [*known, *(part._replace(part=len(known) + index) for index, part in enumerate(new))]


# --------------------------------------------------------------------------------------------------------------------
# Ids


def read_ids(parts: Sequence[Part], column: str) -> Iterator[Any]:
    """Ids of the parts, a table at a time. Shapes: ``(N_i,)``"""
    for part in parts:
        values = read_part(part, [column])[column]
        if values.null_count:
            raise EncodeError(
                f"{part.file}: {values.null_count} of the rows of a part have no {column!r}. Give all one."
            )
        yield values.to_numpy()


def hash_ids(ids: Any) -> np.ndarray:
    """64 bits for each id. Shape: ``(N,)``"""
    return pd.util.hash_array(np.asarray(ids))


def hash_all(tables: Iterator[Any]) -> np.ndarray:
    """Sorted hashes of ids that come a table at a time; 8 bytes each is all that is held of them. Shape: ``(N,)``"""
    hashes = np.concatenate([np.zeros(0, np.uint64), *map(hash_ids, tables)])
    hashes.sort()
    return hashes


def find_repeated(read: Callable[[], Iterator[Any]]) -> list[Any]:
    """Ids that come more than once, the first thousand of them.

    Args:
        read: Gives ids a table at a time; called twice if some are found.
    """
    hashes = hash_all(read())
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:1000]
    if not len(suspects):
        return []
    counts: Counter[Any] = Counter()
    for ids in read():
        counts.update(np.asarray(ids)[np.isin(hash_ids(ids), suspects)].tolist())
    return [value for value, count in counts.items() if count > 1]
