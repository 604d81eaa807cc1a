"""Module paths of version 0.1, which go on working for one release, with a DeprecationWarning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

_ROOMS = "mask cache text base tokens files adapter dtypes probes passes embedder generator sharding transformer"
_WING = [f"modeling.gem_{room}" for room in _ROOMS.split()]
MOVED: dict[str, Sequence[str]] = {
    "baselines": ["evaluation.baselines"],
    "data": ["training.data"],
    "dataset_checks": ["losses.dataset_checks"],
    "dry_run": ["training.preview"],
    "evaluate": ["evaluation.run"],
    "generation": ["evaluation.lm_eval_tasks"],
    "health": ["evaluation.health"],
    "model_card": ["cards.card_data", "finding"],
    "modeling_gem": [*_WING, "losses.next_token", "modeling.gem_checkpoint"],
    "mteb_meta": ["evaluation.mteb_entry"],
    "report": ["training.report", "training.measures"],
    "retention": ["evaluation.retention"],
    "rows": ["evaluation.local_files"],
    "scores": ["evaluation.results", "evaluation.render"],
    "scoring": ["evaluation.mteb_scores", "evaluation.identity"],
    "stock": ["hub.stock"],
    "suite": ["evaluation.suites"],
    "train": ["training.run"],
    "train_config": ["training.config"],
    "views": ["losses.rows"],
}
"""Where what was in a module is now."""


class MovedModules(MetaPathFinder, Loader):
    """Finds old modules, and fills them with what is in the new ones."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Spec of an old module; None for others."""
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self, origin=__file__) if package == "gem_st" and module in MOVED else None

    def get_code(self, name: str) -> CodeType:
        """What ``python -m`` runs of an old module."""
        place = MOVED[name.rpartition(".")[2]][0]
        return compile(f"import runpy; runpy.run_module('gem_st.{place}', run_name='__main__')", name, "exec")

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names."""
        places = MOVED[module.__name__.rpartition(".")[2]]
        new = " and ".join(f"gem_st.{place}" for place in places)
        warnings.warn(f"{module.__name__} has moved: import from {new}.", DeprecationWarning, stacklevel=2)
        for place in reversed(places):
            names = vars(import_module(f"gem_st.{place}"))
            vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
        if "require_gem" in vars(module):
            vars(module)["gem_of"] = vars(module)["require_gem"]
