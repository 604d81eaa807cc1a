"""The house: what may import what, and how large a room may be."""

from __future__ import annotations

import ast
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
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
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
