"""The constraints file, the page of what was tested, and the versions that an error recommends belong together."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType
from xml.etree import ElementTree

import pytest

from gem_st.modeling.gem_adapter import TESTED_TOGETHER
from gem_st.modeling.gem_checkpoint import REQUIREMENTS

from .conftest import ROOT


@pytest.fixture
def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_constraints_name_one_version_of_everything_that_is_needed(versions):
    constraints = versions.constrained()
    wanted = re.findall(r'"([\w-]+)(?:\[\w+\])?(?:[>!=<]=|")', (ROOT / "pyproject.toml").read_text())
    needed = {name for name in wanted if name in versions.installed()}
    assert {"torch", "transformers", "peft", "setuptools", "pytest", "lm-eval"} <= needed
    assert needed <= constraints.keys()
    assert "gem-st" not in constraints


def test_what_an_error_recommends_is_what_was_tested(versions):
    constraints = versions.constrained()
    assert {name: constraints[name] for name in TESTED_TOGETHER} == TESTED_TOGETHER


def test_the_page_is_made_of_the_runs_and_has_one_of_the_constraints(versions):
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == versions.page() + "\n"
    runs = [json.loads(line) for line in versions.RUNS.read_text().splitlines()]
    constraints = versions.constrained()
    passed = [run for run in runs if run["failed"] == 0]
    assert any(all(run[name] == constraints[name] for name in ("torch", "transformers", "peft")) for run in passed)


def test_floors_are_those_of_the_package(versions):
    floors = dict(re.findall(r"([\w-]+)~=([\d.]+)", versions.floors()))
    for name, low in REQUIREMENTS.items():
        assert floors[name].removesuffix(".0") == low.removeprefix(">=")
    entry = (ROOT / "gem_st" / "modeling" / "gem_transformer.py").read_text(encoding="utf-8")
    wanted = " ".join(f"'{name}{low}'" for name, low in REQUIREMENTS.items())
    assert f'wanted = "{wanted}"' in entry  # which can import nothing before it has looked


def test_a_run_is_noted_with_its_counts(versions, tmp_path, monkeypatch):
    suite = ElementTree.Element("testsuite", tests="12", failures="2", errors="1", skipped="3")
    junit = tmp_path / "junit.xml"
    ElementTree.ElementTree(suite).write(junit)
    monkeypatch.setattr(versions, "RUNS", tmp_path / "runs.jsonl")
    versions.record(junit)
    (run,) = (json.loads(line) for line in versions.RUNS.read_text().splitlines())
    assert (run["passed"], run["failed"], run["skipped"]) == (6, 3, 3)
    assert run["torch"] == versions.installed()["torch"]
    row = versions.page().splitlines()[-1]
    assert f"| {run['transformers']} |" in row
    assert row.endswith("| 6 | 3 | 3 |")


def test_other_versions_than_those_of_the_file_are_listed(versions, monkeypatch):
    monkeypatch.setattr(versions, "constrained", lambda: {**versions.installed(), "torch": "0.1", "gone": "1.0"})
    lines = versions.diff().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["gone", "1.0"], ["torch", "0.1"]]
    monkeypatch.setattr(versions, "constrained", versions.installed)
    assert versions.diff() == "As in constraints.txt."
