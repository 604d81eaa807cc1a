"""Whether two models are the same: compared weight by weight, or by digests of all that they compute from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

PROVENANCE_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")
"""Settings that say where a model comes from, not what it computes."""


NEUTRAL_KEYS = (*PROVENANCE_KEYS, "architectures", "torch_dtype", "dtype", "use_cache")
"""Those, and settings that change nothing that is computed by given weights."""


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """True if two language models compute the same: all weights equal to the bit, in the same architecture.

    Args:
        model: A language model.
        other: Another one.
    """
    first, second = model.state_dict(), other.state_dict()
    settings = [{k: v for k, v in m.config.to_dict().items() if k not in NEUTRAL_KEYS} for m in (model, other)]
    if type(model) is not type(other) or first.keys() != second.keys() or settings[0] != settings[1]:
        return False
    return all(torch.equal(first[name], second[name].to(first[name].device)) for name in first)


def digest_generator(model: PreTrainedModel, tokenizer: Any) -> str:
    """Short digest of a language model's weights, settings and tokenizer, which names the folder of its answers."""
    digest = hashlib.sha256()
    update_settings(digest, [describe_settings(model), describe_tokenizer(tokenizer)])
    update_digest(digest, model.state_dict())
    return digest.hexdigest()[:16]


def fingerprint(model: SentenceTransformer) -> str:
    """Digest of all that scores depend on: weights, data types, settings, tokenizer, prompts, lengths and similarity.

    Args:
        model: Any SentenceTransformer.

    Returns:
        40 hexadecimal digits.
    """
    digest = hashlib.sha256()
    update_digest(digest, model.state_dict())
    settings: list[Any] = [type(model).__name__, model.prompts, model.default_prompt_name, model.max_seq_length]
    settings += [model.truncate_dim, model.similarity_fn_name]
    for module in cast("Iterable[Any]", model):
        read = next((getattr(module, name) for name in ("settings", "get_config_dict") if hasattr(module, name)), None)
        settings += [type(module).__name__, read and read()]
    settings += [describe_settings(model), describe_tokenizer(getattr(model, "tokenizer", None))]
    update_settings(digest, settings)
    return digest.hexdigest()[:40]


def describe_settings(model: nn.Module) -> list[Any]:
    """Settings of the language models and adapters in a model, which its weights do not tell: activations, scales.

    Args:
        model: Any module.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        adapters = getattr(module, "peft_config", None)
        for config in (getattr(module, "config", None), *(adapters.values() if isinstance(adapters, dict) else ())):
            if hasattr(config, "to_dict"):
                found[id(config)] = {k: v for k, v in config.to_dict().items() if k not in PROVENANCE_KEYS}
    return list(found.values())


def describe_tokenizer(tokenizer: Any) -> list[Any]:
    """What a tokenizer does to a text, whatever was set for the last batch.

    Args:
        tokenizer: One of transformers or of ``tokenizers``; None for none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    rules = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    words = tokenizer.get_vocab() if not rules and hasattr(tokenizer, "get_vocab") else None
    names = ("special_tokens_map", "chat_template", "padding_side", "truncation_side")
    return [type(tokenizer).__name__, rules, words, *(getattr(tokenizer, name, None) for name in names)]


def update_settings(digest: Any, settings: Any) -> None:
    """Take settings into a digest.

    Args:
        digest: One of hashlib.
        settings: Lists and dicts of what has a name; sets count the same in any order.
    """
    text = json.dumps(settings, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))
    digest.update(text.encode())


def update_digest(digest: Any, state: Mapping[str, Any]) -> None:
    """Take weights into a digest.

    Args:
        digest: One of hashlib.
        state: A state dict; what is no tensor in it is left out.
    """
    for name, value in state.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
