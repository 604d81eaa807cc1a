"""The base on the disk: where it is, which files its weights are in, how it is recognised, and copying it."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from .gem_base import GemBase, load_causal_lm
from .gem_gguf import find_gguf, split_gguf
from .gem_own_tokenizer import copy_tokenizer

logger = logging.get_logger(__name__)

VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of a configuration that say nothing of the model."""


@dataclass
class BaseSource:
    """Where a base was loaded from.

    Attributes:
        folder: The folder of its files, or the one GGUF file that it is; it may be gone by now.
        fingerprint: Output of :func:`fingerprint_base`.
        use_cache: What its configuration says of caches, which trainers overwrite.
        num_writes: :meth:`GemBase.num_writes` when it had been loaded.
        is_gguf: Whether it is a GGUF file.
    """

    folder: Path
    fingerprint: dict[str, str | None]
    use_cache: bool | None = None
    num_writes: int = 0
    is_gguf: bool = False


class FoundBase(NamedTuple):
    """Where a base is loaded from, and what checkpoints call it."""

    load_from: str
    load_kwargs: dict[str, Any]
    name: str
    revision: str | None


def find_base(
    model_name_or_path: str, saved: dict[str, Any], is_frozen: bool, hub_kwargs: dict[str, Any], gguf_file: str | None
) -> FoundBase:
    """Find the weights of the base.

    Args:
        model_name_or_path: A base, or a GEM checkpoint.
        saved: Settings of the latter.
        is_frozen: Whether it is an adapter beside a frozen base.
        hub_kwargs: How files are read from the Hub.
        gguf_file: The GGUF file that the base is, in its folder or elsewhere.

    Raises:
        ValueError: If a checkpoint names a base that cannot be had, or weights outside its folder.
    """
    check_weight_maps(Path(model_name_or_path, hub_kwargs.get("subfolder") or ""))
    has_base = saved.get("save_base", True)
    if saved and has_base and gguf_file:
        raise ValueError(f"{model_name_or_path} is a GEM checkpoint that holds its base. Leave out gguf_file.")
    if not saved or (has_base and not is_frozen):
        source, file = (model_name_or_path, gguf_file) if gguf_file else split_gguf(model_name_or_path)
        if file and hub_kwargs.get("subfolder"):
            raise ValueError("Of a GGUF file the subfolder is part of its name: gguf_file='folder/model.gguf'.")
        name = str(Path(source).resolve() if Path(source).is_dir() else source)
        if file:
            path = find_gguf(source, file, **hub_kwargs)
            return FoundBase(str(path.parent), {"gguf_file": str(path)}, f"{name}/{file}", None)
        return FoundBase(source, {}, name, None)
    base, revision = saved.get("base_model_name_or_path", ""), saved.get("base_model_revision")
    if has_base:
        return FoundBase(model_name_or_path, {}, base, revision)
    if gguf_file and not Path(gguf_file).is_file():
        raise ValueError(f"gguf_file={gguf_file!r} is not there; the base of {model_name_or_path} is {base!r}.")
    # Not resolved: a link of the Hub's cache leads to a file of another name.
    place = str(Path(gguf_file).absolute()) if gguf_file else base
    base = place if is_local(base) else base
    source, file = split_gguf(place)
    options: dict[str, Any] = {"revision": revision, "subfolder": ""}
    try:
        if file:
            path = find_gguf(source, file, **{**hub_kwargs, **options})
            return FoundBase(str(path.parent), {"gguf_file": str(path)}, base, revision)
        if cached_file(source, "config.json", **{**hub_kwargs, **options}) is None:
            raise OSError("it has no config.json.")  # of a folder, transformers does not say it
    except OSError as error:
        way = ', or pass model_kwargs={"gguf_file": "where/it/is.gguf"}' if file else ""
        raise ValueError(
            f"{model_name_or_path} holds an adapter only; its base, {base!r} (revision "
            f"{revision}), cannot be loaded: {error}\nMake it available, or edit "
            f"base_model_name_or_path in gem_config.json to where you keep it{way}."
        ) from error
    check_weight_maps(Path(source))
    return FoundBase(source, options, base, revision)


def locate(found: FoundBase, base: GemBase, hub_kwargs: dict[str, Any]) -> tuple[BaseSource, str | None]:
    """Where the files of a loaded base are, and its commit on the Hub."""
    # In the Hub's cache files are links: their names lie in one folder, what they point to in another.
    file = found.load_kwargs.get("gguf_file")
    path = Path(file or str(cached_file(found.load_from, "config.json", **{**hub_kwargs, **found.load_kwargs})))
    folder = path if file else path.absolute().parent
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    is_named = found.revision is None and (file or found.load_from == found.name)
    revision = commit[1] if commit and is_named else found.revision
    fingerprint = fingerprint_base(folder, base.text.tokenizer)
    use_cache = getattr(base.model.config, "use_cache", None)
    return BaseSource(folder, fingerprint, use_cache, is_gguf=file is not None), revision


def is_local(base: str) -> bool:
    """True for a base that is named by a folder, also one that is gone by now; empty names are none of the Hub's."""
    folder, _ = split_gguf(base)
    return Path(folder).is_absolute() or Path(folder).is_dir()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads a model's weights from; empty if there are none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def check_weight_maps(folder: Path) -> None:
    """Raise if a model's files name weights that are elsewhere. Of what is no folder the Hub's client sees to it."""
    for index in folder.glob("*.index.json") if folder.is_dir() else ():
        names = {*json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()}
        if outside := sorted(name for name in names if Path(name).name != name):
            raise ValueError(
                f"{index} names weights outside its folder: {outside}. Put them there, or do not trust it."
            )


def read_weights(folder: Path, *, sample: bool) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, rows and row numbers of each weight in a model's files; of a sample the first, middle and last row."""
    paths = weight_files(folder)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                weight = file.get_slice(name)
                if not sample:
                    yield name, file.get_tensor(name), ...
                elif rows := _sample_rows(weight.get_shape()):
                    yield name, torch.cat([weight[row : row + 1] for row in rows]), rows
    for path in [] if paths else sorted(folder.glob("pytorch_model*.bin")):
        for name, weight in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
            if not sample:
                yield name, weight, ...
            elif rows := _sample_rows(weight.shape):
                yield name, weight[rows], rows


def read_gguf(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Any]]:
    """As :func:`read_weights`, of a GGUF file, by loading it once more."""
    options = {"gguf_file": str(file)}
    model = load_causal_lm(str(file.parent), {**options, "dtype": dtype}, options)
    yield from ((name, weight, ...) for name, weight in model.named_parameters())


def _sample_rows(shape: Sequence[int]) -> list[int]:
    num_rows = shape[0] if len(shape) else 0
    return sorted({0, num_rows // 2, num_rows - 1}) if num_rows else []


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase, added: str | None = None) -> str:
    """What a tokenizer is recognised by: a hash of its vocabulary, and of how it reads a text.

    Args:
        tokenizer: The tokenizer.
        added: A token that does not count.
    """
    text = "The quick brown fox, 3.14 \u00e9\u4e16 \n"
    vocabulary = sorted((token, row) for token, row in tokenizer.get_vocab().items() if token != added)
    return _hash([vocabulary, copy_tokenizer(tokenizer)(text)["input_ids"]])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: BaseSource, expected: str | None) -> None:
    """Raise if a checkpoint's tokenizer is not the one it was saved with, where it says which that was.

    A padding token is never read, so that it may have been added.
    """
    if not expected or expected == source.fingerprint["tokenizer"]:
        return
    if expected != fingerprint_tokenizer(tokenizer, tokenizer.pad_token):
        raise ValueError(
            f"The tokenizer of {source.folder} reads texts otherwise than the one it was saved with. Put its files "
            "back, leave out processor_kwargs that change it, or, if it is meant to, take tokenizer_sha256 out of "
            "gem_config.json."
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint_base(
    folder: Path, tokenizer: PreTrainedTokenizerBase, added: str | None = None
) -> dict[str, str | None]:
    """What a base is recognised by: hashes of its config, its tokenizer and a sample of its weights.

    They are taken from files, so that they do not depend on the data type or quantisation it is loaded with. Of a GGUF
    file it is the SHA-256 of all of it, by which others know it as well.

    Args:
        folder: Where it is.
        tokenizer: Its tokenizer.
        added: A token that does not count.
    """
    if folder.is_file():
        with open(folder, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest = hashlib.sha256(content).hexdigest()
        return {"config": None, "tokenizer": fingerprint_tokenizer(tokenizer, added), "weights": digest}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = sorted(
        (name, str(sample.dtype), hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, sample, _ in read_weights(folder, sample=True)
    )
    return {
        "config": _hash(_without(config, *VOLATILE_CONFIG_KEYS)),
        "tokenizer": fingerprint_tokenizer(tokenizer, added),
        "weights": _hash(weights) if weights else None,
    }


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def check_base_unchanged(base: GemBase, source: BaseSource, is_frozen: bool) -> None:
    """Make sure that base and adapter will find each other: on the disk and in memory, weights are as loaded.

    All weights are compared if any was written to since loading, otherwise a sample.

    Raises:
        ValueError: If they are not.
    """
    if not source.folder.exists():
        return
    tokenizer = base.text.tokenizer
    # A padding token is never read, so that it may be added at any time.
    fingerprints = (fingerprint_base(source.folder, tokenizer, added) for added in (None, tokenizer.pad_token))
    if source.fingerprint not in fingerprints:
        raise ValueError(
            f"The base in {source.folder} was changed since it was loaded, on the disk or by tokens added to its "
            "tokenizer. Put it back to save."
        )
    # In full mode the vocabulary may hold GEM rows of our own.
    skipped = [] if is_frozen else [id(matrix) for matrix in base.vocabulary_matrices()]
    weights = {
        name.removeprefix("_orig_mod.").replace(".base_layer.", "."): weight
        for name, weight in base.model.named_parameters()
    }
    # Some optimizers write without being counted, but only to what takes gradients.
    is_touched = base.num_writes() != source.num_writes
    is_touched |= any(weight.requires_grad for weight in base.model.parameters())
    stored_weights: Iterator[tuple[str, Tensor, Any]]
    if source.is_gguf:
        stored_weights = read_gguf(source.folder, base.model.dtype) if is_touched else iter(())
    else:
        stored_weights = read_weights(source.folder, sample=not is_touched)
    for name, stored, rows in stored_weights:
        weight = weights.get(name)
        if weight is None or weight.is_meta or id(weight) in skipped or not weight.is_floating_point():
            continue  # quantised, on the disk, or named otherwise in memory
        if weight[rows].shape == stored.shape and not torch.equal(weight[rows].cpu(), stored.to(weight.dtype)):
            raise ValueError(
                f"The base's weight {name} was changed after loading, so that an adapter saved for "
                f"{source.folder} would not fit it. Use freeze_base=False, or do not unfreeze the base."
            )


def save_model(model: Any, source: BaseSource, folder: Path, **kwargs: Any) -> None:
    """Write a language model as its base was published, whatever a trainer set in its configuration.

    Generation configurations are not checked: published ones, such as that of Llama 2, may have options that belong to
    sampling only, and GEM adds its own to them, whereupon transformers would refuse to write them after a training.

    Args:
        model: The ``*ForCausalLM``.
        source: Where its base was loaded from.
        folder: The folder.
        **kwargs: Passed to ``save_pretrained``.
    """
    generation_config, settings = model.generation_config, vars(model.config)
    had = {name: settings.pop(name) for name in ("use_cache",) if name in settings}
    try:
        model.generation_config = type(generation_config)()
        settings |= {} if source.use_cache is None else {"use_cache": source.use_cache}
        model.save_pretrained(folder, **kwargs)
    finally:
        model.generation_config = generation_config
        settings |= had
    generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def copy_base(model: Any, source: BaseSource, folder: Path, **kwargs: Any) -> None:
    """Copy the base's files byte for byte; written anew only where they are not safetensors, or gone."""
    weights = weight_files(source.folder)
    if not weights:
        logger.warning(f"{source.folder} holds no safetensors (any more): the base's weights are written anew.")
        save_model(model, source, folder, **kwargs)
        return
    others = ("config.json", "generation_config.json", "model.safetensors.index.json")
    for file in [*weights, *(source.folder / name for name in others)]:
        if file.exists():
            shutil.copyfile(file, folder / file.name)
