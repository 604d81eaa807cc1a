"""Checkpoints: the adapter's files, and writing all of it into a folder."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file, logging

from .gem_adapter import add_lora, import_peft
from .gem_cache import write_tensors
from .gem_files import (
    check_base_unchanged,
    copy_base,
    fingerprint_base,
    is_local,
    save_model,
)
from .gem_settings import ADAPTER_FOLDER, CONFIG_FILE, UNFINISHED

logger = logging.get_logger(__name__)

REQUIREMENTS = {"sentence-transformers": ">=6.0", "transformers": ">=5.4", "torch": ">=2.7"}
"""What Sentence Transformers checks before it loads a checkpoint."""

CODE_FILE = "gem_st.py"
ST_CONFIG, MODEL_CONFIG = "config_sentence_transformers.json", "config.json"
PART = "gem_part."
"""Begins the names of folders that a checkpoint is written to, before it is moved to its place."""

GEM_ROWS = "gem_rows.safetensors"
MODULE = {"idx": 0, "name": "0", "path": "", "type": "gem_st.GemTransformer"}
"""This module, as Sentence Transformers writes it to ``modules.json``."""

CODE_NAME = re.compile(r"gem_\w+\.py")
"""Names of the files of code in a checkpoint; a base with code of its own has others."""

ROUTED = re.compile(r"_\d+_GemTransformer$")
"""Names of the folders of modules within a Router."""

CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
"""Names of the folders that a trainer resumes from."""


@lru_cache
def code_files(entry: str) -> dict[str, Path]:
    """The code of a checkpoint: the entry under the name it is saved by, and what it imports from beside it."""
    others = sorted(Path(path) for path in get_relative_import_files(entry))
    return {CODE_FILE: Path(entry), **{path.name: path for path in others}}


def hash_code(entry: str) -> dict[str, str]:
    """SHA-256 of each file of :func:`code_files`."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in code_files(entry).items()}


def hash_files(hashes: dict[str, str]) -> str:
    """One SHA-256 of all files of code: that of the entry where it is the only one, otherwise of names and hashes.

    Args:
        hashes: SHA-256 of each, by name.
    """
    if hashes.keys() == {CODE_FILE}:
        return hashes[CODE_FILE]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint in a folder; empty if there are none."""
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check_writable(gem: Any) -> None:
    """Raise if a checkpoint of this module could not be written, or not be read again.

    :class:`gem_st.GemLoss` asks before the first step, so that no training is lost.
    """
    if gem.mode == "full" and not gem.save_base:
        raise ValueError("save_base=False needs an adapter: freeze_base=True, or model.add_adapter(LoraConfig(...)).")
    has_base = gem.mode == "full" or (gem.freeze_base and gem.save_base)
    if not has_base and not gem.base_model_name_or_path:
        raise ValueError(
            "An adapter is saved without its base, and has to name it: set model[0].base_model_name_or_path (and "
            "base_model_revision) to the base's Hub id."
        )
    if gem.freeze_base and gem.save_base and gem.source.is_gguf:
        raise ValueError(
            f"The base, {gem.source.folder}, stays where it is: a checkpoint beside it holds the adapter alone. Leave "
            "save_base at False, or train beside a dense copy (AutoModelForCausalLM.from_pretrained(folder, "
            "gguf_file=...).save_pretrained(...))."
        )
    if gem.mode != "full":
        active_adapter(gem.gem_model)


def active_adapter(model: Any) -> str:
    """Name of the one adapter that is on.

    Raises:
        ValueError: If it is off, or there are several.
    """
    status = import_peft().get_model_status(model)
    if status.enabled is not True:
        raise ValueError("The adapter is disabled, so that a reload would differ. Enable it in all layers first.")
    if status.active_adapters == "irregular" or len(status.active_adapters) != 1:
        raise ValueError(f"One active adapter can be saved, but these are: {status.active_adapters}.")
    return status.active_adapters[0]


def write_checkpoint(gem: Any, folder: Path, entry: str, **kwargs: Any) -> None:
    """Write a checkpoint of weights that are whole in memory; this module's old files stay until all is written.

    Files are written to a folder within it and moved at the end, which needs the place of both. From then on nothing
    loads it until Sentence Transformers has written the modules behind this one, and ``modules.json``. What it writes
    before, prompts above all, is not in our hands.

    Args:
        gem: The module.
        folder: The folder.
        entry: The file that its class is in.
        **kwargs: Passed to ``save_pretrained`` of the model.
    """
    gem.base.check_vocabulary(gem.source.folder)
    if gem.mode != "full":
        check_base_unchanged(gem.base, gem.source, gem.freeze_base)
    root, code = root_of(folder), code_files(entry)
    folder.mkdir(parents=True, exist_ok=True)
    place = gem.source.folder.parent if gem.source.is_gguf else gem.source.folder
    keeps_base = gem.mode != "full" and place.is_dir() and folder.samefile(place)
    _remove_parts(folder)
    part = Path(tempfile.mkdtemp(prefix=PART, dir=folder))
    try:
        _write_files(gem, folder if keeps_base else part, part, _is_resumable(folder), **kwargs)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    with _Marked(root):
        _remove_leftovers(folder, keeps_base)
        _move(part, folder)
        shutil.rmtree(part)
        for name, file in code.items():
            target = root / name
            if not target.exists() or not target.samefile(file):
                shutil.copyfile(file, target)
    _require_versions(root / ST_CONFIG)


def _remove_parts(folder: Path) -> None:
    """Remove what saves left behind that were killed a day ago or earlier."""
    for part in folder.glob(f"{PART}*"):
        if time.time() - part.stat().st_mtime > 24 * 3600:
            shutil.rmtree(part, ignore_errors=True)


class _Marked:
    """Context in which ``modules.json`` says that the checkpoint is not whole.

    It does so afterwards, too, until Sentence Transformers has written the file anew, but for a checkpoint of this
    module alone: that is whole again. Where Sentence Transformers wrote nothing there is no such file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "modules.json"
        self.is_ours = (folder / ST_CONFIG).exists()

    def __enter__(self) -> None:
        self.before = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.before = json.loads(self.path.read_text(encoding="utf-8"))
        if self.is_ours:
            self._write([{**MODULE, "path": UNFINISHED}])

    def __exit__(self, kind: object, *details: object) -> None:
        if self.is_ours and kind is None and self.before == [MODULE]:
            self._write([MODULE])

    def _write(self, modules: list[dict[str, Any]]) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        _write_json(part, modules)
        part.replace(self.path)


def _write_files(gem: Any, base: Path, folder: Path, is_resumable: bool, **kwargs: Any) -> None:
    """Write all but the code.

    Args:
        gem: The module.
        base: The folder that the base is in, or will be.
        folder: The folder.
        is_resumable: Whether a trainer goes on from it, to the same weights: then they are saved as they are, otherwise
            in the data types they are to be saved in.
        **kwargs: Passed to ``save_pretrained`` of the model.
    """
    if gem.mode == "full":
        with contextlib.nullcontext() if is_resumable else gem.as_saved("cpu"):
            save_model(gem.model, gem.source, folder, **kwargs)
    elif gem.freeze_base and gem.save_base and base == folder:
        copy_base(gem.model, gem.source, folder, **kwargs)
    if gem.save_base and gem.mode != "lora":
        gem.save_tokenizer(str(folder))
    if gem.mode != "full":
        is_whole = gem.freeze_base and gem.save_base
        fingerprint = fingerprint_base(base, gem.tokenizer) if is_whole else gem.source.fingerprint
        _save_adapter(gem, folder / ADAPTER_FOLDER, fingerprint)
    _write_json(folder / CONFIG_FILE, gem.settings())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _move(source: Path, folder: Path) -> None:
    """Move all files; without ``config.json``, which comes last, no other library takes the rest for a model."""
    files = (file for file in source.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name == MODEL_CONFIG):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def root_of(folder: Path) -> Path:
    """The folder in which code is looked for: of a module within a Router it is the whole checkpoint's."""
    is_routed = ROUTED.search(folder.name)
    return next((f for f in list(folder.parents)[:2] if is_routed and (f / ST_CONFIG).exists()), folder)


def _is_resumable(folder: Path) -> bool:
    """Whether a folder is one that a trainer resumes from."""
    return any(CHECKPOINT.match(name) for name in (folder.name, folder.parent.name))


def _remove_leftovers(folder: Path, keeps_base: bool) -> None:
    """Remove what another checkpoint left in the folder, without which it is none any more."""
    names = (MODEL_CONFIG, "generation_config.json", "model.safetensors.index.json")
    code: list[str] = []
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # of a file that is damaged
        code = [name for name in read_settings(folder).get("remote_code", {}) if CODE_NAME.fullmatch(name)]
    for name in code:  # another version may have had others
        (folder / name).unlink(missing_ok=True)
    for file in [] if keeps_base else [*(folder / name for name in names), *folder.glob("model*.safetensors")]:
        file.unlink(missing_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)


def _require_versions(config_path: Path) -> None:
    """Add the versions needed to what Sentence Transformers has just written, and does not keep by itself.

    Under transformers 5.23 and 5.24 every process of a training writes that file at once. One that cannot be read at
    this moment is left as it is: the code of the checkpoint checks the versions as well.
    """
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["requirements"] = {**REQUIREMENTS, **config.get("requirements", {})}
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _save_adapter(gem: Any, folder: Path, fingerprint: dict[str, str | None]) -> None:
    """Write the LoRA in PEFT's format, the GEM rows, and what the base is recognised by."""
    peft, model = import_peft(), gem.gem_model
    name = active_adapter(model)
    folder.mkdir(parents=True, exist_ok=True)
    lora = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    lora = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in lora.items()}
    write_tensors(lora, folder / "adapter_model.safetensors")
    config = copy.copy(model.peft_config[name])
    config.base_model_name_or_path = gem.settings().get("base_model_name_or_path")
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # which json would write in another order each time
        config.target_modules = sorted(config.target_modules)
    is_activated = gem.gem_tokens.names is not None and gem.num_gem_tokens == 1
    if is_activated:  # which other readers of PEFT's format know: a LoRA that acts from a token on
        config.alora_invocation_tokens, config.task_type = gem.gem_tokens.row_ids, "CAUSAL_LM"
    config.save_pretrained(folder)
    matrices = [] if gem.freeze_base else gem.base.vocabulary_matrices()
    rows = [gem.gem_embeddings] if gem.freeze_base else [matrix[gem.gem_token_ids] for matrix in matrices]
    named = {f"gem_rows.{index}": row.detach().contiguous() for index, row in enumerate(rows) if row is not None}
    if named:
        write_tensors(named, folder / GEM_ROWS)
    _write_json(folder / "base_fingerprint.json", fingerprint)
    if not gem.save_base and is_local(gem.base_model_name_or_path):
        logger.warning(
            f"The checkpoint names its base by a folder of this machine, {gem.base_model_name_or_path}. Set "
            "model[0].base_model_name_or_path (and base_model_revision) to the base's Hub id before saving."
        )


def load_adapter(gem: Any, model_name_or_path: str, hub_kwargs: dict[str, Any]) -> None:
    """Read what :func:`_save_adapter` wrote, after making sure that the base is the one it was trained on.

    Raises:
        ValueError: If a file is missing, or the base is another one.
    """
    subfolder = str(Path(hub_kwargs.get("subfolder") or "", ADAPTER_FOLDER))
    names = ["adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"]
    names += [GEM_ROWS] if gem.gem_tokens.names is None else []
    options = {**hub_kwargs, "subfolder": subfolder}
    paths = {name: Path(str(cached_file(model_name_or_path, name, **options))) for name in names}
    saved = json.loads(paths["base_fingerprint.json"].read_text(encoding="utf-8"))
    if different := [key for key, value in saved.items() if value != gem.source.fingerprint[key]]:
        raise ValueError(
            f"{model_name_or_path} was trained on another base than {gem.source.folder}: {' and '.join(different)} "
            f"differ. It needs {gem.base_model_name_or_path or 'the base it was saved with'}, unchanged."
        )
    rows = load_file(paths[GEM_ROWS]) if GEM_ROWS in paths else {}
    with torch.no_grad():
        if gem.gem_embeddings is not None:
            gem.gem_embeddings.copy_(rows["gem_rows.0"])
        for index, weight in enumerate([] if gem.freeze_base else gem.base.vocabulary_matrices()):
            weight[gem.gem_token_ids] = rows[f"gem_rows.{index}"].to(weight)
    config = import_peft().PeftConfig.from_pretrained(str(paths["adapter_config.json"].parent))
    config.inference_mode = False
    config.alora_invocation_tokens = None  # here it acts on GEM tokens, wherever these are
    model = add_lora(gem.gem_model, config)
    weights = paths["adapter_model.safetensors"]
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(weights).items()}
    expected = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    if expected.keys() != state.keys():
        raise ValueError(f"{weights} does not fit its adapter_config.json: {sorted(expected.keys() ^ state.keys())}.")
    import_peft().set_peft_model_state_dict(model, state)
