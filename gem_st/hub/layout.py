"""What files of a checkpoint are called, and what is known of them."""

from __future__ import annotations

import re
from pathlib import Path

FORMATS = ("gem", "stock", "alora")

REFERENCE_FILES = ("gem_reference.json", "gem_reference.safetensors")

CARD = "README.md"

REFERENCE_TEXTS = [
    "",
    "A man is playing a guitar.",
    "The stock market fell by 3.5 % on Tuesday, its largest one-day loss since March.",
    "def add(a, b):\n    return a + b\n",
    "Der Zug in die Stadt hat Versp\u00e4tung. \u5217\u8f66\u665a\u70b9\u4e86\u3002 \u0645\u062a\u0623\u062e\u0631",
    "\U0001f682\U0001f327\ufe0f  two  spaces,\ttab,   end ",
    "Knead the dough well, let it rest for an hour, and bake it until the loaf sounds hollow. " * 12,
]

REFERENCE_PROMPT = "Once upon a time there was"

PLAIN_MODULES = r"sentence_transformers\.[\w.]+\.(Normalize|Dense|LayerNorm|Dropout)"
"""Modules that may stand behind a GEM module without trust: they load nothing but numbers."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.msgpack", "*.h5")

RELEASED_CODE = {
    "7ac3830fe66b0b7b516ee391c9091b93bb69aa98852729dd1732a086f96557ee": "0.1.0",
}
"""SHA-256 of the code that checkpoints of released versions carry, which is read without being asked for trust."""

LOADED_FILES = (
    *("*.py", "*config*.json", "modules.json", "base_fingerprint.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
)
"""Names of files that something may read when it loads a checkpoint; others may lie beside it."""

OWN_FILES = re.compile(
    r"(generation_|gem_|tokenizer_)?config\.json|config_sentence_transformers\.json|modules\.json|tokenizer\.json"
    r"|gem_st\.py|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja|gem_adapter/[\w.]+"
)
"""Files of a checkpoint that was pushed without a list of them."""


def list_files(folder: Path) -> list[str]:
    """Names of all files below a folder, hidden ones left out."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
