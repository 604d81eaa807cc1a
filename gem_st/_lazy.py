"""Names of a package that are imported when they are asked for, as torch and transformers take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, names: Mapping[str, Collection[str]]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package.

    Args:
        package: Its ``__name__``.
        names: What is to be had of which module of gem_st; an empty collection is the module itself.
    """

    def get(name: str) -> Any:
        for module, wanted in names.items():
            if name in wanted:
                found = getattr(import_module(f"gem_st.{module}"), name)
                return vars(sys.modules[package]).setdefault(name, found)
            if not wanted and name == module:
                return import_module(f"gem_st.{module}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
