"""The Dockerfile: what it copies is there, what it names exists, and its health check tells.

`make test-docker` runs its steps.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from types import ModuleType

import pytest
from typer.main import get_command

from gem_st.cli import app
from gem_st.serving.run import ServeConfig

from ..conftest import ROOT
from .served import running, serving


@pytest.fixture(scope="module")
def dockerfile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dockerfile", ROOT / ".ci" / "dockerfile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(dockerfile) -> list[tuple[str, str]]:
    return dockerfile.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_instructions_are_read_as_docker_reads_them(dockerfile):
    text = "# note\nFROM a\n\nRUN one \\\n    && two\n# note\nrun three \\\n# within\n  four\n"
    assert dockerfile.instructions(text) == [("FROM", "a"), ("RUN", "one && two"), ("RUN", "three four")]


def test_the_last_pattern_that_fits_says_whether_a_path_is_left_out(dockerfile):
    patterns = ["*", "!gem_st", "!README.md", "**/__pycache__"]
    left = {"README.md": False, "gem_st": False, "gem_st/cli/serve.py": False, "gem_st/cli/__pycache__": True}
    left |= {"gem_st/__pycache__/a.pyc": True, "docs/README.md": True, ".git": True, "examples": True}
    assert {path: dockerfile.is_ignored(path, patterns) for path in left} == left


def test_everything_that_is_copied_is_there_and_nothing_else_is_sent(dockerfile):
    patterns = dockerfile.context_patterns()
    sources = {source for source, _ in dockerfile.copied()}
    assert {"gem_st", "pyproject.toml", "constraints.txt"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not dockerfile.is_ignored(source, patterns), source
    sent = {path.name for path in ROOT.iterdir() if not dockerfile.is_ignored(path.name, patterns)}
    assert sent == {source.partition("/")[0] for source in sources}


def test_what_is_installed_is_named_in_the_files(steps):
    commands = " ".join(rest for word, rest in steps if word == "RUN")
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', commands)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
    (pattern,) = re.findall(r"grep '(\S+)' constraints.txt", commands)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(re.findall(pattern + r"[\d.]+$", constraints, flags=re.MULTILINE)) == 1


def test_the_server_is_the_process_itself_and_has_no_rights(steps):
    words = dict(steps)
    entrypoint = json.loads(words["ENTRYPOINT"])  # a list, so that signals reach it
    command = get_command(app).commands["serve"]
    options = {name for parameter in command.params for name in parameter.opts}
    assert entrypoint[:2] == ["gem-st", "serve"]
    assert {part for part in entrypoint if part.startswith("-")} <= options
    assert entrypoint[entrypoint.index("--host") + 1] == "0.0.0.0"
    assert int(words["EXPOSE"]) == ServeConfig("any").port
    assert int(words["USER"]) > 0
    order = [word for word, _ in steps]
    assert "RUN" not in order[order.index("USER") :]


def check_health(steps: list[tuple[str, str]], port: int) -> int:
    """Exit status of the health check."""
    command = json.loads(dict(steps)["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[0] == "python"
    arguments = [argument.replace(f":{ServeConfig('any').port}/", f":{port}/") for argument in command[1:]]
    return subprocess.run([sys.executable, *arguments], capture_output=True).returncode


def test_health_is_told_from_loading_and_from_nothing(steps, make_served_model):
    release = threading.Event()
    with serving(make_served_model()) as served:
        assert check_health(steps, served.port) == 0
    assert check_health(steps, served.port) != 0

    def load() -> None:
        release.wait(60)
        raise ValueError("it was never to be loaded")

    with running(load) as loading:
        loading.server._on_failure = lambda _: None
        assert check_health(steps, loading.port) != 0
        release.set()


def test_the_commands_of_the_docs_fit_the_image(steps):
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (build,) = re.findall(r"^docker build -t (\S+) \.$", text, flags=re.MULTILINE)
    runs = re.findall(r"^docker run (.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert runs
    for run in runs:
        assert f" {build} /model" in run
        assert ":/model:ro" in run
        assert f":{dict(steps)['EXPOSE']} " in run
