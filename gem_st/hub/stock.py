"""Checkpoints of Sentence Transformers' own modules, which need no remote code: K = 1 in full mode."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerFast

from ..files import read_json, write_json
from ..finding import require_gem
from ..modeling.gem_files import save_model

STOCK_FOLDER = "embedding"
"""Folder of a stock export in which a complete Sentence-Transformers checkpoint lies."""


def check_stock(model: SentenceTransformer) -> None:
    """Make sure that a model can be made of Sentence Transformers' own modules.

    Raises:
        ValueError: If it cannot, with the reason.
    """
    gem = require_gem(model)
    if gem.freeze_base:
        raise ValueError(
            "A frozen base cannot be exported to stock modules: its LoRA works on GEM tokens only, and no stock module "
            'or serving engine can switch it on in the middle of a row. Use format="gem".'
        )
    if gem.has_adapter:
        raise ValueError("The model holds a LoRA. Merge it first: gem_st.merge_lora(model).")
    if gem.num_gem_tokens > 1:
        raise ValueError(
            f"The model has {gem.num_gem_tokens} GEM tokens; stock modules can append one, and no attention mask keeps "
            'two apart. Use format="gem", or train with num_gem_tokens=1. An engine that takes token ids can serve '
            "it: the mean of K requests, one for each GEM token, equals the embedding (docs/serving.md)."
        )
    if not isinstance(gem.tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(gem.tokenizer).__name__} has no tokenizer.json that a GEM token could be appended in.")


def save_stock(model: SentenceTransformer, folder: Path, probe_texts: Sequence[str]) -> None:
    """Write the generator at the root, and a Sentence-Transformers checkpoint that shares its weights beside it.

    Args:
        model: A model that :func:`check_stock` lets pass.
        folder: An empty folder.
        probe_texts: Texts of which both tokenizers have to give the same ids.

    Raises:
        ValueError: If a module or the tokenizer cannot be written in stock form.
    """
    gem, inner = require_gem(model), folder / STOCK_FOLDER
    save_model(gem.model, gem.source, folder)
    gem.save_tokenizer(str(folder))
    _name_for_older_readers(gem, folder)
    inner.mkdir()
    for file in [folder / "config.json", *folder.glob("model*.safetensors*")]:
        _link(file, inner / file.name)
    _tokenizer_with_gem_token(gem, probe_texts).save_pretrained(inner)
    _update_json(inner / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    settings = {"max_seq_length": gem.max_seq_length, "do_lower_case": False}
    write_json(inner / "sentence_bert_config.json", settings)
    modules: list[Any] = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append(_save_pooling(gem, inner))
    for index, module in enumerate(list(model.children())[1:], start=2):
        modules.append(_save_module(module, index, inner))
    outer: Any = model
    config = {**outer._get_model_config(), "requirements": {"sentence-transformers": ">=5.4", **_transformers_4(gem)}}
    for place, prefix in ((inner, ""), (folder, STOCK_FOLDER)):
        prefixed = [{**module, "path": "/".join(filter(None, (prefix, module["path"])))} for module in modules]
        write_json(place / "modules.json", prefixed)
        write_json(place / "config_sentence_transformers.json", config)


def _transformers_4(gem: Any) -> dict[str, str]:
    """Empty if transformers 4 is known to read the model right, otherwise a requirement that keeps it from that."""
    config = gem.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    is_plain = "partial_rotary_factor" not in rope and not any(isinstance(value, dict) for value in rope.values())
    known = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neo")
    return {} if is_plain and config.model_type in known else {"transformers": ">=5"}


def _name_for_older_readers(gem: Any, folder: Path) -> None:
    """Write, beside the names of transformers 5, those that transformers 4 and the engines on it read.

    Without the rotary base under its old name they would use 10,000, and give wrong vectors without a word.
    """
    if read_json(folder / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend":
        _update_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    rope = read_json(folder / "config.json").get("rope_parameters") or {}
    if "rope_theta" in rope:
        _update_json(folder / "config.json", rope_theta=rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        _update_json(folder / "config.json", rope_scaling=scaling)
    if (gem.source.folder / "tokenizer.model").exists():  # which llama.cpp's converter reads
        shutil.copyfile(gem.source.folder / "tokenizer.model", folder / "tokenizer.model")


def _update_json(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


def _save_pooling(gem: Any, inner: Path) -> dict[str, Any]:
    """Last-token pooling in the schema of today, and in the one that text-embeddings-inference reads."""
    legacy = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    settings = {"embedding_dimension": gem.get_embedding_dimension(), "pooling_mode": "lasttoken"}
    settings |= {f"pooling_mode_{name}": name == "lasttoken" for name in legacy}
    (inner / "1_Pooling").mkdir()
    write_json(inner / "1_Pooling" / "config.json", {**settings, "include_prompt": True})
    return {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def _save_module(module: Any, index: int, inner: Path) -> dict[str, Any]:
    """Save a module behind the pooling, under the name that Sentence Transformers of any version and engines know."""
    name = type(module).__name__
    if not type(module).__module__.startswith("sentence_transformers."):
        raise ValueError(f'{name} is no module of Sentence Transformers\' own. Use format="gem".')
    path = f"{index}_{name}"
    (inner / path).mkdir()
    module.save(str(inner / path))
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}


def _tokenizer_with_gem_token(gem: Any, probe_texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """The base's tokenizer with a post-processor that appends the GEM token, after truncation.

    The token has an id only and no entry in the vocabulary, so that no text can spell it.

    Raises:
        ValueError: If it gives other ids than the model's own module.
    """
    original: Any = gem.tokenizer
    state = json.loads(original.backend_tokenizer.to_str())
    # A text could spell what was added to the tokenizer after the model was made, such as a padding token.
    kept = (token for token in state["added_tokens"] if gem.base.text.is_readable(token["id"]))
    state["added_tokens"] = list(kept) if gem.gem_token_source != "reserved" else state["added_tokens"]
    state["post_processor"] = append_to_template(state["post_processor"], "<|gem|>", gem.gem_token_ids[0])
    backend = type(original.backend_tokenizer).from_str(json.dumps(state))
    names = {key: getattr(original, key) for key in ("bos_token", "eos_token", "unk_token") if getattr(original, key)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_pad_token(gem),
        padding_side="right",
        truncation_side=original.truncation_side,
        model_max_length=gem.max_seq_length,
        split_special_tokens=original.split_special_tokens,
        **names,
    )
    special = [str(token) for token in original.added_tokens_decoder.values()]
    own = original.convert_ids_to_tokens(gem.gem_token_ids)
    for text in [*probe_texts, " a".join(token for token in special[:64] if token not in own)]:
        ids = tokenizer(text, truncation=True, max_length=gem.max_seq_length)["input_ids"]
        expected = gem.preprocess([text])["input_ids"][0].tolist()
        if ids != expected:
            raise ValueError(
                f"The GEM token cannot be appended by a post-processor of this tokenizer: {text!r:.40} gives {ids}, "
                f'and should give {expected}. Use format="gem".'
            )
    return tokenizer


def append_to_template(processor: dict[str, Any] | None, token: str, token_id: int) -> dict[str, Any]:
    """A post-processor, as ``tokenizer.json`` holds it, that also appends a token to every row.

    A template takes the token as its last piece: tokenizers reads two templates in a row as a pair of texts, and panics
    where the first one has three pieces.
    """
    processor = processor or {"type": "Sequence", "processors": []}
    steps = list(processor["processors"]) if processor["type"] == "Sequence" else [processor]
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    bare: dict[str, Any] = {"type": "TemplateProcessing", "single": [text], "pair": [text, other], "special_tokens": {}}
    places = [index for index, step in enumerate(steps) if step["type"] == "TemplateProcessing"]
    template = steps.pop(places[-1]) if places else bare
    rows = {name: [*template[name], {"SpecialToken": {"id": token, "type_id": 0}}] for name in ("single", "pair")}
    special = {**template["special_tokens"], token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {"type": "Sequence", "processors": [*steps, {**template, **rows, "special_tokens": special}]}


def _pad_token(gem: Any) -> str:
    """A token for padding that is special already: to name another one would take its text out of all texts."""
    special = {token_id: str(token) for token_id, token in gem.tokenizer.added_tokens_decoder.items() if token.special}
    if not special:
        raise ValueError('This tokenizer has no special token to pad with. Give it a pad_token, or use format="gem".')
    return special.get(gem.base.text.pad_token_id, next(iter(special.values())))


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
