"""Parts of a corpus: how files are cut, copied and read, and which ids come twice."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from gem_st.ray import EncodeError
from gem_st.ray import parts as parts_module
from gem_st.ray.parts import (
    Columns,
    Part,
    Source,
    check_cast,
    cut_groups,
    extend_plan,
    find_files,
    find_repeated,
    look_into,
    make_parts,
    read_ids,
    read_part,
    read_plan,
    spread,
    write_plan,
)

from ..hub.hub_server import HubServer
from .conftest import make_texts

NAMES = Columns("text", "id")


@pytest.fixture
def find(tmp_path):
    """Function that gives files of a corpus in parts of 10 rows, and their rows."""

    def run(source, columns=NAMES, split="train"):
        files = find_files(Source(str(source), split=split), columns, 10, tmp_path / "input", lambda line: None)
        parts = make_parts(files, 10, None)
        return [file.path for file in files], pa.concat_tables([read_part(part, columns.all) for part in parts])

    return run


def write(path, num=25, **options):
    table = pa.table({"id": list(range(num)), "text": make_texts(num), "more": ["x"] * num})
    pq.write_table(table, path, **options)
    return table


def test_small_row_groups_are_joined_and_large_ones_cut_but_never_both():
    assert list(cut_groups([4, 4, 4, 25, 3, 10, 2], 10)) == [
        (0, 2, 0, 8),
        (2, 1, 0, 4),
        (3, 1, 0, 10),
        (3, 1, 10, 10),
        (3, 1, 20, 5),
        (4, 1, 0, 3),
        (5, 1, 0, 10),
        (6, 1, 0, 2),
    ]
    assert list(cut_groups([], 10)) == []


def test_parquet_is_read_where_it_lies(tmp_path, find):
    table = write(tmp_path / "a.parquet", row_group_size=7)
    files, rows = find(tmp_path / "a.parquet")
    assert files == [tmp_path / "a.parquet"]
    assert rows.equals(table.select(["id", "text"]))


def test_large_row_groups_are_copied_into_small_ones(tmp_path, find):
    table = write(tmp_path / "a.parquet", num=100)
    files, rows = find(tmp_path / "a.parquet")
    assert files[0].parent == tmp_path / "input"
    assert pq.read_metadata(files[0]).num_row_groups == 10
    assert rows.equals(table.select(["id", "text"]).replace_schema_metadata(rows.schema.metadata))


def test_jsonl_csv_and_folders_are_copied_once(tmp_path, find):
    rows = [{"id": f"a{index}", "text": text} for index, text in enumerate(make_texts(25))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.jsonl").write_text(lines)
    for source in ("a.jsonl", "b.jsonl.gz", "c.csv", "folder"):
        files, table = find(tmp_path / source)
        assert table.select(["id", "text"]).to_pylist() == rows, source
    before = files[0].stat().st_mtime_ns
    assert find(tmp_path / "folder")[0][0].stat().st_mtime_ns == before


def test_a_data_set_that_is_saved_on_this_machine(tmp_path, find):
    Dataset.from_dict({"id": list(range(25)), "text": make_texts(25)}).save_to_disk(tmp_path / "saved")
    _, table = find(tmp_path / "saved")
    assert table["text"].to_pylist() == make_texts(25)


def test_a_private_data_set_of_the_hub_is_read_with_the_token(python, tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", num=5)
    (tmp_path / "read.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom gem_st.ray.parts import Columns, Source, find_files\n"
        "source = Source('acme/corpus', sys.argv[1], 'test', sys.argv[2] if sys.argv[2:] else None)\n"
        "print(find_files(source, Columns('text', 'id'), 10, Path('input'), lambda line: None)[0].path)"
    )
    with HubServer({"hf_reader": ("alice", "read")}, orgs={"acme": ["alice"]}) as server:
        names = {"a/train-0.parquet": "a.parquet", "b/train-0.parquet": "a.parquet", "b/test-0.parquet": "b.parquet"}
        files = {there: (tmp_path / here).read_bytes() for there, here in names.items()}
        card = "---\nconfigs:\n" + "".join(f"- {{config_name: {name}, data_dir: {name}}}\n" for name in "ab") + "---\n"
        server.seed("datasets/acme/corpus", {**files, "README.md": card.encode()}, private=True)
        env = server.env(tmp_path / "hf")
        refused, read = (python.run("read.py", "b", *token, env=env, cwd=tmp_path) for token in ([], ["hf_reader"]))
    assert read.returncode == 0, read.stderr
    table = pq.read_table(tmp_path / read.stdout.strip())
    assert table["text"].to_pylist() == make_texts(5)
    assert "'acme/corpus' cannot be read as a data set of the Hub" in refused.stderr


def test_a_folder_is_all_of_its_files(tmp_path, find):
    """Names such as train and test, and files of several kinds, do not choose among them."""
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for index, name in enumerate(["train.jsonl", "wiki.jsonl", "test.jsonl"]):
        (folder / name).write_text(json.dumps({"id": f"{index}", "text": "a"}) + "\n")
    (folder / "more.csv").write_text("id,text\n3,b\n")
    pq.write_table(pa.table({"id": ["4"], "text": ["c"]}), elsewhere / "a.parquet")
    pq.write_table(pa.table({"id": ["5"], "text": ["c"]}), folder / "b.PARQUET")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    _, table = find(folder)
    assert sorted(table["id"].to_pylist()) == ["0", "1", "2", "3", "4", "5"]
    (folder / "NOTES.md").write_text("What this is.")
    with pytest.raises(ValueError, match=r"NOTES\.md' is of no kind that can be read"):
        find(folder)


def test_ids_and_texts_of_csv_are_what_stands_there(tmp_path, find):
    (tmp_path / "a.csv").write_text("id,text\n0071,NA\n2024-01-01,12\n")
    _, table = find(tmp_path / "a.csv")
    assert table.to_pylist() == [{"id": "0071", "text": "NA"}, {"id": "2024-01-01", "text": "12"}]


def test_files_of_different_types_are_refused(tmp_path, find):
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["1"], "text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has columns \{'id': 'int64'\}, and .*b\.parquet has .*string"):
        find(tmp_path)
    check_cast("id", pa.int32(), pa.int64())
    check_cast("id", pa.null(), pa.string())
    with pytest.raises(ValueError, match="Column 'id' holds int64 first and string later"):
        check_cast("id", pa.string(), pa.int64())


def test_local_data_has_no_subsets_splits_or_saved_data_sets_inside(tmp_path, find):
    write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="without subsets and splits"):
        find(tmp_path / "a.parquet", split="test")
    Dataset.from_dict({"id": [1], "text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"Name one of them, such as .*saved\."):
        find(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        find(tmp_path / "empty")


def test_what_is_spread_reaches_from_the_first_to_the_last():
    assert spread(range(15), 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread(range(3), 8) == [0, 1, 2]
    assert spread([], 8) == []


def test_a_folder_of_parquet_leaves_hidden_files_out(tmp_path, find):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    write(folder / "a.parquet", 5)
    write(folder / "b" / "c.parquet", 5)
    (folder / "_SUCCESS").touch()
    files, _ = find(folder)
    assert files == [folder / "a.parquet", folder / "b" / "c.parquet"]


def test_data_that_changed_after_it_was_copied_is_refused(tmp_path, find):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n')
    find(path)
    path.write_text('{"id": 1, "text": "another"}\n')
    with pytest.raises(ValueError, match="changed since this run began"):
        find(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns("body", "id"),
            r"no column 'body'\. It has: \['id', 'text', 'more'\]\. Name one of them: --text-column",
        ),
        (Columns("text", "key"), "no column 'key'.*--id-column"),
        (Columns("text", "id", ("year",)), "no column 'year'.*--columns"),
        (Columns("id", "text"), "Column 'id' of .* holds int64, and not text"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_are_checked_before_anything_is_read(tmp_path, find, columns, message, kind):
    table = write(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    with pytest.raises(ValueError, match=message):
        find(tmp_path / f"a.{kind}", columns)
    assert not list((tmp_path / "input").glob("*"))


def test_what_is_not_there_or_empty(tmp_path, find):
    with pytest.raises(ValueError, match="no file or folder"):
        find(tmp_path / "nothing.parquet")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        find(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        find(tmp_path / "a.jsonl")


def test_a_limit_ends_within_a_part(tmp_path):
    write(tmp_path / "a.parquet", row_group_size=7)
    write(tmp_path / "b.parquet", row_group_size=7)
    found = make_parts([look_into(tmp_path / f"{name}.parquet", NAMES) for name in "ab"], 10, 28)
    assert [part[2:] for part in found] == [(0, 1, 0, 7), (1, 1, 0, 7), (2, 1, 0, 7), (3, 1, 0, 4), (0, 1, 0, 3)]
    assert [part.part for part in found] == [0, 1, 2, 3, 4]


def test_a_row_group_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, row_group_size=5)
    chunk = pq.read_metadata(path).row_group(3).column(1)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(content))
    parts = make_parts([look_into(path, NAMES)], 5, None)
    assert len(read_part(parts[2], ["id", "text"])) == 5
    with pytest.raises(EncodeError, match=re.escape(f"{path}: row groups 3 to 3 cannot be read")):
        read_part(parts[3], ["id", "text"])


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = [Part(0, "a", 0, 2, 0, 8), Part(1, "b", 2, 1, 5, 4)]
    write_plan(tmp_path / "plan.parquet", plan)
    assert read_plan(tmp_path / "plan.parquet") == plan
    assert read_plan(tmp_path / "none.parquet") == []


def test_files_that_are_new_come_behind_those_of_a_plan():
    known = [Part(0, "b", 0, 1, 0, 8), Part(1, "b", 1, 1, 0, 4)]
    found = [Part(0, "a", 0, 1, 0, 3), Part(1, "b", 0, 1, 0, 8), Part(2, "b", 1, 1, 0, 4)]
    assert extend_plan(known, found) == [*known, Part(2, "a", 0, 1, 0, 3)]
    assert extend_plan(known, found[:1]) == [*known, Part(2, "a", 0, 1, 0, 3)]  # another corpus is appended
    with pytest.raises(ValueError, match="b was planned with 12 rows in 2 parts, and would be 8 in 1 now"):
        extend_plan(known, found[:2])


@pytest.mark.parametrize("values", [[3, 1, 2, 1, 5, 3], ["c", "a", "b", "a", "e", "c"]])
def test_ids_that_come_twice_are_found_across_tables(values):
    def read():
        yield np.array(values[:3], dtype=object if isinstance(values[0], str) else None)
        yield np.array(values[3:], dtype=object if isinstance(values[0], str) else None)

    assert sorted(find_repeated(read)) == [values[1], values[0]]
    assert find_repeated(lambda: iter([np.array(values[:3])])) == []


def test_ids_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(parts_module, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    assert find_repeated(lambda: iter([np.array([1, 2, 3])])) == []
    assert find_repeated(lambda: iter([np.array([1, 2, 1])])) == [1]


def test_a_row_without_an_id_is_refused(tmp_path):
    pq.write_table(pa.table({"id": [1, None], "text": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(EncodeError, match="1 of the rows of a part have no 'id'"):
        list(read_ids(make_parts([look_into(tmp_path / "a.parquet", NAMES)], 10, None), "id"))
