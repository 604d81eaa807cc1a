"""What a base can do, found by running it on a few tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .gem_base import Evaluating, GemBase
from .gem_mask import GEM, MASKED_ATTENTION, PREFIX

logger = logging.get_logger(__name__)

REFUSALS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot do what is asked of them."""


@dataclass(frozen=True)
class BaseFacts:
    """What was found.

    Attributes:
        width: D.
        can_cache: Whether it continues from keys and values as if it had read all at once.
        has_window: Whether some layer does not see every key, so that gaps between keys would count.
        model_type: Its name, for errors.
        num_positions: Rows of a table that it looks positions up in, infinite if it computes them.
    """

    width: int
    can_cache: bool
    has_window: bool
    model_type: str
    num_positions: float = math.inf

    def require_cache(self) -> None:
        """Raise if there is no continuing from keys and values."""
        if not self.can_cache:
            raise ValueError(
                f"{self.model_type} does not continue from a cache of keys and values: state-space and "
                "recurrent models keep another state. It can embed and generate in full mode, but prefill, summarize, "
                "extend, compress and freeze_base=True need attention throughout."
            )


def probe_base(base: GemBase, name: str) -> BaseFacts:
    """Find out what a base can do.

    Args:
        base: The base.
        name: What it was loaded from, for errors.

    Raises:
        ValueError: If it does not run, or is not causal.
        FloatingPointError: If its hidden states are not finite.
    """
    _check_runs(base, name)
    width, num_positions = _check_is_causal(base, name)
    return BaseFacts(
        width=width,
        can_cache=_reads_in_parts(base),
        has_window=_has_window(base.config),
        model_type=base.model.config.model_type,
        num_positions=num_positions,
    )


@torch.no_grad()
def _check_runs(base: GemBase, name: str) -> None:
    """Run a quantised model once: whether its kernels take layers of this size is known to them alone."""
    quantizer = getattr(base.model, "hf_quantizer", None)
    if quantizer is None or base.attention not in MASKED_ATTENTION:
        return
    try:
        with Evaluating(base.model):
            base.states(base.probe(0, 1))
    except (AssertionError, RuntimeError) as error:
        method = quantizer.quantization_config.quant_method.name
        raise ValueError(
            f"{name} does not run on {base.model.device} when quantised by {method}: {error}. Leave "
            "out quantization_config, or take a base with layers of other widths."
        ) from error


@torch.no_grad()
def _check_is_causal(base: GemBase, name: str) -> tuple[int, float]:
    """Change the last token of a row: nothing before it may move.

    Returns:
        Width of the hidden states, and the number of places for which there is a row: of a table in which neighbours
        look up neighbouring rows.
    """
    if base.attention not in MASKED_ATTENTION:
        # FlashAttention runs on GPUs, and the model may still be on its way there.
        return int(base.config.hidden_size), math.inf
    with Evaluating(base.model), _Lookups() as lookups:
        states = base.states(torch.cat([base.probe(0, 1, last) for last in (3, 5)]))
    if not is_same(states[0, :2], states[1, :2]):
        raise ValueError(
            f"{name} ({base.model.config.model_type}) is not causal: a token sees the tokens after "
            "it, as in encoder-only models. GEM needs a decoder-only language model, e.g. Llama, Qwen or GPT-Neo."
        )
    places = [
        float(num_rows - int(ids.min()))
        for ids, num_rows in lookups.seen
        if ids.numel() and ids.shape[-1] == 3 and num_rows > 3 and bool((ids.diff() == 1).all())
    ]
    return states.shape[-1], min(places, default=math.inf)


def require_attention_mask(base: GemBase, shares_positions: bool) -> None:
    """Make sure that the GEM mask is obeyed, as K > 1 and rows with a suffix need it.

    FlashAttention takes no such mask; the model is then switched to sdpa (or eager), with a warning.

    Args:
        base: The base.
        shares_positions: Whether positions are to be obeyed too, as several GEM tokens share one.

    Raises:
        ValueError: If the model has no attention that could be masked, e.g. a state-space model.
    """
    implementation = base.attention
    if implementation not in MASKED_ATTENTION:
        masked = "sdpa" if getattr(base.model, "_supports_sdpa", False) else "eager"
        logger.warning(
            f"attn_implementation={implementation!r} takes no custom mask, which num_gem_tokens > 1 and rows with "
            f"a suffix need; switching to {masked!r}. Only num_gem_tokens=1 without a suffix runs without a mask."
        )
        base.model.set_attn_implementation(masked)
    cause: Exception | None = None
    try:
        obeys = _obeys_attention_mask(base, shares_positions)
    except REFUSALS as error:
        obeys, cause = False, error
    if not obeys:
        raise ValueError(
            f"{base.model.config.model_type} does not obey the GEM attention mask and positions: state-space and "
            "recurrent models have no attention to mask, ALiBi models no positions to share. It can be used with "
            "num_gem_tokens=1, trained on plain rows only: GemLoss(model, plain_ratio=1.0)."
        ) from cause


@torch.no_grad()
def _obeys_attention_mask(base: GemBase, shares_positions: bool) -> bool:
    """The second of two GEM tokens may not see the first; nor, to share its position, may positions be ignored."""
    segments = base.probe(PREFIX, GEM, GEM)
    real = torch.ones_like(segments)
    with Evaluating(base.model):
        ids = torch.cat([base.probe(0, 1, 3), base.probe(0, 2, 3)])
        masked = base.states(ids, segments.repeat(2, 1), real.repeat(2, 1))[:, -1]
        if not is_same(*masked) or not shares_positions:
            return is_same(*masked)
        positions = torch.cat([base.probe(0, 1, 2), base.probe(0, 1, 5)])
        moved = base.run(input_ids=ids[:1].repeat(2, 1), position_ids=positions)
    return not is_same(*moved)


@torch.no_grad()
def _reads_in_parts(base: GemBase) -> bool:
    """True if the model reads a row in two parts, with padding before the first, as it reads it in one."""
    if base.attention not in ("eager", "sdpa"):
        return True  # FlashAttention cannot be run yet, and flex_attention would compile for shapes of its own
    past, ids = DynamicCache(), base.probe(0, 0, 1, 2, 3)
    real = torch.ones_like(ids)
    real[:, 0] = 0
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    with Evaluating(base.model):
        whole = base.states(ids[:, 1:])
        try:
            for part in (slice(0, 3), slice(3, 5)):
                inputs = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
                last = base.run(past, attention_mask=real[:, : part.stop], **inputs)
        except REFUSALS:
            return False
    return len(past.layers) > 0 and is_same(last, whole[:, -2:])


class _Lookups(TorchFunctionMode):
    """Context that sees which rows of which tables are looked up: their ids, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self.seen.append((args[0], len(args[1])))
        elif func is Tensor.__getitem__:
            ids = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if isinstance(ids, Tensor) and args[0].ndim:
                self.seen.append((ids, len(args[0])))
        return func(*args, **(kwargs or {}))


def _has_window(config: Any) -> bool:
    """True if some layer does not see every key, so that gaps between keys would count."""
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return True
    return any(value for key, value in config.to_dict().items() if "window" in key or "chunk" in key)


def is_same(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding, which some kernels do by what else is in the batch.

    Raises:
        FloatingPointError: If one of them holds a number that is none, which says nothing of what is probed.
    """
    require_finite(first, second)
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    first, second = first.float(), second.float()
    return bool((first - second).abs().max() <= tolerance * first.abs().max())


def require_finite(*states: Tensor) -> None:
    """Raise if some hidden state, or what was computed of it, is not finite."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in states):
        return
    dtype = str(states[0].dtype).removeprefix("torch.")
    advice = "look for NaN in the weights, and download or train them again"
    if states[0].dtype == torch.float16:
        advice = 'load in bfloat16 or float32, e.g. by model_kwargs={"dtype": torch.bfloat16}'
    raise FloatingPointError(f"The model's hidden states are not finite in {dtype}; {advice}.")
