"""Pushing a checkpoint to the Hub, as one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from ..cards.card_data import MODEL_ID, card_facts
from ..files import read_json
from ..finding import require_gem
from ..modeling.gem_files import is_local
from ..modeling.gem_gguf import split_gguf
from .errors import check_id, translate_hub_errors
from .exporting import export
from .layout import CARD, OWN_FILES, REFERENCE_FILES, list_files
from .loading import fetch, load
from .verifying import _check_files, _check_pickles

logger = logging.get_logger(__name__)


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
    check_id(repo_id)
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
        old = partial(fetch, repo_id, revision=state.sha, token=token)
        present = {str(file.rfilename) for file in state.siblings or ()}
        operations = list_operations(folder, present, old, repo_id, replace_model_card)
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
        _check_base_is_public(require_gem(model).settings())
        return model
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"{model} is no folder. Push the folder of a checkpoint.")
    if not (folder / REFERENCE_FILES[0]).exists():
        return _check_source(load(folder, trust_remote_code=trust_remote_code, device="cpu"), trust_remote_code)
    names = list_files(folder)
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
        way = "" if split_gguf(base)[1] else ", or save it with its base: model[0].save_base = True"
        raise ValueError(
            f"The adapter names its base by a folder of this machine, {base}. Set model[0].base_model_name_or_path "
            f"(and base_model_revision) to the base's Hub id (of a GGUF file, owner/name/x.gguf){way}."
        )


def list_operations(
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
        settings = old("gem_config.json") if "gem_config.json" in present else None
        code = (read_json(settings).get("remote_code") or {}) if settings else {}
        stale = {name for name in present if settings and (OWN_FILES.fullmatch(name) or name in code)}
    added = [_add(folder, name, repo_id) for name in sorted(names)]
    return added + [CommitOperationDelete(name) for name in sorted(stale - names)]


def _add(folder: Path, name: str, repo_id: str) -> CommitOperationAdd:
    if name != CARD:
        return CommitOperationAdd(name, folder / name)
    text = (folder / name).read_text(encoding="utf-8").replace(MODEL_ID, repo_id)
    return CommitOperationAdd(name, text.encode())
