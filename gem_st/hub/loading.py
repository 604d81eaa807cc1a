"""Reading checkpoints of a folder or the Hub, without running code that is not ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from sentence_transformers import SentenceTransformer

from .._version import __version__
from ..files import hash_file, read_json
from ..modeling import gem_transformer
from ..modeling.gem_checkpoint import CODE_FILE, CODE_NAME, hash_code, hash_files
from ..modeling.gem_settings import NOT_COMPLETE, UNFINISHED
from .errors import check_id, translate_hub_errors
from .layout import PLAIN_MODULES, REFERENCE_FILES, RELEASED_CODE
from .stock import STOCK_FOLDER

ADVICE = "Read it, then pass trust_remote_code=True (--trust-remote-code) to run it"


def fetch(path_or_repo: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path | None:
    """One file of a folder or a repository; None if it has none of that name."""
    if Path(path_or_repo).is_dir():
        path = Path(path_or_repo) / name
        return path if path.exists() else None
    try:
        return Path(hf_hub_download(check_id(path_or_repo), name, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None


def known_code() -> dict[str, str]:
    """SHA-256 of the code that checkpoints carry, and the version it is of: released ones, and the installed."""
    return {**RELEASED_CODE, hash_files(hash_code(gem_transformer.__file__)): __version__}


def hash_code_of(fetch: Callable[[str], Path | None]) -> str | None:
    """SHA-256 of the code that a checkpoint says it runs; None if some of it is missing."""
    config = fetch("gem_config.json")
    named = (read_json(config).get("remote_code") if config else None) or {CODE_FILE: ""}
    if not isinstance(named, dict) or CODE_FILE not in named:
        return None
    paths = {name: fetch(name) if CODE_NAME.fullmatch(name) else None for name in named}
    if any(path is None for path in paths.values()):
        return None
    return hash_files({name: hash_file(path) for name, path in paths.items() if path})


def find_foreign_code(fetch: Callable[[str], Path | None]) -> str | None:
    """What code a checkpoint would run that is not the installed gem_st's; None if there is none.

    The base's own code is never run without trust: see :func:`untrusted`.

    Args:
        fetch: Gives the path of a file by its name.
    """
    digest, modules = hash_code_of(fetch), fetch("modules.json")
    if digest is None or modules is None:
        return "its code or modules.json is missing"
    if digest not in known_code():
        return f"not that of gem_st {__version__}, SHA-256 {digest}"
    first, *others = ((module["type"], module["path"]) for module in read_json(modules))
    if first[1] == UNFINISHED:
        raise ValueError(NOT_COMPLETE.format("The checkpoint"))
    foreign = [name for name, _ in others if not re.fullmatch(PLAIN_MODULES, name)]
    foreign += [first[0]] if first != ("gem_st.GemTransformer", "") else []
    return f"modules.json names {foreign}" if foreign else None


def untrusted(trust_remote_code: bool) -> dict[str, dict[str, bool]]:
    """Arguments with which a checkpoint's own module is run, and nothing else that the base may bring."""
    names = () if trust_remote_code else ("model_kwargs", "processor_kwargs", "config_kwargs")
    return {name: {"trust_remote_code": False} for name in names}


def info(path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """Settings of a checkpoint, read from its small files only; no code of it runs.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.

    Returns:
        ``mode``, ``num_gem_tokens``, ``embedding_dimension``, ``base_model`` and the like, by name.

    Raises:
        ValueError: If there is no GEM checkpoint.
        OSError: If a repository cannot be reached.
    """

    def read(name: str) -> dict[str, Any]:
        path = fetch(path_or_repo, name, revision, token)
        return read_json(path) if path else {}

    with translate_hub_errors(str(path_or_repo)):
        settings, reference = read("gem_config.json"), read(REFERENCE_FILES[0])
        if not settings and not reference:
            raise ValueError(f"{path_or_repo} is not a GEM checkpoint: it has no gem_config.json.")
        config, model_config = read("config.json"), read("config_sentence_transformers.json")
        stock = {} if settings else read(f"{STOCK_FOLDER}/sentence_bert_config.json")
    width, num_gem_tokens = config.get("hidden_size"), settings.get("num_gem_tokens", 1)
    factor = num_gem_tokens if settings.get("pooling") == "concat" else 1
    mode = "stock" if not settings else "frozen" if settings.get("freeze_base") else "full"
    return {
        "source": str(path_or_repo),
        "mode": mode if settings.get("save_base", True) else f"{mode}, adapter only",
        "architecture": (config.get("architectures") or [None])[0],
        "num_gem_tokens": num_gem_tokens,
        "pooling": settings.get("pooling", "lasttoken"),
        "embedding_dimension": width * factor if width else None,
        "max_seq_length": settings.get("max_seq_length", stock.get("max_seq_length")),
        "gem_token_ids": settings.get("gem_token_ids") or reference.get("gem_token_ids"),
        "base_model": settings.get("base_model_name_or_path"),
        "base_model_revision": settings.get("base_model_revision"),
        "prompts": {name: text for name, text in model_config.get("prompts", {}).items() if text},
        "requirements": model_config.get("requirements"),
        "remote_code_sha256": settings.get("remote_code_sha256"),
        "has_reference": bool(reference),
        "versions": reference.get("versions") or model_config.get("__version__"),
    }


def is_gem(path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """True if there is a GEM checkpoint, of other than stock modules.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.

    Raises:
        OSError: If it is not there, or cannot be reached.
    """
    with translate_hub_errors(str(path_or_repo)):
        return fetch(path_or_repo, "gem_st.py", revision, token) is not None


def read_card(
    path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> ModelCard | None:
    """Model card of a folder or a repository; None if it has none.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
    """
    path = fetch(path_or_repo, "README.md", revision, token)
    return None if path is None else ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> SentenceTransformer:
    """Load a checkpoint, running its own code only if that is trusted.

    Without trust, a checkpoint whose code is that of this or a released gem_st is read by the installed classes.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        trust_remote_code: Run the code that the checkpoint carries.
        **kwargs: Passed to SentenceTransformer, e.g. ``device``.

    Raises:
        ValueError: If there is no GEM checkpoint, or its code is not trusted.
        OSError: If a repository cannot be reached.
    """
    with translate_hub_errors(str(path_or_repo)):
        code = fetch(path_or_repo, "gem_st.py", revision, token)
        if code is None:
            raise ValueError(f"{path_or_repo} has no gem_st.py: it is not a GEM checkpoint, or one of stock modules.")
        if code.parent.parent.name == "snapshots":
            revision = code.parent.name  # what is looked at here is what is loaded below
        foreign = find_foreign_code(partial(fetch, path_or_repo, revision=revision, token=token))
    if foreign and not trust_remote_code:
        raise ValueError(f"{path_or_repo} would run code that is not gem_st's: {foreign}. {ADVICE}.")
    hub_kwargs = {"revision": revision, "token": token, **kwargs}
    if trust_remote_code:
        return SentenceTransformer(str(path_or_repo), trust_remote_code=trust_remote_code, **hub_kwargs)
    ours = {"gem_st.GemTransformer": gem_transformer.GemTransformer}
    return SentenceTransformer._load_with_module_classes(str(path_or_repo), ours, **hub_kwargs)


def load_any(
    path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None, **kwargs: Any
) -> SentenceTransformer:
    """Load a GEM checkpoint by :func:`load`, any other model as Sentence Transformers reads it.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        **kwargs: As those of :func:`load`.

    Raises:
        ValueError: If a GEM checkpoint's code is not trusted.
        OSError: If it is not there, or cannot be reached.
    """
    hub_kwargs: dict[str, Any] = {"revision": revision, "token": token}
    if is_gem(path_or_repo, **hub_kwargs):
        return load(path_or_repo, **hub_kwargs, **kwargs)
    with translate_hub_errors(str(path_or_repo)):
        return SentenceTransformer(str(path_or_repo), **hub_kwargs, **kwargs)
