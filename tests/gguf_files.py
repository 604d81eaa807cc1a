"""GGUF files as llama.cpp's converter writes them, of small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(
    gem: Any,
    path: Path,
    kind: str = "llama",
    quantized: str = "F32",
    tokens: list[str] | None = None,
    then: Callable[[gguf.GGUFWriter], object] = bool,
) -> Path:
    """Write a GEM model's base: names of tensors, Llama's queries and keys in pairs, and all that a file says beside.

    Args:
        gem: The model.
        path: The file.
        kind: What llama.cpp calls the architecture.
        quantized: Type of the matrices.
        tokens: Other names of the tokens.
        then: Is called with the writer in the end, for what else a file may say.
    """
    config, tokenizer, writer = gem.model.config, gem.tokenizer, gguf.GGUFWriter(path, kind)
    named = sorted((row, token) for token, row in tokenizer.get_vocab().items())
    vocabulary = [token for row, token in named if row < config.vocab_size]  # one to pad with may have no row
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 1e4))
    writer.add_key_length(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_value_length(config.head_dim or config.hidden_size // config.num_attention_heads)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens or vocabulary)
    types = gguf.TokenType
    writer.add_token_types([types.CONTROL if token in special else types.NORMAL for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, quantization = gguf.get_tensor_name_map(arch, config.num_hidden_layers), gguf.GGMLQuantizationType[quantized]
    for name, weight in gem.model.state_dict().items():
        values, place = weight.float().numpy(), name.removesuffix(".weight").removesuffix(".bias")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(place.split(".")[-1])
        if heads and kind == "llama":
            pairs = values.reshape(heads, 2, len(values) // heads // 2, -1)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if kind == "gemma3" and place.endswith("norm"):
            values = values + 1
        found = names.get_name(place)
        if found is not None and (name != "lm_head.weight" or not config.tie_word_embeddings):
            data = gguf.quantize(values, quantization) if values.ndim > 1 else values
            writer.add_tensor(
                f"{found}.{name.rpartition('.')[2]}", data, raw_dtype=quantization if values.ndim > 1 else None
            )
    then(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
