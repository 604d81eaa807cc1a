"""The house: what may import what, and how large a room may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gem_st"
MODELING = PACKAGE / "modeling"


def module_of(path: Path) -> str:
    """Dotted name of a file, without ``gem_st``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, *, lazy: bool = False) -> set[str]:
    """Modules of gem_st that a file imports when it is imported; with ``lazy``, those within functions too."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if lazy else list(top_level(tree))
    package = list(path.relative_to(PACKAGE).parent.parts)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*names, alias.name]) for alias in node.names} | {".".join(names)}
    return found


def top_level(tree: ast.AST):
    """Statements that run on import, without those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        is_typing = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if not (is_typing or isinstance(node, ast.FunctionDef)):
            yield node
            yield from top_level(node)


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}
GRAPH = {name: imports_of(path) & FILES.keys() - {name, ""} for name, path in FILES.items()}


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


WINGS = ("modeling", "cards", "losses", "training", "hub", "evaluation", "serving", "ray", "cli")
"""From the ground up. Files that lie in no wing are below all but the first."""


def test_no_wing_imports_from_one_above_it():
    for name, path in FILES.items():
        wing = name.partition(".")[0]
        for other in imports_of(path, lazy=True) & FILES.keys():
            target = other.partition(".")[0]
            if wing in WINGS and target in WINGS:
                assert WINGS.index(target) <= WINGS.index(wing), f"{name} imports {other}"
            elif target in WINGS and name not in ("", "__init__", "_moved"):
                assert target == "modeling", f"{name}, on the ground floor, imports {other}"


def test_the_server_is_imported_by_its_command_only():
    for name, path in FILES.items():
        others = {other for other in imports_of(path, lazy=True) if other.startswith("serving")}
        assert not others or name.startswith("serving") or name == "cli.serve", name
    touching = [name for name, path in FILES.items() if "transformers.cli" in path.read_text(encoding="utf-8")]
    assert touching == ["serving.chat"]


def test_old_paths_go_on_with_a_warning():
    code = """
import sys, warnings
warnings.simplefilter("error", DeprecationWarning)
import gem_st._moved
for old, places in gem_st._moved.MOVED.items():
    try:
        __import__(f"gem_st.{old}")
    except DeprecationWarning as warning:
        assert f"gem_st.{places[0]}" in str(warning), warning
    else:
        sys.exit(f"{old}: no warning")
warnings.simplefilter("ignore", DeprecationWarning)
from gem_st.modeling_gem import GemTransformer, gem_segments, next_token_loss
from gem_st.model_card import GemModelCardData, gem_of
from gem_st.views import split_rows
import gem_st
assert gem_st.GemTransformer is GemTransformer
assert gem_st.evaluate.evaluate
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_what_travels_imports_nothing_that_does_not():
    for path in MODELING.glob("gem_*.py"):
        assert all(name.startswith("modeling") for name in imports_of(path, lazy=True)), path.name


@pytest.mark.parametrize("path", sorted(MODELING.glob("*.py")), ids=lambda path: path.stem)
def test_rooms_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 300, node.name


def test_the_list_of_files_is_the_tree_in_the_order_in_which_files_build_on_each_other():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", text, flags=re.MULTILINE))
    docs = {
        path.relative_to(PACKAGE).as_posix(): (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        for path in FILES.values()
    }
    assert listed == {name: doc.splitlines()[0] for name, doc in docs.items() if doc}
    order = [module_of(PACKAGE / name) for name in listed]
    for index, name in enumerate(order):
        assert not GRAPH[name] & {*order[index:]}, name
