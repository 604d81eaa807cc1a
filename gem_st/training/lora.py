"""Merging a LoRA on every token into the weights."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from ..finding import require_gem


def merge_lora(model: SentenceTransformer) -> None:
    """Merge a LoRA that works on every token (`SentenceTransformer.add_adapter`) into the weights, in place.

    Embeddings stay the same to 1e-5; afterwards the model is saved as a whole, without an adapter.

    Args:
        model: A model whose first module is a GemTransformer.

    Raises:
        ValueError: If there is nothing to merge, or merging would not be exact.
    """
    gem = require_gem(model, "merge_lora")
    lm = gem.model
    if gem.freeze_base:
        raise ValueError(
            "The LoRA of a frozen base cannot be merged: it works on GEM tokens only, and merged weights would "
            "work on the text as well, which changes both the embeddings and the generator. Save it as it is."
        )
    if not gem.has_adapter:
        raise ValueError("There is no adapter to merge. model.add_adapter(LoraConfig(...)) adds one.")
    if dtypes := {p.dtype for p in lm.parameters()} - {torch.float32}:
        raise ValueError(
            f"Merging into weights of {', '.join(sorted(map(str, dtypes)))} would round them, and change the "
            'embeddings. Save the adapter, load it with model_kwargs={"dtype": "float32"}, merge, cast afterwards.'
        )
    has_lora_on_head = any(hasattr(module, "lora_A") for module in lm.get_output_embeddings().modules())
    if has_lora_on_head and lm.config.get_text_config().tie_word_embeddings:
        raise ValueError("The LoRA is on an output head that is tied to the embedding: merging would change both.")
    modules: list[tuple[str, Any]] = list(lm.named_modules())
    for name, module in modules:
        if hasattr(module, "unload_and_optionally_merge_module"):  # the embedding, with its trained rows
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif hasattr(module, "get_base_layer") and ".token_adapter" not in name:
            module.merge(safe_merge=True)
            merged = module.get_base_layer()
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(lm.get_submodule(parent), child, merged)
    del lm.peft_config
    lm._hf_peft_config_loaded = False
    lm.requires_grad_(True)
    gem.save_base = True
