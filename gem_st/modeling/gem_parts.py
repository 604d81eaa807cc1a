"""What a GEM module is made of, and what it says of itself."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .gem_base import GemBase, backbone_of
from .gem_dtypes import WeightTypes
from .gem_embedder import Embedder
from .gem_files import BaseSource
from .gem_generator import Generator, Reader
from .gem_probes import BaseFacts, require_attention_mask
from .gem_tokens import GemTokens

LAUNCH = (
    "Start the training with `accelerate launch`, which gives each GPU a process of its own (docs/distributed.md), or "
    "show it one GPU: CUDA_VISIBLE_DEVICES=0."
)
"""What to do where a trainer sees several GPUs."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, FSDP and activation checkpointing keep the model they wrap."""

IGNORED, DONE = ("task", "modality"), {"truncation": True, "padding": True, "return_attention_mask": True}
"""Options of `preprocess` that say nothing of texts, and those of tokenizers that are done in any case."""


def max_length_of(
    max_length: int | None, processing_kwargs: dict[str, dict[str, Any]] | None, others: dict[str, Any]
) -> int | None:
    """The number of tokens in a row that is asked for, by one of two names.

    Raises:
        ValueError: If something else is asked for, which would be ignored.
    """
    asked = {name: value for name, value in others.items() if name not in IGNORED and value is not None}
    text = dict((processing_kwargs or {}).get("text") or {})
    asked |= {name: value for name, value in (processing_kwargs or {}).items() if name != "text" and value}
    asked |= {name: value for name, value in text.items() if name != "max_length" and value is not DONE.get(name)}
    given = max_length if max_length is not None else text.get("max_length")
    if asked or text.get("max_length", given) != given:
        raise ValueError(
            f"Texts are truncated and padded, and GEM tokens put behind them, in one way; of options there is "
            f'max_length, or processing_kwargs={{"text": {{"max_length": ...}}}}, but {asked or text} were given.'
        )
    return given


def check_model(model: Any) -> None:
    """Raise if something cannot stand in for a base's language model, such as a wrapper that hides it."""
    for name in WRAPPERS:
        model = getattr(model, name, model)
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        return
    raise ValueError(
        f"model[0].model has to be a language model of transformers with its head, but got "
        f"{type(model).__name__}. For a LoRA, use model.add_adapter(LoraConfig(...)) on the SentenceTransformer; for "
        "several GPUs, `accelerate launch`."
    )


class GemParts(nn.Module):
    """The parts that :class:`GemTransformer` puts together.

    Attributes:
        model: The ``*ForCausalLM``.
        adapter_model: Beside a frozen base, a second model of the same weights with a LoRA.
        gem_embeddings: Beside a frozen base, the embeddings of the GEM tokens, but for those of existing tokens.
            Shape: ``(K, D)``
        logit_scale: Log of the factor on cosine similarities in :class:`gem_st.GemLoss`. Shape: ``(1,)``
        base: The model with the codec of its texts.
        facts: What the base can do.
        gem_tokens: The GEM tokens.
        embedder: Rows or caches -> embeddings; without state.
        reader: Token ids into a cache; without state.
        generator: Continues token ids or caches.
        source: Where the base was loaded from.
    """

    model: Any  # a PreTrainedModel with a language-model head; typed loosely, as its methods depend on its class
    adapter_model: Any
    gem_embeddings: nn.Parameter | None
    logit_scale: nn.Parameter
    base: GemBase
    facts: BaseFacts
    gem_tokens: GemTokens
    embedder: Embedder
    reader: Reader
    generator: Generator
    source: BaseSource
    freeze_base: bool
    save_base: bool
    save_dtype: torch.dtype | None
    base_model_name_or_path: str
    base_model_revision: str | None
    _weight_types: WeightTypes

    def __setattr__(self, name: str, value: Any) -> None:
        """Have the parts run the model that is set.

        Raises:
            ValueError: If it is no language model of transformers, or :attr:`auto_model` is to be set.
        """
        if name == "auto_model":
            raise ValueError("auto_model is a part of model[0].model. To compile it: model[0].auto_model.compile().")
        if name in ("model", "adapter_model"):
            check_model(value)
        super().__setattr__(name, value)
        if name in ("model", "adapter_model") and "embedder" in vars(self):
            self.base.model = self._weight_types.model = self.model
            self.embedder.append.model = self.gem_model

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse nn.DataParallel, whose replicas would be threads that share the parts."""
        raise ValueError(f"A GEM module does not run in nn.DataParallel. {LAUNCH}")

    @property
    def auto_model(self) -> Any:
        """The model without its head, under the name that Sentence Transformers' own Transformer has for it."""
        return backbone_of(self.model)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, unchanged."""
        return self.base.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.base.text.tokenizer = tokenizer

    def save_tokenizer(self, output_path: str, **kwargs: Any) -> None:
        """Write the tokenizer, without the truncation and padding that some call has set."""
        self.base.text.own_tokenizer.save_pretrained(output_path, **kwargs)

    @property
    def num_gem_tokens(self) -> int:
        """K."""
        return len(self.gem_tokens)

    @property
    def gem_token_ids(self) -> list[int]:
        """Vocabulary rows of the GEM tokens."""
        return self.gem_tokens.ids

    @property
    def gem_token_source(self) -> str:
        """Where they come from, see :func:`choose_gem_token_ids`."""
        return self.gem_tokens.source

    @property
    def gem_token_names(self) -> list[str] | None:
        """Existing tokens whose rows are theirs, beside a frozen base."""
        return self.gem_tokens.names

    @property
    def pooling(self) -> str:
        """``"mean"`` or ``"concat"``."""
        return self.gem_tokens.pooling

    @property
    def has_adapter(self) -> bool:
        """True if a PEFT adapter works on every token, as `SentenceTransformer.add_adapter` makes it."""
        return bool(getattr(self.model, "peft_config", None))

    @property
    def mode(self) -> str:
        """``"frozen"``, ``"lora"`` (on every token) or ``"full"``."""
        return "frozen" if self.freeze_base else "lora" if self.has_adapter else "full"

    @property
    def embedding_dtype(self) -> torch.dtype:
        """That of the first parameter, to which Sentence Transformers casts the modules behind this one."""
        return self.logit_scale.dtype

    @property
    def gem_model(self) -> Any:
        """The model that GEM tokens run through, and a LoRA works on."""
        return self.adapter_model if self.freeze_base else self.model

    @property
    def max_seq_length(self) -> int:
        """Tokens in a row, the K GEM tokens included. Texts are truncated to fit."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        model_limit = self.base.context
        limit = min(model_limit, self.tokenizer.model_max_length)
        if value is None:
            value = int(limit) if limit < 1e9 else 2048
        if value <= self.num_gem_tokens + 1 or value > model_limit:
            raise ValueError(
                f"max_seq_length={value} must be more than num_gem_tokens + 1 = {self.num_gem_tokens + 1}, so that "
                f"some text is left beside the GEM tokens, and at most the model's context of {model_limit} tokens."
            )
        self._max_seq_length = int(value)

    def get_embedding_dimension(self) -> int:
        """Size of an embedding: D for ``pooling="mean"``, K * D for ``pooling="concat"``."""
        return self.facts.width * (1 if self.pooling == "mean" else self.num_gem_tokens)

    def _num_places(self, max_length: int | None) -> int:
        """Tokens of text in a row of so many, by default of :attr:`max_seq_length`."""
        least, most = self.num_gem_tokens + 1, self.base.context
        if max_length is not None and not (isinstance(max_length, int) and least < max_length <= most):
            raise ValueError(
                f"max_length={max_length!r} must be more than num_gem_tokens + 1 = {least}, and at most the model's "
                f"context of {most} tokens."
            )
        return (self.max_seq_length if max_length is None else max_length) - self.num_gem_tokens

    def pad(self, rows: list[Tensor], padding_side: str | None = None) -> dict[str, Tensor]:
        """Pad rows of token ids to one length, see :meth:`TextCodec.pad`. Shapes: ``(T_i,)`` each -> ``(B, T)`` each"""
        return self.base.text.pad(rows, padding_side)

    def train_in_float32(self) -> None:
        """Have the weights that are trained in float32, unless a data type was asked for; :class:`gem_st.GemLoss` does.

        In full mode that is the whole model. A LoRA is float32 whatever its base is, which stays as it is.
        """
        self._weight_types.train_in_float32(self.has_adapter)

    def as_saved(self, device: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Context in which the weights of the language model are in the data types that they are saved in.

        They are copies; the weights themselves come back unchanged.

        Args:
            device: Where the copies are; beside the weights by default.
        """
        if self.mode != "full":
            return contextlib.nullcontext()
        return self._weight_types.as_saved(self.save_dtype, device)

    def require_attention_mask(self) -> None:
        """Make sure that the GEM mask is obeyed, as K > 1 and rows with a suffix need it.

        FlashAttention takes no such mask; the model is then switched to sdpa (or eager), with a warning.

        Raises:
            ValueError: If the model has no attention that could be masked, e.g. a state-space model.
        """
        require_attention_mask(self.base, shares_positions=self.num_gem_tokens > 1 or self.freeze_base)
