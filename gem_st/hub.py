"""What passes between a GEM model and the Hub: export, verify, push, info.

Nothing half-written is ever left: an export appears in its folder when it is whole, a push is one commit.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers import __version__ as sentence_transformers_version
from transformers import __version__ as transformers_version
from transformers.utils import logging

from ._version import __version__
from .files import hash_file, read_json, write_json
from .finding import require_gem
from .model_card import MODEL_ID, card_facts, render_card
from .modeling import gem_transformer
from .modeling.gem_checkpoint import CODE_FILE, CODE_NAME, hash_code, hash_files
from .modeling.gem_files import is_local
from .stock import STOCK_FOLDER, check_stock, save_stock

logger = logging.get_logger(__name__)

FORMATS = ("gem", "stock")
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
TRANSPORT_ERROR: Any = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
"""httpx's own; the package's name differs between versions of the Hub's client."""

PLAIN_MODULES = r"sentence_transformers\.[\w.]+\.(Normalize|Dense|LayerNorm|Dropout)"
"""Modules that may stand behind a GEM module without trust: they load nothing but numbers."""

ADVICE = "Read it, then pass trust_remote_code=True (--trust-remote-code) to run it"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.msgpack", "*.h5")
RELEASED_CODE = {
    "7ac3830fe66b0b7b516ee391c9091b93bb69aa98852729dd1732a086f96557ee": "0.1.0",
}
"""SHA-256 of the code that checkpoints of released versions carry, which is read without being asked for trust."""

NO_REFERENCE = "no gem_reference.json, which `gem-st export` and `gem-st push` write"

READ_UNASKED = (
    *("*.py", "*config*.json", "modules.json", "base_fingerprint.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
)
"""Names of files that something may read when it loads a checkpoint; others may lie beside it."""

OWN_FILES = re.compile(
    r"(generation_|gem_|tokenizer_)?config\.json|config_sentence_transformers\.json|modules\.json|tokenizer\.json"
    r"|gem_\w+\.py|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja|gem_adapter/[\w.]+"
)
"""Files of a checkpoint that was pushed without a list of them."""


# --------------------------------------------------------------------------------------------------------------------
# Export


def export(model: SentenceTransformer, path: str | Path, *, format: str = "gem") -> Path:
    """Write a checkpoint with reference vectors in it, so that :func:`verify` can tell whether it still gives them.

    Args:
        model: A model whose first module is a GemTransformer.
        path: A folder that does not exist yet, or is empty.
        format: ``"gem"``, what ``save_pretrained`` writes, for every model; or ``"stock"``, for K = 1 in full mode: a
            checkpoint of Sentence Transformers' own modules that needs no remote code. Its root is a plain generator
            with a clean tokenizer, its folder ``embedding`` a checkpoint by itself, for serving engines, whose
            tokenizer appends the GEM token; the weights are one file under two names.

    Returns:
        The folder.

    Raises:
        ValueError: If the model is not a GEM model, or cannot be written in this format.
        FileExistsError: If the folder holds files.
        OSError: If it cannot be written, e.g. to a full disk; nothing is left then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    gem = require_gem(model)
    if format == "stock":
        check_stock(model)
    with _all_or_nothing(Path(path)) as folder, gem.as_saved():
        if format == "stock":
            save_stock(model, folder, REFERENCE_TEXTS)
        else:
            model.save_pretrained(str(folder), create_model_card=False)
        (folder / CARD).write_text(render_card(model, is_stock=format == "stock"), encoding="utf-8")
        _write_reference(model, gem, folder, format)
    return Path(path)


def require_new(folder: Path) -> None:
    """Make sure that nothing would be overwritten.

    Raises:
        FileExistsError: If there is a file of that name, or a folder with files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Export to a new folder, or remove it first.")


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder beside the one wanted, which takes its name when all is written, and is removed when something fails."""
    folder = folder.resolve()
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (scratch / "whole").mkdir()
        yield scratch / "whole"
        if folder.exists():
            folder.rmdir()
        (scratch / "whole").rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        message = f"The disk is full: {folder} was not written. Free some space, or choose another disk"
        raise OSError(errno.ENOSPC, message) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_full_disk(error: BaseException) -> bool:
    """True for errors of a full disk, also as safetensors words them."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


@torch.inference_mode()
def _write_reference(model: SentenceTransformer, gem: Any, folder: Path, format: str) -> None:
    """Write texts, their vectors, the logits of a prompt, and the hashes of all files but the card."""
    embeddings = model.encode(REFERENCE_TEXTS, convert_to_tensor=True, show_progress_bar=False)
    ids = gem.tokenizer(REFERENCE_PROMPT, return_tensors="pt")["input_ids"].to(gem.model.device)
    logits = gem.model(ids).logits[0, -1]
    tensors = {"embeddings": embeddings.float().cpu().contiguous(), "logits": logits.float().cpu().contiguous()}
    save_file(tensors, folder / REFERENCE_FILES[1], metadata={"format": "pt"})
    reference = {
        "format": format,
        "texts": REFERENCE_TEXTS,
        "prompt": REFERENCE_PROMPT,
        "dtype": str(gem.model.dtype).removeprefix("torch."),
        "gem_token_ids": gem.gem_token_ids,
        "holds_base": (folder / "config.json").exists(),
        "versions": {
            "gem_st": __version__,
            "sentence_transformers": sentence_transformers_version,
            "transformers": transformers_version,
            "torch": torch.__version__,
        },
        "files": {name: hash_file(folder / name) for name in _files(folder) if name not in (CARD, REFERENCE_FILES[0])},
    }
    write_json(folder / REFERENCE_FILES[0], reference)


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, hidden ones left out."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


# --------------------------------------------------------------------------------------------------------------------
# Verify and info


@dataclass(frozen=True)
class Check:
    """One line of :func:`verify`."""

    name: str
    passed: bool | None  # None: could not be checked
    finding: str

    def __str__(self) -> str:
        status = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        return f"{status:<8}{self.name:<14}{self.finding}"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found."""

    source: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join([self.source, *map(str, self.checks)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def verify(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> Verification:
    """Check that a checkpoint is whole, and gives the vectors and logits it gave when it was exported.

    It is loaded in a process of its own in which gem_st cannot be imported, as a stranger loads it. A repository is
    downloaded to the cache first.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        trust_remote_code: Run code that is not the installed gem_st's, too.
        device: Where to load it.

    Returns:
        The checks: ``files`` (hashes), ``no pickles``, ``remote code``, ``card``, ``embeddings``, ``generator``.

    Raises:
        ValueError: If there is no GEM checkpoint.
        OSError: If a repository cannot be downloaded.
    """
    folder, source = Path(path_or_repo), str(path_or_repo)
    if not folder.is_dir():
        folder, source = _download(_check_id(path_or_repo), revision, token)
    names = _files(folder)
    if "gem_config.json" not in names and REFERENCE_FILES[0] not in names:
        raise ValueError(_not_gem(folder, path_or_repo))
    reference = read_json(folder / REFERENCE_FILES[0]) if REFERENCE_FILES[0] in names else {}
    code = _check_code(folder, names, reference, trust_remote_code)
    checks = [_check_files(folder, names, reference), _check_pickles(folder, names), code, _check_card(folder)]
    if reference and code.passed:
        kwargs = {"trust_remote_code": "gem_st.py" in names, "device": device, **_untrusted(trust_remote_code)}
        checks += _check_running(folder, kwargs, token)
    else:
        reason = "not run: see remote code" if reference else NO_REFERENCE
        checks += [Check(name, None, reason) for name in ("embeddings", "generator")]
    return Verification(source, checks)


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, str]:
    """A repository's files at one commit, and its name with the commit; the cache alone will do only when offline."""
    with translate_hub_errors(repo_id):
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, revision=revision))
            return folder, f"{repo_id} at {folder.name[:12]}, from the cache"
        commit = HfApi(token=token).model_info(repo_id, revision=revision).sha
        folder = Path(snapshot_download(repo_id, revision=commit, token=token))
        return folder, f"{repo_id} at {str(commit)[:12]}"


def _not_gem(folder: Path, name: str | Path) -> str:
    """Why a folder is not a GEM checkpoint."""
    if (folder.parent / REFERENCE_FILES[0]).exists() and folder.name == STOCK_FOLDER:
        return f"{name} is the inner half of a stock export. Give {folder.parent}."
    return f"{name} is not a GEM checkpoint: it has no gem_config.json. It has: {_files(folder)[:20]}."


def _check_files(folder: Path, names: list[str], reference: dict[str, Any]) -> Check:
    expected = reference.get("files", {})
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - set(names))]
    wrong += [
        f"{name} was changed"
        for name in sorted(expected.keys() & set(names))
        if hash_file(folder / name) != expected[name]
    ]
    others = set(names) - {*expected, *REFERENCE_FILES, CARD}
    added = sorted(
        name for name in others if any(fnmatch(name.rpartition("/")[2], pattern) for pattern in READ_UNASKED)
    )
    wrong += [f"{name} was added" for name in added]
    if not reference:
        return Check("files", None, NO_REFERENCE)
    return Check("files", not wrong, "; ".join(wrong) or f"{len(expected)} files as exported")


def _check_pickles(folder: Path, names: list[str]) -> Check:
    graphs = {name.removesuffix(".xml") + ".bin" for name in names if name.endswith(".xml")}  # OpenVINO's weights
    found = {name for name in names if any(fnmatch(name.lower(), pattern) for pattern in PICKLES)} - graphs
    for name in set(names) - found:
        with open(folder / name, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # as torch.save writes, under any name
                found.add(name)
    finding = f"may hold code: {sorted(found)}" if found else f"{len(names)} files looked at"
    return Check("no pickles", not found, finding)


def _check_code(folder: Path, names: list[str], reference: dict[str, Any], trust_remote_code: bool) -> Check:
    code = [name for name in names if name.endswith(".py")]
    if reference.get("format") == "stock" and not code:
        return Check("remote code", True, "none, none needed")
    settings = read_json(folder / "gem_config.json")
    named = settings.get("remote_code") or {CODE_FILE: settings.get("remote_code_sha256")}
    if code != sorted(named):
        return Check("remote code", False, f"{sorted(named)} and nothing else was expected, found {code}")
    hashes = {name: hash_file(folder / name) for name in code}
    for name, digest in hashes.items():
        if digest != named[name]:
            return Check("remote code", False, f"{name} has SHA-256 {digest}, gem_config.json names {named[name]}")
    if (digest := hash_files(hashes)) != settings.get("remote_code_sha256"):
        return Check("remote code", False, f"all have SHA-256 {digest}, gem_config.json names another")
    if foreign := _foreign_code(partial(_fetch, folder, revision=None, token=None)):
        return Check("remote code", trust_remote_code, foreign if trust_remote_code else f"{foreign}. {ADVICE}")
    return Check("remote code", True, f"that of gem_st {_known_code()[digest]}, SHA-256 {digest[:16]}")


def _known_code() -> dict[str, str]:
    """SHA-256 of the code that checkpoints carry, and the version it is of: released ones, and the installed."""
    return {**RELEASED_CODE, hash_files(hash_code(gem_transformer.__file__)): __version__}


def _hash_code(fetch: Callable[[str], Path | None]) -> str | None:
    """SHA-256 of the code that a checkpoint says it runs; None if some of it is missing."""
    config = fetch("gem_config.json")
    names = (read_json(config).get("remote_code") if config else None) or [CODE_FILE]
    paths = {name: fetch(name) if CODE_NAME.fullmatch(name) else None for name in names}
    if any(path is None for path in paths.values()):
        return None
    return hash_files({name: hash_file(path) for name, path in paths.items() if path})


def _foreign_code(fetch: Callable[[str], Path | None]) -> str | None:
    """What code a checkpoint would run that is not the installed gem_st's; None if there is none.

    The base's own code is never run without trust: see :func:`_untrusted`.

    Args:
        fetch: Gives the path of a file by its name.
    """
    digest, modules = _hash_code(fetch), fetch("modules.json")
    if digest is None or modules is None:
        return "its code or modules.json is missing"
    if digest not in _known_code():
        return f"not that of gem_st {__version__}, SHA-256 {digest}"
    first, *others = ((module["type"], module["path"]) for module in read_json(modules))
    foreign = [name for name, _ in others if not re.fullmatch(PLAIN_MODULES, name)]
    foreign += [first[0]] if first != ("gem_st.GemTransformer", "") else []
    return f"modules.json names {foreign}" if foreign else None


def _untrusted(trust_remote_code: bool) -> dict[str, dict[str, bool]]:
    """Arguments with which a checkpoint's own module is run, and nothing else that the base may bring."""
    names = () if trust_remote_code else ("model_kwargs", "processor_kwargs", "config_kwargs")
    return {name: {"trust_remote_code": False} for name in names}


def _check_card(folder: Path) -> Check:
    try:
        card = ModelCard.load(folder / CARD)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        return Check("card", False, f"README.md cannot be read: {error}".splitlines()[0])
    data = card.data.to_dict()
    expected = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    wrong = [f"{key} is {data.get(key)!r}, not {value!r}" for key, value in expected.items() if data.get(key) != value]
    wrong += ["the tag gem is missing"] if "gem" not in data.get("tags", []) else []
    digest = _hash_code(partial(_fetch, folder, revision=None, token=None))
    if (folder / CODE_FILE).exists():
        wrong += [] if digest and digest in card.text else ["it does not name the SHA-256 of the code"]
        settings, facts = read_json(folder / "gem_config.json"), card_facts(card.text)
        mode = "frozen base" if settings.get("freeze_base") else "full"
        wrong += [] if facts.get("mode", mode) in (mode, "LoRA on every token") else [f"it says mode {facts['mode']}"]
        num_gem_tokens = facts.get("GEM tokens (K)", str(settings["num_gem_tokens"])).split(",")[0]
        wrong += [] if num_gem_tokens == str(settings["num_gem_tokens"]) else [f"it says K = {num_gem_tokens}"]
    licence = data.get("license") or "no licence named"
    return Check("card", not wrong, "; ".join(wrong) or f"{licence}, {len(card.data.eval_results or [])} results")


def _check_running(folder: Path, kwargs: dict[str, Any], token: str | bool | None) -> list[Check]:
    worker = Path(__file__).with_name("_worker.py")
    code = f"import runpy, sys; sys.argv[0] = 'worker'; runpy.run_path({str(worker)!r}, run_name='__main__')"
    env = {**os.environ, "HF_TOKEN": token} if isinstance(token, str) else None  # for the base that an adapter names
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, "-c", code, str(folder.resolve()), str(results), json.dumps(kwargs)]
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
        if not results.exists():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return [Check(name, False, last[:300]) for name in ("embeddings", "generator")]
        return [Check(name, *result) for name, result in read_json(results).items()]


def _fetch(path_or_repo: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path | None:
    """One file of a folder or a repository; None if it has none of that name."""
    if Path(path_or_repo).is_dir():
        path = Path(path_or_repo) / name
        return path if path.exists() else None
    try:
        return Path(hf_hub_download(_check_id(path_or_repo), name, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None


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
        path = _fetch(path_or_repo, name, revision, token)
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
        return _fetch(path_or_repo, "gem_st.py", revision, token) is not None


def read_card(
    path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> ModelCard | None:
    """Model card of a folder or a repository; None if it has none.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
    """
    path = _fetch(path_or_repo, "README.md", revision, token)
    return None if path is None else ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> SentenceTransformer:
    """Load a checkpoint, running its code only if it is the installed gem_st's, or trusted.

    Args:
        path_or_repo: Folder or Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        trust_remote_code: Run code that is not the installed gem_st's, too.
        **kwargs: Passed to SentenceTransformer, e.g. ``device``.

    Raises:
        ValueError: If there is no GEM checkpoint, or its code is not trusted.
        OSError: If a repository cannot be reached.
    """
    with translate_hub_errors(str(path_or_repo)):
        code = _fetch(path_or_repo, "gem_st.py", revision, token)
        if code is None:
            raise ValueError(f"{path_or_repo} has no gem_st.py: it is not a GEM checkpoint, or one of stock modules.")
        if code.parent.parent.name == "snapshots":
            revision = code.parent.name  # what is looked at here is what is loaded below
        foreign = _foreign_code(partial(_fetch, path_or_repo, revision=revision, token=token))
    if foreign and not trust_remote_code:
        raise ValueError(f"{path_or_repo} would run code that is not gem_st's: {foreign}. {ADVICE}.")
    for name, values in _untrusted(trust_remote_code).items():
        kwargs[name] = {**kwargs.get(name, {}), **values}
    return SentenceTransformer(str(path_or_repo), trust_remote_code=True, revision=revision, token=token, **kwargs)


# --------------------------------------------------------------------------------------------------------------------
# Push


def push(
    model: SentenceTransformer | str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    replace_model_card: bool = False,
    commit_message: str = "Add GEM checkpoint",
    trust_remote_code: bool = False,
) -> str:
    """Export a checkpoint and upload it in one commit: the repository holds all of it, or what it held before.

    Args:
        model: The model, or the folder of a checkpoint; one that was exported is uploaded as it is.
        repo_id: ``"org/name"``.
        token: Hub token with write permission; the one of `hf auth login` by default.
        private: Make a new repository private.
        revision: Branch; made from main if there is none of that name.
        create_pr: Open a pull request to main instead of committing.
        exist_ok: Update a repository that holds files. Files of an older checkpoint that the new one lacks are
            removed; all others stay.
        replace_model_card: Replace a card that is there already.
        commit_message: Title of the commit.
        trust_remote_code: Run the code of a folder even if it is not the installed gem_st's.

    Returns:
        URL of the commit or of the pull request.

    Raises:
        ValueError: If the id is none, or the folder no GEM checkpoint.
        PermissionError: If there is no token, or it may not write there.
        FileExistsError: If the repository holds files and neither ``exist_ok`` nor ``create_pr`` is set.
        ConnectionError: If the connection broke. The repository holds what it held, or all of the push, which can be
            repeated.
        OSError: If somebody else committed in between.
    """
    _check_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is made to main: leave out revision, or create_pr.")
    token = token or get_token()
    if token is None:
        raise PermissionError("There is no Hub token. Run `hf auth login`, set HF_TOKEN, or pass one.")
    source = _check_source(model, trust_remote_code)  # before anything is made on the Hub
    with translate_hub_errors(repo_id), tempfile.TemporaryDirectory() as scratch:
        api = HfApi(token=token)
        repo_id, state, is_new = _open_repo(api, repo_id, private, revision, is_update=exist_ok or create_pr)
        folder = source
        if not isinstance(source, Path):
            source.model_card_data.set_model_id(repo_id)
            folder = export(source, Path(scratch) / "checkpoint")
        old = partial(_fetch, repo_id, revision=state.sha, token=token)
        present = {str(file.rfilename) for file in state.siblings or ()}
        operations = _list_operations(folder, present, old, repo_id, replace_model_card)
        if is_new:
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        # Only on top of what was looked at here: another push in between is not overwritten by half.
        place = {"create_pr": True} if create_pr else {"revision": revision, "parent_commit": state.sha}
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, **place)
        return str(commit.pr_url if create_pr else commit.commit_url)


def _open_repo(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, *, is_update: bool
) -> tuple[str, Any, bool]:
    """Make a repository if there is none: its full name, what it holds, and whether the branch is still to be made."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    branches = {branch.name for branch in api.list_repo_refs(repo_id).branches}
    is_new = revision is not None and revision not in branches and not revision.startswith("refs/")
    state = api.model_info(repo_id, revision=None if is_new else revision)
    if private is not None and state.private != private:
        is_now = "public" if private else "private"
        raise ValueError(f"{repo_id} exists and is {is_now}. Change that in its settings.")
    if not is_update and {file.rfilename for file in state.siblings or ()} - {".gitattributes", CARD}:
        raise FileExistsError(
            f"{repo_id} holds files already. Pass exist_ok=True (--exist-ok) to update it, or create_pr=True "
            "(--create-pr) to propose the change."
        )
    return repo_id, state, is_new


def _check_source(model: Any, trust_remote_code: bool) -> Any:
    """The folder given, if it is an export in which nothing was changed; otherwise the model, loaded where needed."""
    if not isinstance(model, str | Path):
        _check_base_is_public(require_gem(model).get_config_dict())
        return model
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"{model} is no folder. Push the folder of a checkpoint.")
    if not (folder / REFERENCE_FILES[0]).exists():
        return _check_source(load(folder, trust_remote_code=trust_remote_code, device="cpu"), trust_remote_code)
    names = _files(folder)
    if "gem_config.json" in names:
        _check_base_is_public(read_json(folder / "gem_config.json"))
    for check in (_check_files(folder, names, read_json(folder / REFERENCE_FILES[0])), _check_pickles(folder, names)):
        if not check.passed:
            raise ValueError(f"{folder} is not as it was exported: {check.finding}. Export it again.")
    return folder


def _check_base_is_public(settings: dict[str, Any]) -> None:
    """Make sure that an adapter that goes to the Hub names its base by an id that others can fetch."""
    base = settings.get("base_model_name_or_path", "")
    if not settings.get("save_base", True) and is_local(base):
        raise ValueError(
            f"The adapter names its base by a folder of this machine, {base}. Set model[0].base_model_name_or_path "
            "(and base_model_revision) to the base's Hub id, or save it with its base: model[0].save_base = True."
        )


def _list_operations(
    folder: Path, present: set[str], old: Callable[[str], Path | None], repo_id: str, replace_model_card: bool
) -> list[Any]:
    """Files of the export to be added, and those of an older GEM checkpoint in the repository to be removed.

    Args:
        folder: The export.
        present: Names of the files in the repository.
        old: Gives the path of one of them.
        repo_id: The repository.
        replace_model_card: Replace its card even if it may still be true.
    """
    names = {*read_json(folder / REFERENCE_FILES[0])["files"], *REFERENCE_FILES}
    if (folder / CARD).exists():
        path = old(CARD) if CARD in present else None
        facts = card_facts(path.read_text(encoding="utf-8")) if path else {}
        is_false = bool(facts) and facts != card_facts((folder / CARD).read_text(encoding="utf-8"))
        if path is None or replace_model_card or is_false:
            names.add(CARD)
        else:
            logger.warning(
                f"The card of {repo_id} is kept. replace_model_card=True (--replace-model-card) replaces it."
            )
    reference = old(REFERENCE_FILES[0]) if REFERENCE_FILES[0] in present else None
    if reference is not None:
        stale = present & {*read_json(reference)["files"], *REFERENCE_FILES}
    else:
        stale = {name for name in present if "gem_config.json" in present and OWN_FILES.fullmatch(name)}
    added = [_add(folder, name, repo_id) for name in sorted(names)]
    return added + [CommitOperationDelete(name) for name in sorted(stale - names)]


def _add(folder: Path, name: str, repo_id: str) -> CommitOperationAdd:
    if name != CARD:
        return CommitOperationAdd(name, folder / name)
    text = (folder / name).read_text(encoding="utf-8").replace(MODEL_ID, repo_id)
    return CommitOperationAdd(name, text.encode())


def _check_id(repo_id: str | Path) -> str:
    """Raise ValueError if this is no Hub id."""
    text = str(repo_id)
    if "/" not in text or text.count("/") > 1:
        raise ValueError(f"{text!r} is neither a folder nor a Hub id of the form 'org/name'.")
    validate_repo_id(text)
    return text


@contextmanager
def translate_hub_errors(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do.

    Args:
        name: The repository.

    Raises:
        PermissionError: For 401 and 403.
        FileNotFoundError: If there is no such repository or revision, or it cannot be reached offline.
        ConnectionError: For a broken connection.
        OSError: For what else the Hub refuses.
    """
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no such revision: {_first_line(error)}") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and no repository of that name that this token can see: if it is private, log "
            "in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} is not in the cache, and was not found: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(f"The Hub does not accept the token: {_first_line(error)}") from error
        if status == 403:
            raise PermissionError(
                f"The token may not write to {name}. Use one with write permission there: `hf auth login`."
            ) from error
        if status == 412:
            raise OSError(f"{name} was changed by somebody else in the meantime. Push again.") from error
        raise OSError(f"The Hub refused ({status}) for {name}: {_first_line(error)}") from error
    except (TRANSPORT_ERROR, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # the client wraps those of an upload
        if not isinstance(cause, TRANSPORT_ERROR):
            raise
        raise ConnectionError(
            f"The connection to the Hub broke ({type(cause).__name__}). {name} holds what it held, or all of the push. "
            "Try again."
        ) from error


def is_unreachable(error: BaseException | None) -> bool:
    """True if an error, or what it came from, is that the Hub could not be reached."""
    if error is None or isinstance(error, (ConnectionError, TRANSPORT_ERROR, LocalEntryNotFoundError)):
        return error is not None
    return is_unreachable(error.__cause__ or error.__context__)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
