"""What ships is what is tested: the wheel, away from the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT

FAST = (
    "test_location",
    "modeling/test_gem_mask",
    "modeling/test_gem_tokens",
    "modeling/test_gem_generator",
    "modeling/test_version_0_1",
    "losses/test_gem_loss",
    "evaluation/test_evaluators",
    "evaluation/test_baselines",
)
"""Tests that take seconds, and need nothing of the source but themselves."""


@pytest.mark.slow
def test_the_wheel_passes_tests_without_the_source(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gem_st", source / "gem_st", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, **run)
    shutil.rmtree(source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gem_st/")}
    assert files == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gem_st").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], **run)
    tests = tmp_path / "run" / "tests"
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    (tests / "test_location.py").write_text(
        f"import gem_st\n\ndef test_location():\n    assert gem_st.__file__.startswith({str(site)!r})\n"
    )
    selection = [str(tests / f"{name}.py") for name in FAST]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        cwd=tmp_path / "run",
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_in_checkpoints_is_one_wing_and_imports_only_what_sentence_transformers_brings():
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    folder = ROOT / "gem_st" / "modeling"
    entry, files = folder / "gem_transformer.py", {*folder.glob("gem_*.py")}
    assert {entry, *map(Path, get_relative_import_files(entry))} == files
    brought = {"torch", "transformers", "sentence_transformers", "safetensors", "typing_extensions"}
    for file in files:
        assert set(get_imports(file)) <= brought | sys.stdlib_module_names, file
