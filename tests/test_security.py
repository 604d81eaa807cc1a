"""What our own code may not do: run data, start shells, reach the network, or trust on somebody's behalf."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT

SOURCES = sorted((ROOT / "gem_st").rglob("*.py"))
TRAVELLING = sorted((ROOT / "gem_st/modeling").glob("gem_*.py"))
RUNS_DATA = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "ctypes", "code", "runpy"}
REACHES_OUT = {"socket", "http", "urllib", "requests", "httpx", "ftplib", "subprocess", "multiprocessing", "asyncio"}
LISTENS = {"uvicorn", "fastapi", "starlette"}
BUILT_IN = {"eval", "exec", "__import__"}
MAY_START_PROCESSES = {"hub/verifying.py"}
"""It loads a checkpoint in a process in which gem_st cannot be imported."""
MAY_CALL_C = {"serving/run.py"}
"""It tells glibc how memory is kept."""
MAY_WAIT = {"serving/app.py", "serving/chat.py", "serving/engine.py"}
"""They have requests wait for the inference thread."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "gem_st"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that are imported, also by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert node.args
            yield node.args[0].value.partition(".")[0] if isinstance(node.args[0], ast.Constant) else "..."


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_data(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert RUNS_DATA & {*imports(tree)} == ({"ctypes"} if name_of(path) in MAY_CALL_C else set())
    for name, call in calls(tree):
        assert name not in BUILT_IN
        assert "allow_pickle" not in {keyword.arg for keyword in call.keywords}
        if name == "torch.load":
            options = {keyword.arg: keyword.value.value for keyword in call.keywords if keyword.arg == "weights_only"}
            assert options == {"weights_only": True}
        if name.startswith("yaml."):
            assert name == "yaml.dump" or "Loader" in {keyword.arg for keyword in call.keywords} or "safe" in name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_reaches_out(path):
    found = REACHES_OUT & {*imports(ast.parse(path.read_text(encoding="utf-8")))}
    name = name_of(path)
    assert found == ({"subprocess"} if name in MAY_START_PROCESSES else {"asyncio"} if name in MAY_WAIT else set())


def test_who_listens_to_the_network():
    listening = {name_of(path) for path in SOURCES if LISTENS & {*imports(ast.parse(path.read_text(encoding="utf-8")))}}
    assert {name.partition("/")[0] for name in listening} == {"serving"}


@pytest.mark.parametrize("path", TRAVELLING, ids=name_of)
def test_what_travels_imports_what_it_needs_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    needed = {
        "torch",
        "transformers",
        "sentence_transformers",
        "safetensors",
        "peft",
        "accelerate",
        "deepspeed",
        "gguf",
    }
    standard = {"__future__", "collections", "contextlib", "copy", "dataclasses", "functools", "hashlib", "importlib"}
    standard |= {
        "contextvars",
        "inspect",
        "itertools",
        "json",
        "logging",
        "math",
        "mmap",
        "operator",
        "os",
        "pathlib",
        "re",
        "shutil",
        "tempfile",
        "time",
    }
    assert {*imports(tree)} <= needed | standard | {"typing", "typing_extensions", "threading", "weakref"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_is_trusted_on_the_users_behalf(path):
    trusting = [
        ast.unparse(call)
        for _, call in calls(ast.parse(path.read_text(encoding="utf-8")))
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant) and keyword.value.value
    ]
    assert not trusting
