"""GEM: one decoder-only language model that embeds text and keeps generating (arXiv 2506.04344).

This file is the whole method at inference time, in the order in which data flows: text -> token ids with GEM
tokens -> attention mask -> backbone -> embedding, then generation, then saving and loading. A copy of it travels in
every checkpoint, so it imports only the standard library, torch, transformers and sentence_transformers.

Notation used for tensor shapes:

- ``B``: batch size
- ``T``: tokens in a row, padding included
- ``K``: GEM tokens in a row
- ``D``: width of the hidden states
- ``V``: vocabulary size, i.e. rows of the embedding matrix
- ``N``: next-token targets in a batch
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

logger = logging.get_logger(__name__)

PREFIX, GEM, SUFFIX = 0, 1, 2
"""The three segments of a row (paper, section 3): ``prefix (m tokens) | K GEM tokens | suffix (n tokens)``."""

POOLING_MODES = ("mean", "concat")
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers builds a mask from an index rule."""

LOGITS_BUDGET = 2**26
"""Logits above this many elements (256 MiB in float32) are not built at once by :func:`next_token_loss`."""

BUCKET_COST = {"cpu": 128}
"""Padding tokens worth one more pass through the backbone, by device type; 2,048 on accelerators."""

RESERVED_TOKEN = re.compile(r"^[<\[>{]\W*(reserved|unused|place.?holder).*\d\W*$", re.IGNORECASE)
"""Names of vocabulary entries set aside by a model's authors, such as ``<|reserved_special_token_9|>``."""


# --------------------------------------------------------------------------------------------------------------------
# Token ids -> segments, positions and attention mask


def gem_segments(input_ids: Tensor, attention_mask: Tensor, gem_token_ids: Sequence[int]) -> Tensor:
    """Label every token as ``PREFIX`` (0), ``GEM`` (1) or ``SUFFIX`` (2).

    Args:
        input_ids: Token ids. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, False (or 0) for padding, on either side. Shape: ``(B, T)``
        gem_token_ids: The K ids of the GEM tokens.

    Returns:
        Segment of each token; a row without GEM tokens is all prefix, padding counts as prefix. Shape: ``(B, T)``
    """
    real = attention_mask.bool()
    is_gem = torch.isin(input_ids, torch.as_tensor(gem_token_ids, device=input_ids.device)) & real
    is_suffix = (is_gem.cumsum(dim=1) > 0) & ~is_gem & real
    return is_gem.long() * GEM + is_suffix.long() * SUFFIX


def gem_position_ids(segments: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions in which all GEM tokens of a row share one place, and the suffix starts one further.

    The GEM tokens are then interchangeable slots: K tokens in one row equal K rows of one token each.

    Args:
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, on either side. Shape: ``(B, T)``

    Returns:
        Position of each token, 0 for padding before the first token. Shape: ``(B, T)``
    """
    is_gem = segments == GEM
    follows_gem = F.pad(is_gem[:, :-1], (1, 0)) & is_gem
    return ((attention_mask.bool() & ~follows_gem).cumsum(dim=1) - 1).clamp(min=0)


def gem_mask_function(segments: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of the GEM mask, to be combined with causality: may query ``q`` attend to key ``k``?

    A token sees itself; the prefix is seen by prefix and GEM tokens; GEM and suffix tokens are seen by the suffix
    (and the prefix, were it not causal, would see nothing else).

    Args:
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``

    Returns:
        A function of (batch, head, query, key) indices, as transformers' ``and_mask_function`` takes it.
    """

    def may_attend(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key_in_prefix = segments[batch_idx, kv_idx] == PREFIX
        query_in_suffix = segments[batch_idx, q_idx] == SUFFIX
        return (q_idx == kv_idx) | (key_in_prefix != query_in_suffix)

    return may_attend


def gem_attention_mask(config: Any, segments: Tensor, attention_mask: Tensor, dtype: torch.dtype) -> Any:
    """The attention mask of the paper (section 3, figure 1), built by transformers for the model's attention.

    For a row ``a b | G H | c d`` (rows are queries, ``x`` marks a key that is attended to)::

            a b G H c d
          a x . . . . .
          b x x . . . .
          G x x x . . .
          H x x . x . .
          c . . x x x .
          d . . x x x x

    The suffix reads the prefix only through the GEM tokens, GEM tokens do not see each other, and everything stays
    causal. Rows with a suffix, with GEM tokens at the end and without any may stand in one batch.

    Args:
        config: The model's transformers config; it decides the format (eager, sdpa or flex_attention) and whether
            there is one mask or one for each layer type.
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        attention_mask: True (or 1) for real tokens, on either side. Shape: ``(B, T)``
        dtype: Data type of the hidden states, used by the additive masks of eager attention.

    Returns:
        What the backbone takes as ``attention_mask``: a mask of shape ``(B, 1, T, T)`` (sdpa: True means attended
        to; eager: 0 means attended to), a flex ``BlockMask``, or a dict of these by layer type.

    Raises:
        ValueError: If the attention implementation takes no such mask, e.g. FlashAttention-2.
    """
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} takes no custom mask. Use one of {MASKED_ATTENTION}: "
            'model.set_attn_implementation("sdpa"). Only K = 1 without a suffix runs without a mask.'
        )
    shape_only = segments.new_empty((*segments.shape, 0), dtype=dtype)
    return create_masks_for_generate(
        config=config,
        inputs_embeds=shape_only,
        attention_mask=attention_mask.bool(),
        past_key_values=None,
        and_mask_function=gem_mask_function(segments),
    )


def length_buckets(lengths: Tensor, cost: int) -> list[Tensor]:
    """Group rows of like length, so that each group is padded to its own longest row.

    Args:
        lengths: Tokens in each row. Shape: ``(B,)``
        cost: Padding tokens that one more group is worth; a row starts a new group where it would exceed them.

    Returns:
        Row indices of each group, longest rows first. Shapes: ``(B_i,)``
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered = lengths[order].tolist()
    starts, longest, padding = [], ordered[0], 0
    for index, length in enumerate(ordered):
        padding += longest - length
        if padding > cost:
            starts.append(index)
            longest, padding = length, 0
    return list(order.tensor_split(starts))


# --------------------------------------------------------------------------------------------------------------------
# Hidden states -> embedding and next-token loss


def pool_gem_tokens(hidden_states: Tensor, segments: Tensor, num_gem_tokens: int, pooling: str) -> Tensor:
    """The embedding of each row: its hidden states at the GEM tokens, averaged or concatenated (paper, section 3).

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        segments: Output of :func:`gem_segments`. Shape: ``(B, T)``
        num_gem_tokens: K.
        pooling: ``"mean"`` or ``"concat"``.

    Returns:
        Shape: ``(B, D)`` for mean, ``(B, K * D)`` for concat

    Raises:
        ValueError: If a row does not hold exactly K GEM tokens.
    """
    is_gem = segments == GEM
    counts = is_gem.sum(dim=1)
    if not bool((counts == num_gem_tokens).all()):
        raise ValueError(
            f"Every row needs exactly {num_gem_tokens} GEM token(s) to be embedded, but the rows of this batch hold "
            f"{counts.tolist()}. Build the batch with `preprocess`, and do not truncate it afterwards."
        )
    gem_states = hidden_states[is_gem].view(len(hidden_states), num_gem_tokens, -1)
    return gem_states.mean(dim=1) if pooling == "mean" else gem_states.flatten(1)


def next_token_loss(hidden_states: Tensor, labels: Tensor, lm_head: nn.Module, config: Any = None) -> Tensor:
    """Mean next-token cross-entropy in nats, without building logits for positions that have no target.

    Logits are built at once only while they fit comfortably (``LOGITS_BUDGET``); above that
    ``torch.nn.functional.linear_cross_entropy`` computes them in pieces, or, where torch or the head does not allow
    it, and in lower precision, in which it adds up losses with an error of several percent, a chunked loop that
    recomputes them in the backward pass. The value is the same to 1e-5.

    Args:
        hidden_states: Last hidden states. Shape: ``(B, T, D)``
        labels: Token ids, not shifted; -100 is no target. Shape: ``(B, T)``
        lm_head: The output projection, D to V.
        config: The model's config, read for ``final_logit_softcapping``, ``logit_scale`` and ``logits_scaling``.

    Returns:
        Scalar; 0 (with a gradient of 0) if there is no target. Shape: ``()``
    """
    targets = labels[:, 1:]
    is_target = targets != -100
    states, targets = hidden_states[:, :-1][is_target], targets[is_target]
    if len(targets) == 0:
        return hidden_states.sum() * 0.0
    weight: Any = lm_head.weight
    num_logits = len(targets) * weight.shape[0]
    if num_logits <= LOGITS_BUDGET:
        return _token_losses(states, targets, lm_head, config).mean()
    is_exact = states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(states.device.type)
    if is_exact and hasattr(F, "linear_cross_entropy") and type(lm_head) is nn.Linear and _plain_logits(config):
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(states, weight, targets, linear_bias=lm_head.bias, options=options)
    num_chunks = math.ceil(num_logits / LOGITS_BUDGET)
    losses = [
        checkpoint(_token_losses, *chunk, lm_head, config, use_reentrant=False)
        for chunk in zip(states.chunk(num_chunks), targets.chunk(num_chunks), strict=True)
    ]
    return torch.cat(losses).mean()


def _token_losses(states: Tensor, targets: Tensor, lm_head: nn.Module, config: Any) -> Tensor:
    """Cross-entropy of each target. Shapes: ``(N, D)``, ``(N,)`` -> ``(N,)``"""
    logits = lm_head(states).float() * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, targets, reduction="none")


def _plain_logits(config: Any) -> bool:
    """True if the logits are the output of the head, with nothing applied to them."""
    return not any(getattr(config, key, None) for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"))


# --------------------------------------------------------------------------------------------------------------------
# Vocabulary rows for the GEM tokens


def choose_gem_token_ids(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, num_gem_tokens: int, used_ids: Collection[int] = ()
) -> tuple[list[int], str]:
    """Find vocabulary rows for the GEM tokens, preferring rows that nothing else uses.

    Args:
        tokenizer: The base model's tokenizer.
        num_rows: V, rows of the embedding matrix.
        num_gem_tokens: K.
        used_ids: Rows that the model's configuration gives a meaning, e.g. for padding.

    Returns:
        The K ids and where they come from: ``"padding"`` (rows beyond the tokenizer's last id), ``"reserved"`` (the
        last tokens named reserved, unused or placeholder) or ``"grown"`` (rows to be added after the last).
    """
    vocabulary = tokenizer.get_vocab()
    padding = [row for row in range(max(vocabulary.values()) + 1, num_rows) if row not in used_ids]
    if len(padding) >= num_gem_tokens:
        return padding[:num_gem_tokens], "padding"
    used_ids = {*used_ids, *tokenizer.all_special_ids}
    reserved = sorted(row for token, row in vocabulary.items() if RESERVED_TOKEN.match(token) and row not in used_ids)
    if len(reserved) >= num_gem_tokens:
        return reserved[-num_gem_tokens:], "reserved"
    return list(range(num_rows, num_rows + num_gem_tokens)), "grown"


@torch.no_grad()
def init_gem_rows(weight: Tensor, gem_token_ids: Sequence[int], num_used_rows: int, noise: float = 0.1) -> None:
    """Write new rows near the mean of the used ones, in place, drawn from torch's global generator.

    Args:
        weight: Embedding or output matrix. Shape: ``(V, D)``
        gem_token_ids: The K rows to write.
        num_used_rows: The rows below this one, other than the GEM rows, are averaged.
        noise: Standard deviation of the rows around the mean, in units of that of the used rows in each dimension.
    """
    is_used = torch.arange(len(weight), device=weight.device) < num_used_rows
    is_used[list(gem_token_ids)] = False
    used = weight[is_used]
    mean, std = used.mean(dim=0, dtype=torch.float32), used.std(dim=0).float()
    rows = mean.cpu() + noise * std.cpu() * torch.randn(len(gem_token_ids), weight.shape[1])
    weight[list(gem_token_ids)] = rows.to(weight)


# --------------------------------------------------------------------------------------------------------------------
# The Sentence-Transformers module


class GemTransformer(InputModule):
    """A decoder-only language model that embeds text through GEM tokens, as a Sentence-Transformers module.

    ``SentenceTransformer(modules=[GemTransformer("meta-llama/Llama-3.2-1B", num_gem_tokens=4)])`` is an embedder to
    be trained with :class:`gem_st.GemLoss` or any other loss; ``model[0].generate(...)`` is the generator.

    Args:
        model_name_or_path: Hub id or folder of a decoder-only model with a language-model head, or of a GEM
            checkpoint, in which case the other settings must be those it was saved with.
        num_gem_tokens: K, the number of GEM tokens appended to each text.
        pooling: ``"mean"`` or ``"concat"`` over the hidden states at the GEM tokens.
        max_seq_length: Tokens in a row, GEM tokens included; longer texts are truncated. Defaults to what tokenizer
            and model allow.
        model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``, e.g. ``{"dtype": torch.float32}``.
        processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``, e.g. ``{"padding_side": "left"}``.
        config_kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: If a setting is out of range, the model is not a causal decoder with an attention that can be
            masked as K asks for, weights are missing, tokenizer and model do not fit each other, or a GEM checkpoint
            was saved with other settings.

    Attributes:
        model: The ``*ForCausalLM``.
        tokenizer: The base model's tokenizer, unchanged.
        num_gem_tokens: K.
        gem_token_ids: Vocabulary rows of the GEM tokens.
        gem_token_source: Where they come from, see :func:`choose_gem_token_ids`.
        max_seq_length: Tokens in a row, GEM tokens included.
        logit_scale: Log of the factor on cosine similarities in :class:`gem_st.GemLoss`. Shape: ``(1,)``

    References:
        GEM: Empowering LLM for both Embedding Generation and Language Understanding, https://arxiv.org/abs/2506.04344
    """

    config_file_name = "gem_config.json"
    remote_code_file_name = "gem_st.py"
    config_keys = ["num_gem_tokens", "pooling", "max_seq_length", "gem_token_ids", "gem_token_source"]
    save_in_root = True

    model: Any  # a PreTrainedModel with a language-model head; typed loosely, as its methods depend on its class
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model_name_or_path: str,
        *,
        num_gem_tokens: int = 1,
        pooling: str = "mean",
        max_seq_length: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_gem_tokens, int) or isinstance(num_gem_tokens, bool) or num_gem_tokens < 1:
            raise ValueError(f"num_gem_tokens must be a whole number of 1 or more, got {num_gem_tokens!r}.")
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling must be one of {POOLING_MODES}, got {pooling!r}.")
        self.num_gem_tokens = num_gem_tokens
        self.pooling = pooling
        saved = self._load_gem_config(model_name_or_path, model_kwargs or {})
        self._check_saved_settings(model_name_or_path, saved)

        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **(processor_kwargs or {}))
        self.model = _load_causal_lm(model_name_or_path, model_kwargs or {}, config_kwargs or {})
        self._check_vocabulary(model_name_or_path, saved)
        self.max_seq_length = saved.get("max_seq_length") if max_seq_length is None else max_seq_length
        self.logit_scale = nn.Parameter(torch.tensor([saved.get("logit_scale", math.log(20.0))]))

        if saved:
            self.gem_token_ids, self.gem_token_source = saved["gem_token_ids"], saved["gem_token_source"]
        else:
            self._add_gem_tokens()
        self._protect_generation()
        self._check_is_causal(model_name_or_path)
        if num_gem_tokens > 1:
            self.require_attention_mask()

    # ---- set-up and checks

    @classmethod
    def _load_gem_config(cls, model_name_or_path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The saved settings of a GEM checkpoint; empty for a base model."""
        return cls.load_config(
            model_name_or_path,
            subfolder=hub_kwargs.get("subfolder", ""),
            token=hub_kwargs.get("token"),
            cache_folder=hub_kwargs.get("cache_dir"),
            revision=hub_kwargs.get("revision"),
            local_files_only=hub_kwargs.get("local_files_only", False),
        )

    def _check_saved_settings(self, model_name_or_path: str, saved: dict[str, Any]) -> None:
        for key in ("num_gem_tokens", "pooling"):
            if saved and saved[key] != getattr(self, key):
                raise ValueError(
                    f"{model_name_or_path} is a GEM checkpoint saved with {key}={saved[key]!r}, but "
                    f"{key}={getattr(self, key)!r} was asked for. Pass {key}={saved[key]!r}, or load it with "
                    f"SentenceTransformer({str(model_name_or_path)!r}, trust_remote_code=True)."
                )

    def _check_vocabulary(self, model_name_or_path: str, saved: dict[str, Any]) -> None:
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        last_id = max(self.tokenizer.get_vocab().values())
        if last_id >= num_rows:
            raise ValueError(
                f"The tokenizer of {model_name_or_path} produces ids up to {last_id}, but the model has only "
                f"{num_rows} vocabulary rows. Use the tokenizer the model was trained with, or resize its embeddings."
            )
        if saved and max(saved["gem_token_ids"]) >= num_rows:
            raise ValueError(
                f"{model_name_or_path} names gem_token_ids {saved['gem_token_ids']}, but its model has only {num_rows} "
                "vocabulary rows: weights and gem_config.json are not of one checkpoint. Save or download it again."
            )

    def _add_gem_tokens(self) -> None:
        """Claim vocabulary rows for the GEM tokens and initialise them."""
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        self.gem_token_ids, self.gem_token_source = choose_gem_token_ids(
            self.tokenizer, num_rows, self.num_gem_tokens, _configured_ids(self.model)
        )
        if self.gem_token_source == "grown":
            self.model.resize_token_embeddings(num_rows + self.num_gem_tokens, mean_resizing=False)
        num_used_rows = max(self.tokenizer.get_vocab().values()) + 1
        weights = [self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight]
        for weight in {id(weight): weight for weight in weights}.values():
            init_gem_rows(weight, self.gem_token_ids, num_used_rows)

    def _protect_generation(self) -> None:
        """Have ``generate`` never emit a GEM token, here and wherever the saved ``generation_config`` is read."""
        config = self.model.generation_config
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *self.gem_token_ids})

    @torch.no_grad()
    def _check_is_causal(self, model_name_or_path: str) -> None:
        """Change the last token of a row: nothing before it may move."""
        self._width = self.model.config.get_text_config().hidden_size
        if self.model.config._attn_implementation not in MASKED_ATTENTION:
            return  # FlashAttention runs on a GPU only, and the model may still be on its way there
        with _Evaluating(self.model):
            states = [self._last_hidden_state(self._probe(0, 1, last)) for last in (2, 3)]
        self._width = states[0].shape[-1]
        if not torch.equal(states[0][:, :2], states[1][:, :2]):
            raise ValueError(
                f"{model_name_or_path} ({self.model.config.model_type}) is not causal: a token sees the tokens after "
                "it, as in encoder-only models. GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
            )

    def _probe(self, *token_ids: int) -> Tensor:
        return torch.tensor([token_ids], device=self.model.device)

    def require_attention_mask(self) -> None:
        """Make sure that the GEM mask is obeyed, as K > 1 and rows with a suffix need it.

        FlashAttention takes no such mask; the model is then switched to sdpa (or eager), with a warning.

        Raises:
            ValueError: If the model has no attention that could be masked, e.g. a state-space model.
        """
        implementation = self.model.config._attn_implementation
        if implementation not in MASKED_ATTENTION:
            masked = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"
            logger.warning(
                f"attn_implementation={implementation!r} takes no custom mask, which num_gem_tokens > 1 and rows with "
                f"a suffix need; switching to {masked!r}. Only num_gem_tokens=1 without a suffix runs without a mask."
            )
            self.model.set_attn_implementation(masked)
        cause: Exception | None = None
        try:
            obeys = self._obeys_attention_mask()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            obeys, cause = False, error
        if not obeys:
            raise ValueError(
                f"{self.model.config.model_type} does not obey the GEM attention mask and positions: state-space and "
                "recurrent models have no attention to mask, ALiBi models no positions to share. It can be used with "
                "num_gem_tokens=1, trained on plain rows only: GemLoss(model, plain_ratio=1.0)."
            ) from cause

    @torch.no_grad()
    def _obeys_attention_mask(self) -> bool:
        """The second of two GEM tokens may not see the first; nor, to share its position, may positions be ignored."""
        segments = self._probe(PREFIX, GEM, GEM)
        real = torch.ones_like(segments)
        with _Evaluating(self.model):
            masked = [self._last_hidden_state(self._probe(0, i, 3), segments, real)[0, -1] for i in (1, 2)]
            if not torch.equal(*masked) or self.num_gem_tokens == 1:
                return torch.equal(*masked)
            positions = (self._probe(0, 1, 2), self._probe(0, 1, 5))
            moved = [self._backbone(self._probe(0, 1, 3), position_ids=p).last_hidden_state for p in positions]
        return not torch.equal(*moved)

    @torch.no_grad()
    def check_output_head(self) -> None:
        """Make sure that :func:`next_token_loss` computes the model's own next-token loss.

        Raises:
            ValueError: If the model does more to its logits than the head and the known factors and caps.
        """
        if self.model.config._attn_implementation not in MASKED_ATTENTION:
            return
        ids = self._probe(0, 1, 2, 3)
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        with _Evaluating(self.model):
            expected = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            result = next_token_loss(self._last_hidden_state(ids), ids, head, config)
        if not torch.allclose(result.float(), expected.float(), rtol=1e-2):
            raise ValueError(
                f"The next-token loss of {self.model.config.model_type} is {expected:.3f} nats by the model itself, "
                f"but {result:.3f} by its output head: it changes its logits in a way that is not supported. Train it "
                "without next-token prediction, by a contrastive loss of Sentence Transformers."
            )

    # ---- properties that Sentence Transformers reads

    @property
    def max_seq_length(self) -> int:
        """Tokens in a row, the K GEM tokens included. Texts are truncated to fit."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        model_limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
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
        return self._width if self.pooling == "mean" else self._width * self.num_gem_tokens

    def get_config_dict(self) -> dict[str, Any]:
        """Settings written to ``gem_config.json``; with them a reload is exact."""
        return {**super().get_config_dict(), "logit_scale": self.logit_scale.item()}

    # ---- text -> token ids

    def preprocess(  # type: ignore[override]  # texts only, of all that Sentence Transformers may pass
        self, inputs: Sequence[str], prompt: str | None = None, max_length: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tokenise texts, truncate them so that K places remain, append the GEM tokens and pad.

        Args:
            inputs: Texts. A text that spells out the name of a GEM token is embedded as ordinary text.
            prompt: Put before every text.
            max_length: Tokens in a row, GEM tokens included, instead of :attr:`max_seq_length`.
            **kwargs: ``task`` and the like, which Sentence Transformers passes to every module; not used.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens), padded on the tokenizer's padding side.
            Shape: ``(B, T)`` each

        Raises:
            ValueError: If an input is not a string, or no place is left for text.
        """
        rows = self._tokenize(inputs, prompt or "", self.max_seq_length if max_length is None else max_length)
        return self.pad([torch.tensor(row + self.gem_token_ids) for row in rows])

    def _tokenize(
        self, texts: Sequence[str], prompt: str = "", max_length: int | None = None, **kwargs: Any
    ) -> list[list[int]]:
        """Token ids of each text as the base's tokenizer gives them, truncated to ``max_length - K``."""
        if isinstance(texts, str):
            raise ValueError(f"A list of texts is needed, got the single text {texts!r:.80}. Put it in a list.")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"Input {index} of {len(texts)} is {text!r:.80} ({type(text).__name__}), but only strings can be "
                    "embedded or generated from. Convert it to str, or drop it."
                )
        if max_length is not None and max_length <= self.num_gem_tokens + 1:
            raise ValueError(
                f"max_length={max_length} must be more than num_gem_tokens + 1 = {self.num_gem_tokens + 1}."
            )
        texts = [prompt + text for text in texts]
        if self.gem_token_source == "reserved":
            texts = [self._defuse(text) for text in texts]
        if max_length is not None:
            kwargs |= {"truncation": True, "max_length": max_length - self.num_gem_tokens}
        return self.tokenizer(texts, padding=False, return_attention_mask=False, verbose=False, **kwargs)["input_ids"]

    def _defuse(self, text: str) -> str:
        """Break up the names of GEM tokens in a text, with a zero-width space, so that they are not matched."""
        for name in self.tokenizer.convert_ids_to_tokens(self.gem_token_ids):
            text = text.replace(name, f"{name[0]}\u200b{name[1:]}")
        return text

    def pad(self, rows: list[Tensor], padding_side: str | None = None) -> dict[str, Tensor]:
        """Pad rows of token ids to one length.

        Args:
            rows: Token ids. Shape: ``(T_i,)`` each
            padding_side: ``"left"`` or ``"right"``; defaults to the tokenizer's.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens). Shape: ``(B, T)`` each
        """
        side = padding_side or self.tokenizer.padding_side
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side=side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
        }

    @property
    def pad_token_id(self) -> int:
        """Id written into padding; it is never attended to, so that any id does."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in candidates if token_id is not None)

    # ---- token ids -> embedding

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed rows that hold K GEM tokens each, at the end or between a prefix and a suffix.

        Args:
            features: ``input_ids`` and ``attention_mask``, padded on either side, shape ``(B, T)`` each. If it also
                holds ``labels`` (token ids, -100 for no target, shape ``(B, T)``), the next-token loss is computed too.
            **kwargs: Not used.

        Returns:
            ``features`` with ``sentence_embedding`` (shape ``(B, D)``, or ``(B, K * D)`` for concat) and
            ``token_embeddings`` (shape ``(B, T, D)``) added; with ``labels``, also ``ntp_loss`` (nats a token,
            shape ``()``) and ``logit_scale`` (the factor itself, shape ``(1,)``).

        Raises:
            ValueError: If a row does not hold exactly K GEM tokens.
        """
        input_ids, attention_mask = features["input_ids"], features["attention_mask"]
        order = _right_padding_order(attention_mask)
        if order is not None:
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        segments = gem_segments(input_ids, attention_mask, self.gem_token_ids)
        states = self._hidden_states(input_ids, segments, attention_mask)
        features["sentence_embedding"] = pool_gem_tokens(states, segments, self.num_gem_tokens, self.pooling)
        if order is None:
            features["token_embeddings"] = states
        else:
            features["token_embeddings"] = torch.zeros_like(states).scatter(
                1, order[..., None].expand_as(states), states
            )
        if "labels" in features:
            labels = features["labels"] if order is None else features["labels"].gather(1, order)
            head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
            features["ntp_loss"] = next_token_loss(states, labels, head, config)
            features["logit_scale"] = self.logit_scale.exp()
        return features

    def _hidden_states(self, input_ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """Run right-padded rows through the backbone in groups of like length; zeros at padding.

        Sharded training (FSDP, DeepSpeed) needs as many passes on every process, hence one group there.
        Shapes: ``(B, T)`` each -> ``(B, T, D)``
        """
        lengths = attention_mask.sum(dim=1)
        cost = BUCKET_COST.get(input_ids.device.type, 2048)
        distributed = torch.distributed
        is_single = not (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        buckets = length_buckets(lengths, cost) if is_single else []
        if len(buckets) <= 1:
            return self._masked_hidden_state(input_ids, segments, attention_mask)
        states: Tensor | None = None
        for rows in buckets:
            width = int(lengths[rows[0]])
            part = self._masked_hidden_state(*(t[rows, :width] for t in (input_ids, segments, attention_mask)))
            if states is None:
                states = part.new_zeros((*input_ids.shape, part.shape[-1]))
            states[rows, :width] = part
        assert states is not None  # there are two buckets or more
        return states

    def _masked_hidden_state(self, input_ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        needs_mask = self.num_gem_tokens > 1 or bool((segments == SUFFIX).any())
        return self._last_hidden_state(input_ids, *((segments, attention_mask) if needs_mask else ()))

    def _last_hidden_state(
        self, input_ids: Tensor, segments: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Run the backbone on right-padded rows; without ``segments`` as a plain causal model, with no mask at all.

        Causality keeps padding on the right from every real token, so that only the GEM rule needs a mask.
        Shapes: ``(B, T)`` each -> ``(B, T, D)``
        """
        if segments is None or attention_mask is None:
            return self._backbone(input_ids).last_hidden_state
        mask = gem_attention_mask(self.model.config, segments, attention_mask, self.model.dtype)
        position_ids = gem_position_ids(segments, attention_mask)
        return self._backbone(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state

    def _backbone(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model without its language-model head."""
        backbone = self.model.get_decoder() if self.model.base_model is self.model else self.model.base_model
        return backbone(input_ids=input_ids, use_cache=False, **inputs)

    # ---- generation

    def generate(
        self, prompts: str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]], **generate_kwargs: Any
    ) -> str | list[str]:
        """Continue text, or answer chat messages, as the language model that this model still is.

        Args:
            prompts: A text, a list of texts, the messages of a conversation (dicts with ``role`` and ``content``),
                or a list of such conversations. Messages need a tokenizer with a chat template.
            **generate_kwargs: Passed to transformers' ``generate``, e.g. ``max_new_tokens=40, do_sample=True``.

        Returns:
            The new text, without the prompt: a string for a single prompt, otherwise a list of strings. With
            ``num_return_sequences`` above 1 always a list, all sequences of a prompt in a row.

        Raises:
            ValueError: If a prompt is not text, or messages are given and the tokenizer has no chat template.
        """
        if not isinstance(prompts, str | list | tuple):
            raise ValueError(f"Prompts are a text, messages, or a list of either, got {type(prompts).__name__}.")
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
        batch: list[Any] = [prompts] if is_single else list(prompts)
        if not batch:
            return []
        rows = self._tokenize_chat(batch) if isinstance(batch[0], list) else self._tokenize(batch)
        empty = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if any(not row for row in rows) and not empty:
            raise ValueError("An empty prompt needs a tokenizer with a BOS token to start from; give some text.")
        inputs = self.pad([torch.tensor(row or empty) for row in rows], padding_side="left")
        suppressed = sorted({*(generate_kwargs.pop("suppress_tokens", None) or []), *self.gem_token_ids})
        generate_kwargs = {"pad_token_id": self.pad_token_id, **generate_kwargs, "suppress_tokens": suppressed}
        with _Evaluating(self.model):
            output = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()}, **generate_kwargs
            )
        sequences = getattr(output, "sequences", output)
        texts = [self._decode_new(sequence, inputs["input_ids"].shape[1]) for sequence in sequences]
        return texts[0] if is_single and len(texts) == 1 else texts

    def _decode_new(self, sequence: Tensor, prompt_length: int) -> str:
        """Text of the tokens behind a prompt; decoded with it, since some tokenizers drop the first space of a text."""
        decode: Any = partial(self.tokenizer.decode, skip_special_tokens=True)
        prompt, whole = decode(sequence[:prompt_length]), decode(sequence)
        return whole[len(prompt) :] if whole.startswith(prompt) else decode(sequence[prompt_length:])

    def _tokenize_chat(self, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "Chat messages were given, but the tokenizer has no chat template. Pass plain text to `generate`, or "
                "use an instruction-tuned base."
            )
        rendered: Any = self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        return self._tokenize(rendered, add_special_tokens=False)

    # ---- checkpoints

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the ``*ForCausalLM``, the tokenizer, ``gem_config.json`` and this file into a folder.

        Args:
            output_path: The folder.
            *args: Not used.
            safe_serialization: Only True: weights are always safetensors.
            **kwargs: Passed to ``save_pretrained`` of the model, e.g. ``max_shard_size="5GB"``.

        Raises:
            ValueError: If ``safe_serialization`` is False.
        """
        if not safe_serialization:
            raise ValueError("GEM checkpoints hold safetensors only; save with safe_serialization=True.")
        self.model.save_pretrained(output_path, **kwargs)
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
        self.save_tokenizer(output_path)
        self.save_config(output_path)
        remote_code = Path(output_path, self.remote_code_file_name)
        if not remote_code.exists() or not remote_code.samefile(__file__):
            shutil.copyfile(__file__, remote_code)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> GemTransformer:
        """Load a GEM checkpoint from a folder or the Hub, as Sentence Transformers calls it.

        Args:
            model_name_or_path: Folder or Hub id.
            subfolder: Folder inside it.
            token: Hub token.
            cache_folder: Folder for downloads.
            revision: Branch, tag or commit.
            local_files_only: Do not ask the Hub.
            init_defaults: Not used; all settings are saved.
            trust_remote_code: Passed on, for bases that bring code of their own.
            model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.
            processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``.
            config_kwargs: Passed to ``AutoConfig.from_pretrained``.
            backend: Only ``"torch"``.
            **kwargs: Not used.

        Raises:
            ValueError: If the checkpoint holds no GEM settings, or ``backend`` is not ``"torch"``.
        """
        if backend != "torch":
            raise ValueError(f"GEM checkpoints run on backend='torch', got {backend!r}.")
        hub_kwargs = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        saved = cls._load_gem_config(model_name_or_path, hub_kwargs)
        if not saved:
            raise ValueError(
                f"{model_name_or_path} holds no {cls.config_file_name}: it is not a GEM checkpoint. To make one of a "
                f"base model, use SentenceTransformer(modules=[GemTransformer({str(model_name_or_path)!r})])."
            )
        return cls(
            model_name_or_path,
            num_gem_tokens=saved["num_gem_tokens"],
            pooling=saved["pooling"],
            model_kwargs={**hub_kwargs, **(model_kwargs or {})},
            processor_kwargs={**hub_kwargs, **(processor_kwargs or {})},
            config_kwargs={**hub_kwargs, **(config_kwargs or {})},
        )


class _Evaluating:
    """Context in which a module is in evaluation mode; its former mode is restored."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.was_training = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *exc_info: object) -> None:
        self.module.train(self.was_training)


def _configured_ids(model: Any) -> set[int]:
    """Vocabulary rows that a model's configurations give a meaning (padding, start, end)."""
    ids: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, key, None)
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def _right_padding_order(attention_mask: Tensor) -> Tensor | None:
    """Indices that move the real tokens of each row to its start, or None if they are there. Shape: ``(B, T)``"""
    real = attention_mask.bool()
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return (~real).int().argsort(dim=1, stable=True)


def _load_causal_lm(model_name_or_path: str, model_kwargs: dict[str, Any], config_kwargs: dict[str, Any]) -> Any:
    """Load a decoder with its language-model head, and refuse one of which a weight is missing."""
    config = AutoConfig.from_pretrained(model_name_or_path, **config_kwargs)
    needed = "GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
    if config.is_encoder_decoder:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) is an encoder-decoder model. {needed}")
    has_remote_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_remote_code:
        raise ValueError(f"{model_name_or_path} ({config.model_type}) has no causal language-model head. {needed}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_name_or_path, config=config, output_loading_info=True, **model_kwargs
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{model_name_or_path} lacks weights of {type(model).__name__}: {missing}. They would be random; use a "
            "checkpoint saved with its language-model head (AutoModelForCausalLM, not AutoModel)."
        )
    return model
