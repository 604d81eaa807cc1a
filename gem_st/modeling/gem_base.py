"""GemBase: the language model and the codec of its texts, loaded once."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import DynamicCache

from .gem_cache import GemCache, GemMemory, cache_name, expand_rows
from .gem_gguf import check_gguf
from .gem_mask import gem_attention_mask, gem_position_ids
from .gem_own_tokenizer import copy_backend, with_backend
from .gem_text import TextCodec
from .gem_weights import WeightsId, count_writes


class GemBase:
    """A decoder-only language model.

    Args:
        model: The ``*ForCausalLM``.
        text: The codec of its texts.
    """

    def __init__(self, model: Any, text: TextCodec) -> None:
        self.model = model
        self.text = text
        text.model_config = self.config
        self._weights_id = WeightsId()

    @classmethod
    def load(
        cls,
        source: str,
        model_kwargs: dict[str, Any],
        processor_kwargs: dict[str, Any],
        config_kwargs: dict[str, Any],
    ) -> GemBase:
        """Load from a folder or the Hub; options go to the ``from_pretrained`` of model, tokenizer and config."""
        tokenizer = AutoTokenizer.from_pretrained(source, **processor_kwargs)
        model = load_causal_lm(source, model_kwargs, config_kwargs)
        if "gguf_file" in model_kwargs:  # the class that transformers makes of it may add tokens that the file has not
            num_rows = model.get_input_embeddings().weight.shape[0]
            tokenizer = with_backend(tokenizer, copy_backend(tokenizer.backend_tokenizer, num_rows))
        return cls(model, TextCodec(tokenizer))

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config()

    @property
    def attention(self) -> str:
        """Name of the attention implementation."""
        return self.model.config._attn_implementation

    @property
    def context(self) -> float:
        """Positions that the model has, infinite where it does not say."""
        return getattr(self.config, "max_position_embeddings", None) or math.inf

    # ---- running it

    def run(self, past: DynamicCache | None = None, **inputs: Any) -> Tensor:
        """Run the model without its head; a cache is read, and written to. Shape: ``(B, T, D)``"""
        return run_backbone(self.model, past, **inputs)

    def read(
        self, input_ids: Tensor, width: int, shared: tuple[Tensor, DynamicCache] | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Read right-padded text, the first tokens of which may have been read as one row.

        Shapes: ``(B, T)`` -> ``(B, T, width)`` and its keys and values
        """
        nothing = torch.zeros((1, 0, width), dtype=self.model.dtype, device=self.model.device), DynamicCache()
        states, past = expand_rows(shared or nothing, len(input_ids))
        if input_ids.shape[1] == states.shape[1]:
            return states, past
        new_states = self.run(past, input_ids=input_ids[:, states.shape[1] :])
        return torch.cat([states, new_states], dim=1), past

    def states(self, input_ids: Tensor, segments: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Run the backbone on right-padded rows; without ``segments`` as a plain causal model, with no mask at all.

        Causality keeps padding on the right from every real token, so that only the GEM rule needs a mask.
        Shapes: ``(B, T)`` each -> ``(B, T, D)``
        """
        if segments is None or attention_mask is None:
            return self.run(input_ids=input_ids)
        mask = gem_attention_mask(self.model.config, segments, attention_mask, self.model.dtype)
        position_ids = gem_position_ids(segments, attention_mask)
        return self.run(input_ids=input_ids, attention_mask=mask, position_ids=position_ids)

    def logits(self, states: Tensor) -> Tensor:
        """The language model's logits. Shapes: ``(N, D)`` -> ``(N, V)``"""
        return output_logits(states, self.model.get_output_embeddings(), self.config)

    def probe(self, *token_ids: int) -> Tensor:
        """A row of token ids, to find out what the model does with it. Shape: ``(1, T)``"""
        return torch.tensor([token_ids], device=self.model.device)

    # ---- limits

    @property
    def rope_limit(self) -> float:
        """Length from which "longrope" turns all positions of a batch otherwise; infinite for other models."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return math.inf
        name = "original_max_position_embeddings"
        return float(rope.get(name) or getattr(self.config, name, None) or math.inf)

    def check_context(self, real: Tensor) -> None:
        """Raise if a row has more tokens than the model can tell places of. Shape: ``(B, T)``"""
        limit = min(self.context, self.rope_limit)
        longest = int(real.sum(dim=1).max()) if len(real) else 0
        if longest > limit:
            raise ValueError(
                f"{longest} tokens exceed the model's context of {limit} (with longrope: the original one, as keys are "
                "turned otherwise beyond it). Shorten the texts, or the cache with cache.crop(...)."
            )

    def check_cache(self, cache: GemCache) -> None:
        """Raise if a cache was not made by this model with these weights, or is elsewhere."""
        # Its class may come from another checkpoint's copy, also one of version 0.1.
        if getattr(cache, "kind", type(cache).__name__) != GemCache.kind:
            raise ValueError(
                f"A GemCache is needed, got {type(cache).__name__}. `prefill` makes one, and so does `generate` with "
                "return_cache=True; a cache of transformers may have dropped what lies outside a sliding window."
            )
        keys = cache.layers[0][0] if cache.layers else None
        if keys is None or len(cache) == 0:
            raise ValueError("The cache has no rows: there is nothing to embed, extend or continue.")
        if len(cache.layers) > self.config.num_hidden_layers or keys.dtype != self.model.dtype:
            raise ValueError(
                f"The cache has {len(cache.layers)} layers of {keys.dtype}, the model {self.config.num_hidden_layers} "
                f"of {self.model.dtype}: it was made by another model, or cast. Read the texts again with `prefill`."
            )
        if keys.device != self.model.device:
            raise ValueError(f"The cache is on {keys.device}, the model on {self.model.device}. Use cache.to(device).")
        self.check_weights(cache)

    def check_weights(self, cached: GemCache | GemMemory) -> None:
        """Raise if it was made by other weights."""
        if bool((cached.weights_tag != self.weights_id()).any()):
            raise ValueError(
                "The cache was made by other weights than the model's: by another model, before training, with another "
                "adapter on, or by a version before 0.2, which told weights apart otherwise. Read the texts again."
            )

    def check_vocabulary(self, model_name_or_path: str | Path, gem_token_ids: Sequence[int] = ()) -> None:
        """Raise if the tokenizer, or GEM tokens that the weights should hold, need more rows than there are."""
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        tokenizer = self.text.tokenizer
        padding = tokenizer.pad_token  # never read
        last_id = max(row for token, row in tokenizer.get_vocab().items() if token != padding)
        if last_id >= num_rows:
            raise ValueError(
                f"The tokenizer of {model_name_or_path} produces ids up to {last_id}, but the model has only "
                f"{num_rows} vocabulary rows. Use the tokenizer the model was trained with, or resize its embeddings."
            )
        if max(gem_token_ids, default=0) >= num_rows:
            raise ValueError(
                f"{model_name_or_path} names gem_token_ids {list(gem_token_ids)}, but its model has only {num_rows} "
                "vocabulary rows: weights and gem_config.json are not of one checkpoint. Save or download it again."
            )

    # ---- its weights

    def vocabulary_matrices(self) -> list[Tensor]:
        """Embedding and output matrix, or the one that is both. Shape: ``(V, D)`` each"""
        weights = [self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight]
        return list({id(weight): weight for weight in weights}.values())

    def linear_names(self) -> list[str]:
        """Names of the linear layers, without the output head."""
        head = self.model.get_output_embeddings()
        modules = self.model.named_modules()
        return sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Linear) and m is not head})

    def num_writes(self) -> int:
        """A number that grows whenever the weights are changed in place."""
        return sum(count_writes(weight) for weight in self.model.parameters())

    def weights_id(self) -> int:
        """A number that tells the weights that make keys and values from others, see :class:`WeightsId`."""
        return self._weights_id(backbone_of(self.model))


def backbone_of(model: Any) -> Any:
    """A model without its language-model head."""
    for backbone in (model.base_model, model.get_decoder()):
        if backbone is not model:
            return backbone
    embeddings = model.get_input_embeddings()
    parts = (part for part in model.children() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.get_input_embeddings() is embeddings), model)


def run_backbone(model: Any, past: DynamicCache | None = None, **inputs: Any) -> Tensor:
    """Run a model without its language-model head; a cache is read, and written to. Shape: ``(B, T, D)``"""
    backbone = backbone_of(model)
    if past is None:
        return backbone(use_cache=False, **inputs).last_hidden_state
    num_past = past.get_seq_length()
    inputs[cache_name(type(backbone).forward)] = past
    states = backbone(use_cache=True, **inputs).last_hidden_state
    if past.get_seq_length() != num_past + states.shape[1]:
        raise RuntimeError(f"{type(backbone).__name__} did not write what it read to the cache it was given.")
    return states


def output_logits(states: Tensor, lm_head: nn.Module, config: Any) -> Tensor:
    """The language model's logits, with the factors and the cap of its config. Shapes: ``(N, D)`` -> ``(N, V)``"""
    logits = lm_head(states).float()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1:  # of as many elements as the vocabulary has rows, which a factor of 1 would copy
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def configured_ids(model: Any) -> set[int]:
    """Vocabulary rows that a model's configurations give a meaning (padding, start, end)."""
    ids: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, key, None)
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def load_causal_lm(model_name_or_path: str, model_kwargs: dict[str, Any], config_kwargs: dict[str, Any]) -> Any:
    """Load a decoder with its language-model head, and refuse one of which a weight is missing."""
    config = AutoConfig.from_pretrained(model_name_or_path, **config_kwargs)
    needed = "GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
    if config.is_encoder_decoder:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) is an encoder-decoder model. {needed}")
    has_remote_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_remote_code:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) has no causal language-model head. {needed}")
    if "gguf_file" in config_kwargs:
        check_gguf(config_kwargs["gguf_file"], config)
    if "gguf_file" in config_kwargs and hasattr(transformers, "GgufConfig"):  # from 5.24; before, none stayed in blocks
        model_kwargs = {"quantization_config": transformers.GgufConfig(dequantize=True), **model_kwargs}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_name_or_path, config=config, output_loading_info=True, **model_kwargs
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{model_name_or_path} lacks weights of {type(model).__name__}: {missing}. They would be random; use a "
            "checkpoint saved with its language-model head (AutoModelForCausalLM, not AutoModel)."
        )
    _keep_differentiable(model)
    return model


def _keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit layers for CPUs with bf16 instructions when they are first evaluated.

    A packed layer passes no gradient on, and does not run below a width of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class WithAdvice:
    """Context in which an error of having run out of memory says what to ask for instead."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *details: object) -> None:
        if kind is not None and (issubclass(kind, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise kind(
                f"{error}\nOut of memory: use a smaller batch_size, or a smaller max_seq_length (max_length) for long "
                "texts. The model is as it was."
            ) from error


class Evaluating(WithAdvice):
    """Context in which a module is in evaluation mode; its parts are afterwards in the mode that each was in.

    Of several threads that are in it at once, the last one to leave puts the modes back.
    """

    lock = threading.Lock()
    inside: ClassVar[WeakKeyDictionary[nn.Module, set[Evaluating]]] = WeakKeyDictionary()
    """Who is in it, by the parts that were in training mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        with self.lock:
            for part in self.module.modules():
                if part.training or part in self.inside:
                    self.inside.setdefault(part, set()).add(self)
                    part.training = False

    def __exit__(self, *exc_info: Any) -> None:
        with self.lock:
            for part in [part for part, holders in self.inside.items() if self in holders]:
                self.inside[part].remove(self)
                if not self.inside[part]:
                    del self.inside[part]
                    part.training = True
        super().__exit__(*exc_info)

    @classmethod
    def stay(cls, module: nn.Module) -> None:
        """Leave a module in evaluation mode, whoever is in this context."""
        if not cls.inside:
            return
        with cls.lock:
            for part in module.modules():
                cls.inside.pop(part, None)

    @classmethod
    def forget_threads(cls) -> None:
        """Forget what threads of another process are in, of which this one is a copy."""
        cls.lock, cls.inside = threading.Lock(), WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Evaluating.forget_threads)  # which may hold the lock for ever
