"""Whether a checkpoint is whole, and gives what it gave when it was exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    HfApi,
    ModelCard,
    constants,
    snapshot_download,
)

from ..cards.card_data import card_facts
from ..files import hash_file, read_json
from ..modeling.gem_checkpoint import CODE_FILE, hash_files
from .errors import check_id, translate_hub_errors
from .layout import CARD, LOADED_FILES, PICKLES, REFERENCE_FILES, list_files
from .loading import ADVICE, fetch, find_foreign_code, hash_code_of, known_code, untrusted
from .stock import STOCK_FOLDER

NO_REFERENCE = "no gem_reference.json, which `gem-st export` and `gem-st push` write"


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
        folder, source = _download(check_id(path_or_repo), revision, token)
    names = list_files(folder)
    if "gem_config.json" not in names and REFERENCE_FILES[0] not in names:
        raise ValueError(_not_gem(folder, path_or_repo))
    reference = read_json(folder / REFERENCE_FILES[0]) if REFERENCE_FILES[0] in names else {}
    code = _check_code(folder, names, reference, trust_remote_code)
    checks = [_check_files(folder, names, reference), _check_pickles(folder, names), code, _check_card(folder)]
    if reference and code.passed:
        kwargs = {"trust_remote_code": "gem_st.py" in names, "device": device, **untrusted(trust_remote_code)}
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
    return f"{name} is not a GEM checkpoint: it has no gem_config.json. It has: {list_files(folder)[:20]}."


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
        name for name in others if any(fnmatch(name.rpartition("/")[2], pattern) for pattern in LOADED_FILES)
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
    settings = read_json(folder / "gem_config.json") if "gem_config.json" in names else {}
    named = settings.get("remote_code") or {CODE_FILE: settings.get("remote_code_sha256")}
    if not isinstance(named, dict) or code != sorted(named):
        return Check("remote code", False, f"{sorted(named)} and nothing else was expected, found {code}")
    hashes = {name: hash_file(folder / name) for name in code}
    for name, digest in hashes.items():
        if digest != named[name]:
            return Check("remote code", False, f"{name} has SHA-256 {digest}, gem_config.json names {named[name]}")
    if (digest := hash_files(hashes)) != settings.get("remote_code_sha256"):
        return Check("remote code", False, f"all have SHA-256 {digest}, gem_config.json names another")
    if foreign := find_foreign_code(partial(fetch, folder, revision=None, token=None)):
        return Check("remote code", trust_remote_code, foreign if trust_remote_code else f"{foreign}. {ADVICE}")
    return Check("remote code", True, f"that of gem_st {known_code()[digest]}, SHA-256 {digest[:16]}")


def _check_card(folder: Path) -> Check:
    try:
        card = ModelCard.load(folder / CARD)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        return Check("card", False, f"README.md cannot be read: {error}".splitlines()[0])
    data = card.data.to_dict()
    expected = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    wrong = [f"{key} is {data.get(key)!r}, not {value!r}" for key, value in expected.items() if data.get(key) != value]
    wrong += ["the tag gem is missing"] if "gem" not in data.get("tags", []) else []
    digest = hash_code_of(partial(fetch, folder, revision=None, token=None))
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
    worker = Path(__file__).with_name("_verify_worker.py")
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
