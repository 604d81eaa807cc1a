"""Settings: what may be asked for, what a checkpoint may hold, and which of its files is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .gem_gguf import split_gguf
from .gem_tokens import POOLING_MODES

CONFIG_FILE, ADAPTER_FOLDER = "gem_config.json", "gem_adapter"
UNFINISHED = "unfinished_save"
"""Where ``modules.json`` says that the model is while it is being saved, and there is nothing."""

HUB_KWARGS: dict[str, Any] = {
    "subfolder": "",
    "token": None,
    "cache_dir": None,
    "revision": None,
    "local_files_only": False,
}
"""How files are read from the Hub, and what is the default."""

NOT_COMPLETE = (
    "{} was not saved completely: its saving was interrupted, or one of several modules was saved by itself. Save it "
    "again, with save_pretrained of the SentenceTransformer."
)

REQUIRED = ("num_gem_tokens", "pooling", "gem_token_ids", "gem_token_source")
TYPES: dict[str, Any] = {
    "num_gem_tokens": int,
    "pooling": str,
    "gem_token_ids": list,
    "gem_token_source": str,
    "gem_token_names": list | None,
    "max_seq_length": int | None,
    "logit_scale": int | float,
    "freeze_base": bool,
    "save_base": bool,
    "base_model_name_or_path": str,
    "base_model_revision": str | None,
    "tokenizer_sha256": str,
}
"""Types of what :data:`CONFIG_FILE` holds."""


def check_options(num_gem_tokens: int, pooling: str, freeze_base: bool, of_frozen: Sequence[Any]) -> None:
    """Raise if an option is out of range, or one of those is given that only a frozen base has a place for."""
    if not freeze_base and any(option is not None for option in of_frozen):
        raise ValueError(
            "lora_rank, lora_kwargs and gem_tokens belong to freeze_base=True. For a LoRA on every token, use "
            "model.add_adapter(LoraConfig(...)) on the SentenceTransformer."
        )
    if not isinstance(num_gem_tokens, int) or isinstance(num_gem_tokens, bool) or num_gem_tokens < 1:
        raise ValueError(f"num_gem_tokens must be a whole number of 1 or more, got {num_gem_tokens!r}.")
    if pooling not in POOLING_MODES:
        raise ValueError(f"pooling must be one of {POOLING_MODES}, got {pooling!r}.")


def check_saved_settings(
    model_name_or_path: str, saved: dict[str, Any], asked: dict[str, Any], own: Sequence[Any] = ()
) -> None:
    """Raise if a GEM checkpoint was saved with other settings than are asked for, or some are its own business."""
    if saved and any(option is not None for option in own):
        raise ValueError(
            f"{model_name_or_path} is a GEM checkpoint, whose LoRA and GEM tokens are those it was saved with. Leave "
            "out lora_rank, lora_kwargs and gem_tokens."
        )
    for key, value in asked.items():
        if saved and saved.setdefault(key, False) != value:
            raise ValueError(
                f"{model_name_or_path} is a GEM checkpoint saved with {key}={saved[key]!r}, but "
                f"{key}={value!r} was asked for. Pass {key}={saved[key]!r}, or load it with "
                f"SentenceTransformer({str(model_name_or_path)!r}, trust_remote_code=True)."
            )


def check_settings(model_name_or_path: str, saved: Any) -> None:
    """Raise if what :data:`CONFIG_FILE` holds, if there is one, cannot be the settings of a checkpoint."""
    if saved == {}:
        return
    problem = ""
    if not isinstance(saved, dict):
        problem = "no JSON object"
    elif missing := [name for name in REQUIRED if name not in saved]:
        problem = f"it lacks {' and '.join(missing)}"
    elif wrong := [name for name, kind in TYPES.items() if name in saved and not isinstance(saved[name], kind)]:
        problem = ", ".join(f"{name} cannot be {saved[name]!r}" for name in wrong)
    elif not _are_ids(saved["gem_token_ids"], saved["num_gem_tokens"]):
        problem = f"{saved['gem_token_ids']} are not the ids of {saved['num_gem_tokens']} GEM tokens"
    if problem:
        raise ValueError(f"{CONFIG_FILE} of {model_name_or_path} is damaged: {problem}. Save or download it again.")


def _are_ids(ids: list[Any], num_ids: int) -> bool:
    return len({*map(str, ids)}) == len(ids) == num_ids and all(type(each) is int and each >= 0 for each in ids)


def check_is_checkpoint(model_name_or_path: str, subfolder: str, saved: dict[str, Any]) -> None:
    """Raise if what is to be loaded is a base, or a checkpoint whose saving was interrupted."""
    if subfolder == UNFINISHED:
        raise ValueError(NOT_COMPLETE.format(model_name_or_path))
    if not saved:
        raise ValueError(
            f"{model_name_or_path} holds no {CONFIG_FILE}: it is not a GEM checkpoint. To make one of a base model, "
            f"use SentenceTransformer(modules=[GemTransformer({str(model_name_or_path)!r})])."
        )


def load_settings(load_config: Callable[..., Any], path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, if they can be such; empty for a base.

    Args:
        load_config: Reads :data:`CONFIG_FILE`, as Sentence Transformers does.
        path: Folder or Hub id.
        hub_kwargs: How files are read from the Hub.

    Raises:
        ValueError: If they cannot be.
    """
    if split_gguf(path)[1]:
        return {}  # a base in one file
    options = {name: hub_kwargs.get(name, default) for name, default in HUB_KWARGS.items() if name != "cache_dir"}
    saved = load_config(path, cache_folder=hub_kwargs.get("cache_dir"), **options)
    check_settings(path, saved)
    return saved


def hub_kwargs_of(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """How files are read from the Hub, of the options that Sentence Transformers passes to ``load``.

    Raises:
        ValueError: If the backend is not ``"torch"``, or an option is one of the constructor.
    """
    if backend != "torch":
        raise ValueError(f"GEM checkpoints run on backend='torch', got {backend!r}.")
    if names := sorted(
        {*options} & {"max_seq_length", "num_gem_tokens", "pooling", "freeze_base", "processing_kwargs"}
    ):
        raise ValueError(
            f"A checkpoint is loaded with its own settings, but {names} were given. Set max_seq_length on the model; "
            "pass the others to the constructor, which checks them."
        )
    hub_kwargs = {name: options.get(name, default) for name, default in HUB_KWARGS.items()}
    return {**hub_kwargs, "cache_dir": options.get("cache_folder")}


class NamedDamage:
    """Context in which an error of reading a checkpoint names the file that is damaged."""

    def __init__(self, model_name_or_path: str, subfolder: str = "") -> None:
        self.path = model_name_or_path
        self.subfolder = subfolder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *details: object) -> None:
        if not isinstance(error, SafetensorError | UnicodeDecodeError | json.JSONDecodeError):
            return
        folder = Path(self.path, self.subfolder)
        files = sorted({*folder.glob("*.*"), *folder.glob(f"{ADAPTER_FOLDER}/*.*")})
        names = " and ".join(str(file.relative_to(folder)) for file in files if _is_damaged(file))
        raise ValueError(
            f"{names or 'A file of it, or of its base,'} is damaged ({error}), so that {self.path} cannot be loaded. "
            "Save or download it again."
        ) from error


def _is_damaged(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, ValueError):
        return True
    except OSError:
        pass  # it is not there, or not to be read: the error says that itself
    return False
