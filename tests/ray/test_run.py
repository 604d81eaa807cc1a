"""gem-st encode: Ray Data on this machine, actors and drivers that are killed, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError
from typer.testing import CliRunner

from gem_st import __version__, hub
from gem_st.cli import app
from gem_st.ray import EncodeConfig, EncodeError, encode, preview, verify
from gem_st.ray.cluster import SPARE_CPUS, default_actors, find_room, keep_quiet, num_threads
from gem_st.ray.config import VECTORS
from gem_st.ray.errors import first_error
from gem_st.ray.parts import read_plan
from gem_st.ray.run import done_parts, join_reports, make_note, make_plan, told_warnings, write_lance, write_plan
from gem_st.ray.settling import settle
from gem_st.ray.workers import PartEncoder, look_at

from ..conftest import ROOT
from ..snippets import run_snippet
from .conftest import make_texts

QUIET = {"say": lambda line: None, "shows_progress": False}
DRIVER = """
import os
from pathlib import Path
from gem_st.cli import app

Path("driver").write_text(str(os.getpid()))
app()
"""


@pytest.fixture
def config(checkpoint, corpus, tmp_path):
    """Function that makes settings of a run of 20 parts."""

    def make(**options) -> EncodeConfig:
        settings = {"checkpoint": checkpoint, "data": str(corpus), "output": tmp_path / "out", "rows_per_part": 16}
        return EncodeConfig(**{**settings, "num_actors": 1, "batch_tokens": 512, **options})

    return make


@pytest.fixture
def without_ray(monkeypatch):
    """Runs end before Ray is started: what is refused before needs none."""

    def fail(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("gem_st.ray.run.running_ray", fail)


@pytest.fixture
def without_actors(monkeypatch):
    """Runs end before their first part: what is refused before needs no Ray."""

    @contextlib.contextmanager
    def room(address, num_actors, gpus_per_actor):
        yield num_actors, 0.0

    def fail(*args, **kwargs):
        raise AssertionError("Parts were given to actors")

    def look(config, num_actors, share, texts, say):
        return look_at({**config.encoder_options(), "num_threads": num_threads(num_actors, None)}, texts)

    monkeypatch.setattr("gem_st.ray.run.running_ray", room)
    monkeypatch.setattr("gem_st.ray.run.look", look)
    monkeypatch.setattr("gem_st.ray.run.write_parts", fail)


@pytest.fixture
def environment(tmp_path):
    """Of a process, with nothing of this one's Ray."""
    return {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def rows_of(folder) -> pa.Table:
    return pq.read_table(folder / "vectors").sort_by("id")


def expected_rows(config) -> pa.Table:
    """What the parts give in this process, which is what an uninterrupted run writes."""
    encoder, plan = make_actor(config), pq.read_table(config.work / "plan.parquet")
    return pa.concat_tables([encoder(plan.slice(row, 1)) for row in range(len(plan))]).sort_by("id")


def make_actor(config, **changes) -> PartEncoder:
    """What a run hands the parts to, in this process."""
    note = make_note(config, read_plan(config.work / "plan.parquet")) | changes
    options = {**config.encoder_options(), "num_threads": num_threads(config.num_actors, None)}
    return PartEncoder(config.names.all, str(config.output), note, **options)


def workers_of(process: psutil.Process, title: str = "ray::") -> list[psutil.Process]:
    """Processes of tasks and actors below a driver, which have their name for a title; Ray's agents stay for longer."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            line = " ".join(child.cmdline())
            found += [child] if title in line and "Agent" not in line else []
    return found


# ---- runs that are cut off


def kill_driver(running, settings, folder, wanted: int) -> None:
    """Kill the process of a command with SIGKILL when so many parts are done."""
    while len(done_parts(settings.work / "done")) < wanted:
        assert not running.done(), running.result()
        time.sleep(0.02)
    driver = psutil.Process(int((folder / "driver").read_text()))
    (actor,) = workers_of(driver, "PartEncoder")
    workers = workers_of(driver)
    assert actor.nice() == driver.nice()
    driver.kill()
    assert running.result().returncode == -signal.SIGKILL
    assert not psutil.wait_procs([actor, *workers], timeout=30)[1]  # none of them writes any more


@contextlib.contextmanager
def killing_an_actor(settings, wanted: int) -> Iterator[list[int]]:
    """Kill the actor of this process when so many parts are done; gives its process id then."""
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.02)
            if len(done_parts(settings.work / "done")) >= wanted and (
                actors := workers_of(psutil.Process(), "PartEncoder")
            ):
                killed.append(actors[0].pid)
                actors[0].kill()

    thread = Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        if not killed:
            killed.append(0)  # which ends the thread
        thread.join()


def test_a_run_whose_driver_is_killed_twice_and_an_actor_once_gives_the_same_bits(
    started_ray, config, python, environment, tmp_path
):
    """And what goes with it: columns, the fingerprint, `verify`."""
    settings, done = config(columns=("year",)), set()
    (tmp_path / "driver.py").write_text(DRIVER)
    options = ["--rows-per-part", 16, "--num-actors", 1, "--batch-tokens", 512, "--columns", "year"]
    command = ["encode", settings.checkpoint, "--data", settings.data, "--output", settings.output, *options]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(python.run, "driver.py", *command, env=environment, cwd=tmp_path)
            kill_driver(running, settings, tmp_path, len(done) + 1)
        done = done_parts(settings.work / "done")
    assert 2 <= len(done) < 19
    with killing_an_actor(settings, len(done) + 1) as killed:
        result = encode(settings, **QUIET)
    assert killed != [0]
    assert (result.texts, result.vectors, result.new, result.cut) == (320, 320, 320 - 16 * len(done), 0)
    rows = rows_of(settings.output)
    assert len(rows["id"].unique()) == len(rows) == 320
    assert rows.equals(expected_rows(settings))
    assert rows.column_names == ["id", "year", "vector", "part"]
    plain = hub.load(settings.checkpoint).encode_document(make_texts(320))
    np.testing.assert_allclose(np.array(rows["vector"].to_pylist()), plain, rtol=1e-5, atol=1e-5)
    noted = json.loads((settings.output / "fingerprint.json").read_text())
    assert (noted["fingerprint"]["gem_st"], noted["fingerprint"]["dimension"]) == (__version__, 32)
    checked = verify(settings.output)
    assert checked.passed, checked


# ---- what is refused


@pytest.mark.usefixtures("without_actors")
def test_vectors_of_another_model_are_not_appended(config, make_model, tmp_path):
    options = {"limit": 16, "precision": "int8"}
    output = write_output(config(**options))
    before = rows_of(output)
    assert encode(config(**options), **QUIET).new == 0  # these are the same
    other = str(hub.export(make_model(freeze_base=True, num_gem_tokens=1), tmp_path / "other"))
    for changed, word in (
        ({"checkpoint": other}, "weights"),
        ({"precision": "float16"}, "precision 'int8' there, 'float16' now"),
        ({"truncate_dim": 8}, "dimension 32 there, 8 now"),
        ({"columns": ("year",)}, "columns"),
        ({"limit": 32}, "was planned with 16 rows in 1 parts, and would be 32 in 2 now"),
    ):
        with pytest.raises(ValueError, match=word):
            encode(config(**{**options, **changed}), **QUIET)
    assert rows_of(output).equals(before)


def test_an_actor_of_another_model_writes_nothing_beside_the_vectors(config, checkpoint, make_model, tmp_path):
    """The first one notes what they are of; one that is started later, on another machine say, compares."""
    settings = config(limit=32)
    output = write_output(settings)
    noted, plan = (output / "fingerprint.json").read_text(), pq.read_table(settings.work / "plan.parquet")
    shutil.rmtree(checkpoint)
    hub.export(make_model(freeze_base=True, num_gem_tokens=1), checkpoint)
    with pytest.raises(EncodeError, match=r"out: weights '\w+' there, '\w+' now.*choose another --output"):
        make_actor(settings)(plan.slice(1, 1))
    with pytest.raises(EncodeError, match=r"columns \{.*'others': \[\].* there, .*\['year'\].* now"):
        make_actor(config(limit=32, columns=("year",)))(plan.slice(1, 1))
    assert (output / "fingerprint.json").read_text() == noted


def test_two_first_actors_note_one_thing_and_the_other_is_refused(tmp_path, monkeypatch):
    """Whether or not the disk knows locks: one creates the file, and the other waits until it is whole."""
    facts, note = {"fingerprint": {"weights": "a"}}, {"columns": {}, "checkpoint": "here"}
    path = tmp_path / "fingerprint.json"
    path.touch()  # the other one is writing

    def finish() -> None:
        time.sleep(0.3)
        path.write_text(json.dumps({**note, "fingerprint": {"weights": "b"}}))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(finish)
        with pytest.raises(EncodeError, match=r"here does not give the vectors.*weights 'b' there, 'a' now"):
            settle(tmp_path, note, facts)
    path.unlink()
    settle(tmp_path, note, facts)
    settle(tmp_path, note, facts)
    assert json.loads(path.read_text()) == {**note, **facts}
    monkeypatch.setattr("gem_st.ray.settling.PATIENCE", 0.2)
    path.write_text("{")  # its process was killed
    with pytest.raises(ValueError, match=r"fingerprint\.json is not valid JSON"):
        settle(tmp_path, note, facts)


def test_what_loading_warns_of_is_said_once_since_workers_are_not_heard(config, make_model, tmp_path):
    make_model(freeze_base=True).save_pretrained(str(tmp_path / "saved"))
    settings, said = config(limit=32, checkpoint=str(tmp_path / "saved")), []
    write_output(settings)
    plan = pq.read_table(settings.work / "plan.parquet")
    with told_warnings(settings.work / "warnings", said.append):
        for row in range(2):
            make_actor(settings)(plan.slice(row, 1))
    (line,) = said
    assert "saved has no reference vectors" in line


def test_what_stops_an_actor_is_one_line(config, checkpoint, tmp_path):
    settings = config(limit=16)
    output = write_output(settings)
    plan = pq.read_table(settings.work / "plan.parquet")
    (tmp_path / "checkpoint" / "gem_adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(EncodeError, match=r"adapter_model\.safetensors.*damaged") as caught:
        make_actor(settings)(plan)
    assert "\n" not in str(caught.value)
    shutil.rmtree(output)
    with pytest.raises(EncodeError, match=r"out is not there on .*: all machines must see --output"):
        PartEncoder(["id"], str(output), {})(plan)


@pytest.mark.usefixtures("without_actors")
def test_a_run_that_ends_before_its_first_vector_leaves_nothing_behind(config, corpus, tmp_path):
    """Its checkpoint was refused, say: the next run is of what it is given then, with ranges of its own."""
    for num, source in ((16, pq.read_table(corpus)), (20, pq.read_table(corpus).slice(100))):
        pq.write_table(source.slice(0, num), tmp_path / f"{num}.parquet")
    ranges = []
    for num, options in ((16, {"precision": "int8"}), (20, {"precision": "int8"}), (20, {})):
        settings = config(data=str(tmp_path / f"{num}.parquet"), **options)
        with pytest.raises(AssertionError, match="Parts were given to actors"):
            encode(settings, **QUIET)
        assert {part.file for part in read_plan(settings.work / "plan.parquet")} == {settings.data}
        path = settings.output / "fingerprint.json"
        ranges.append(json.loads(path.read_text())["ranges"] if path.exists() else None)
        for done in ("done", "reports"):  # of vectors that somebody deleted
            (settings.work / done).mkdir(exist_ok=True)
            pq.write_table(pa.table({"part": [7]}), settings.work / done / "a.parquet")
        preview(settings, say=lambda line: None)
    assert ranges[0] != ranges[1]
    assert ranges[2] is None


@pytest.mark.usefixtures("without_ray")
def test_ids_that_come_twice_and_missing_columns_are_one_line_before_ray_starts(config, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    pq.write_table(pa.table({"id": ["a", "b", "a"], "text": ["a", "b", "c"]}), tmp_path / "twice.parquet")
    for args, message in (
        (
            ["--data", str(tmp_path / "twice.parquet")],
            "Column 'id' has ids that come more than once, 1 at least: ['a'].",
        ),
        (["--data", config().data, "--text-column", "body"], "has no column 'body'. It has: ['id', 'text', 'year']."),
        (["--data", config().data, "--precision", "int8", "--truncate-dim", "0"], "must be 1 or more"),
        (["--data", str(tmp_path / "gone.parquet")], "There is no file or folder"),
        ([], "Give CHECKPOINT, --data and --output"),
    ):
        command = ["encode", config().checkpoint, "--output", str(tmp_path / "out"), *args]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "vectors").exists()


@pytest.mark.usefixtures("without_ray")
def test_folders_that_would_be_taken_for_columns_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="take a folder 'group=1' for a column"):
        encode(config(output=tmp_path / "group=1" / "out"), **QUIET)


@pytest.mark.usefixtures("without_ray")
def test_vectors_without_their_plan_are_not_appended_to(config):
    output = write_output(config(limit=16))
    before = rows_of(output)
    shutil.rmtree(output / "work")
    with pytest.raises(ValueError, match=r"plan\.parquet is gone"):
        encode(config(limit=16), **QUIET)
    assert rows_of(output).equals(before)


@pytest.mark.usefixtures("without_actors")
def test_a_lance_data_set_that_is_there_gets_the_new_rows(config, corpus, monkeypatch):
    written = []
    monkeypatch.setattr("gem_st.ray.run.write_lance", written.append)
    monkeypatch.setattr("gem_st.ray.config.find_spec", lambda name: object())
    output = write_output(config(limit=16))
    encode(config(limit=16), **QUIET)
    assert not written
    (output / "vectors.lance").mkdir()
    encode(config(limit=16), **QUIET)
    assert written == [output]


def test_another_folder_knows_the_checkpoint_by_its_whole_path(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config(checkpoint="checkpoint").encoder_options()["checkpoint"] == str(tmp_path / "checkpoint")
    assert config(checkpoint="org/gem").encoder_options()["checkpoint"] == "org/gem"


@pytest.mark.usefixtures("without_ray")
def test_two_runs_do_not_write_to_one_folder(config):
    from filelock import FileLock

    settings = config()
    settings.work.mkdir(parents=True)
    with FileLock(str(settings.work / "lock")), pytest.raises(ValueError, match="Another run writes to"):
        encode(settings, **QUIET)


def test_lance_that_is_missing_names_its_pip_line(config, monkeypatch):
    monkeypatch.setattr("gem_st.ray.config.find_spec", lambda name: None if name == "lance" else object())
    with pytest.raises(ImportError, match=r"pip install 'gem-st\[lance\]'"):
        encode(config(format="lance"), **QUIET)


def test_actors_that_find_no_room_are_refused_and_do_not_wait():
    assert [default_actors(*given) for given in ((8, 1, 4), (8, 0.5, 4), (0, 0, 4), (0, 0, 0))] == [8, 16, 4, 1]
    assert find_room({"CPU": 5.0}, 2, None, is_local=True) == (2, 0.0)
    assert find_room({"CPU": 64.0, "GPU": 8.0}, None, None, is_local=False) == (8, 1.0)
    assert find_room({"CPU": 64.0, "GPU": 8.0}, None, 0.5, is_local=False) == (16, 0.5)
    with pytest.raises(ValueError, match=r"2 actors of 1 CPU and 0 GPUs.*do not fit into 2 CPUs.*would wait for ever"):
        find_room({"CPU": 2.0}, 2, None, is_local=False)
    with pytest.raises(ValueError, match="do not fit into 64 CPUs and 8 GPUs"):
        find_room({"CPU": 64.0, "GPU": 8.0}, 9, None, is_local=False)


def test_errors_of_actors_and_disks_are_found_in_what_ray_says():
    whole = OSError("Two lines:\nof one error.")
    assert first_error(RayTaskError("look_at", "Traceback ...", whole)) is whole
    text = "ray::E() (pid=1)\n  File 'x.py'\ngem_st.ray.encoder.EncodeError: Part 3: no.\n\nray.UserCodeException: UDF"
    assert isinstance(first_error(RuntimeError(text)), EncodeError)
    assert str(first_error(RuntimeError(text))) == "Part 3: no."
    caused = f"OSError: no page.\n\nThe above exception was the direct cause\n\nx.EncodeError: a.\n\n{text}"
    assert str(first_error(RuntimeError(caused))) == "Part 3: no."
    full = first_error(RuntimeError("OSError: [Errno 28] Error writing bytes. Detail: No space left on device"))
    assert isinstance(full, OSError)
    written = RayTaskError("write", "Traceback: No space left on device", OSError(errno.ENOSPC, "how to try again"))
    assert "The disk is full" in str(first_error(written))
    assert "The disk is full. What was written stays" in str(full)
    assert str(first_error(RuntimeError("KeyError: 'a'"))) == "KeyError: 'a'"


# ---- before and after


@pytest.mark.usefixtures("without_actors")
def test_a_dry_run_measures_a_sample_and_writes_no_vector(config):
    told = preview(config(num_actors=2), say=lambda line: None)
    assert (told["texts"], told["parts"], told["of which are done"]) == (320, 20, 0)
    assert told["hours"] == pytest.approx(320 / 2 / told["texts/s, one actor"] / 3600, abs=1e-3)
    assert not (config().output / "vectors").exists()


def test_verify_finds_what_is_twice_missing_not_finite_or_of_another_model(config, corpus, checkpoint, tmp_path):
    settings = config(rows_per_part=160)
    output = write_output(settings)
    assert verify(output).passed
    files = sorted((output / "vectors").glob("*.parquet"))
    whole = pq.read_table(files[0])

    def found(table: pa.Table, name: str) -> str:
        pq.write_table(table, files[0])
        (check,) = (check for check in verify(output).checks if check.name == name)
        assert check.passed is False
        return check.finding

    assert "several vectors: ['doc-0007']" in found(pa.concat_tables([whole, whole.slice(7, 1)]), "ids")
    assert "1 texts have no vector, ids ['doc-0000']" in found(whole.slice(1), "ids")
    values = np.array(whole["vector"].to_pylist(), np.float32)
    values[3, 5] = np.nan
    assert "1 are not finite or zero, ids ['doc-0003']" in found(with_vectors(whole, values), "vectors")
    swapped = np.array(whole["vector"].to_pylist(), np.float32)[::-1]
    assert "relative error" in found(with_vectors(whole, swapped), "sample")
    pq.write_table(whole, files[0])
    noted = json.loads((output / "fingerprint.json").read_text())
    noted["fingerprint"]["weights"] = "0" * 16
    (output / "fingerprint.json").write_text(json.dumps(noted))
    assert "weights '0000000000000000' there" in str(verify(output))
    files[0].write_bytes(b"half")
    assert "a run was cut off: 1 files cannot be read" in str(verify(output))
    with pytest.raises(ValueError, match="is no output of `gem-st encode`"):
        verify(tmp_path)


def write_output(settings: EncodeConfig):
    """The output of a run, without Ray."""
    _, plan = make_plan(settings, print)
    for folder in (settings.output / VECTORS, settings.work / "done"):
        folder.mkdir(parents=True)
    write_plan(settings.work / "plan.parquet", plan)
    encoder = make_actor(settings, **({"ranges": [[-1.0] * 32, [1.0] * 32]} if settings.precision == "int8" else {}))
    table = pq.read_table(settings.work / "plan.parquet")
    for row in range(len(plan)):
        pq.write_table(encoder(table.slice(row, 1)), settings.output / VECTORS / f"{row}.parquet")
        pq.write_table(pa.table({"part": [row]}), settings.work / "done" / f"{row}.parquet")
    join_reports(settings.work / "reports", settings.output / "report.jsonl")
    return settings.output


def with_vectors(table: pa.Table, values: np.ndarray) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return table.set_column(table.column_names.index("vector"), "vector", column)


def test_lance_has_the_rows_of_the_parquet_files(tmp_path):
    lance = pytest.importorskip("lance")
    (tmp_path / "vectors").mkdir()
    table = pa.table({"id": [1, 2], "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))})
    pq.write_table(table, tmp_path / "vectors" / "a.parquet")
    write_lance(tmp_path)
    write_lance(tmp_path)  # again, after more was appended
    assert lance.dataset(str(tmp_path / "vectors.lance")).to_table().equals(table)


@pytest.mark.parametrize(("engine", "index_from"), [("lancedb", 256), ("lancedb", 1000), ("faiss", 256)])
def test_the_example_searches_with_the_vectors_of_encode_query(
    config, python, environment, tmp_path, engine, index_from
):
    """In 320 vectors, with an index and without."""
    pytest.importorskip(engine)
    settings = config(columns=("text",), rows_per_part=160)
    output, text = write_output(settings), make_texts(320)[11]
    options = ["--engine", engine, "--num", 3, "--index-from", index_from]
    script = ROOT / "examples" / "search_corpus.py"
    done = python.run(script, settings.checkpoint, output, text, *options, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    model = hub.load(settings.checkpoint)
    cosines = model.similarity(model.encode_query(text), model.encode_document(make_texts(320)))[0]
    best = cosines.argsort(descending=True)[:3].tolist()
    assert [line.split()[1] for line in lines] == [f"doc-{place:04}" for place in best]
    assert float(lines[0].split()[0]) == pytest.approx(float(cosines[best[0]]), abs=2e-3)
    if engine == "lancedb":
        indices = list((output / "lancedb" / "corpus.lance").glob("_indices/*"))
        assert bool(indices) == (index_from <= 320)


def test_only_what_ray_data_writes_to_the_console_is_kept_quiet():
    import ray.data  # which makes its handlers

    logger, handler = logging.getLogger(ray.data.__name__), logging.StreamHandler()
    (console,) = [own for own in logger.handlers if own.name == "console"]
    before = console.level
    logger.addHandler(handler)
    try:
        console.setLevel(logging.INFO)
        keep_quiet()
        assert (handler.level, console.level) == (logging.NOTSET, logging.CRITICAL)
    finally:
        console.setLevel(before)
        logger.removeHandler(handler)


# ---- runs on the Ray of this process


def test_the_lines_of_the_page_embed_a_corpus(started_ray, checkpoint, corpus, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("ray.init", lambda **options: asked.update(options))
    paths = {"corpus.parquet": str(corpus), "runs/demo/frozen": checkpoint, '"vectors"': repr(str(tmp_path / "out"))}
    run_snippet("corpus.md", "From Python", {**paths, "(size=2)": "(size=1)"})
    assert asked["num_cpus"] == 2 + SPARE_CPUS
    found = pq.read_table(tmp_path / "out").sort_by("id")
    assert found["year"].to_pylist() == list(range(320))
    plain = hub.load(checkpoint).encode_document(make_texts(320))
    np.testing.assert_allclose(np.array(found["vector"].to_pylist()), plain, rtol=1e-5, atol=1e-5)


def test_a_damaged_row_group_stops_a_run_which_goes_on_when_it_is_whole(started_ray, config, corpus, tmp_path):
    """In int8, whose ranges stay those of the output; another file is there by then, and is appended."""
    data = tmp_path / "data"
    data.mkdir()
    content, chunk = corpus.read_bytes(), pq.read_metadata(corpus).row_group(17).column(1)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    size = chunk.total_compressed_size
    (data / "a.parquet").write_bytes(content[:begin] + b"\xff" * size + content[begin + size :])
    settings = config(data=str(data), precision="int8")
    with pytest.raises(EncodeError, match=r"Part 17: .*a\.parquet: row groups 17 to 17 cannot be read"):
        encode(settings, **QUIET)
    done, noted = done_parts(settings.work / "done"), (settings.output / "fingerprint.json").read_text()
    assert done
    assert 17 not in done
    failed = verify(settings.output)
    assert not failed.passed
    assert "no vector" in str(failed) or "cut off" in str(failed)
    (data / "a.parquet").write_bytes(content)
    pq.write_table(pa.table({"id": ["x", "y"], "text": ["a b c", None]}), data / "b.parquet")
    result = encode(settings, **QUIET)
    assert (result.texts, result.vectors, result.new) == (322, 321, 322 - 16 * len(done))
    assert result.without_vector == {"null": 1, "empty": 0}
    assert json.loads((settings.output / "report.jsonl").read_text()) == {"id": "y", "reason": "null"}
    assert (settings.output / "fingerprint.json").read_text() == noted
    rows = rows_of(settings.output)
    assert rows["vector"].type == pa.list_(pa.int8(), 32)
    assert rows.equals(expected_rows(settings))
    assert verify(settings.output).passed
