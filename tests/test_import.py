"""What is imported when: `gem-st --help` answers without torch, and a public name is the same by every road to it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gem_st

PACKAGE = Path(gem_st.__file__).parents[1]
HEAVY = {"torch", "transformers", "sentence_transformers"}
RUN = f"""
import sys
from gem_st.cli import app
try:
    app(sys.argv[1:])
finally:
    print("imported:", *sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)
"""
ROADS = """
import pickle, sys
from gem_st import GemTransformer
assert GemTransformer.__module__ == "gem_st"
assert pickle.loads(pickle.dumps(GemTransformer)) is GemTransformer
import gem_st
assert gem_st.GemTransformer is GemTransformer
assert gem_st.losses is sys.modules["gem_st.losses"]  # a module that was not named before
names = {}
exec("from gem_st import *", names)
assert names.keys() >= set(gem_st.__all__)
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, which has imported nothing."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", ["--help", "--version", "train --help", "eval --help", "verify --help", "encode --help"]
)
def test_help_and_version_answer_without_torch(command):
    done = run_python(RUN, *command.split())
    assert done.returncode == 0, done.stderr
    assert ("--mode" in done.stdout) == (command == "train --help")
    assert done.stderr.strip() == "imported:"


def test_importing_the_package_imports_no_torch():
    done = run_python(f"import sys, gem_st\ndir(gem_st)\nprint(sorted({HEAVY} & sys.modules.keys()))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_run_of_a_corpus_imports_no_torch_which_its_actors_import_meanwhile():
    done = run_python(f"import sys, gem_st.ray.run\nprint(sorted({HEAVY} & sys.modules.keys()))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_packages_that_are_not_used_keep_quiet():
    code = "import gem_st\nprint(gem_st.GemLoss.__name__)\nimport peft"
    done = run_python(code)
    assert (done.stdout.strip(), done.stderr) == ("GemLoss", "")


def test_public_names_are_all_there():
    assert set(gem_st.__all__) == {"__version__", *(name for names in gem_st._MODULES.values() for name in names)}
    assert set(dir(gem_st)) >= set(gem_st.__all__)
    for module, names in gem_st._MODULES.items():
        for name in names:
            assert getattr(gem_st, name) is getattr(import_module(f"gem_st.{module}"), name)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'gem_st' has no attribute 'GemTransfomer'"):
        gem_st.GemTransfomer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GemTransfomer'"):
        from gem_st import GemTransfomer  # noqa: F401


def test_the_class_has_one_name_by_every_road(python, tmp_path):
    (tmp_path / "roads.py").write_text(ROADS)
    done = python.run("roads.py", env={**os.environ, "PYTHONPATH": str(PACKAGE), "HF_HOME": "hf"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
