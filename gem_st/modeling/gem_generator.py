"""Reader: token ids into a cache. Generator: continue texts, ids or a cache, reconstruct a memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.masking_utils import create_masks_for_generate

from .gem_base import GemBase
from .gem_batches import BATCH_SIZE, options_of_rows, order_of, split_rows
from .gem_cache import GemCache, GemMemory, cache_name, cache_of, tensors_of
from .gem_probes import BaseFacts
from .gem_text import Prompts
from .gem_tokens import GemTokens

ASSISTED_GENERATION = ("assistant_model", "prompt_lookup_num_tokens")


class GeneratedText(NamedTuple):
    """What :meth:`GemTransformer.generate` gives with ``return_cache=True``."""

    text: str | list[str]
    cache: GemCache


class WithoutGemTokens(SuppressTokensLogitsProcessor):
    """Has no GEM token written; as a class of its own, so that it takes the place of no other list of tokens."""


class Reader:
    """Reads token ids into caches.

    Args:
        base: The base.
        facts: What it can do.
    """

    def __init__(self, base: GemBase, facts: BaseFacts) -> None:
        self.base = base
        self.facts = facts

    def append(self, cache: GemCache | None, rows: list[list[int]]) -> GemCache:
        """Read rows of token ids behind what a cache holds, or as its beginning.

        Args:
            cache: What was read before; it stays as it is.
            rows: Token ids of each row.

        Raises:
            ValueError: If there is nothing to read, or more than the model's context.
        """
        self.facts.require_cache()
        if not rows:
            raise ValueError("There is nothing to read: an empty list was given.")
        new = self.base.text.pad([torch.tensor(row, dtype=torch.long) for row in rows], padding_side="right")
        ids, real = (new[name].to(self.base.model.device) for name in ("input_ids", "attention_mask"))
        if cache is None:
            self.base.check_context(real)
            past = self.base.read(ids, self.facts.width)[1]
        else:
            self.base.check_cache(cache)
            past, num_new = cache.past_key_values(), ids.shape[1]
            ids, real = torch.cat([cache.input_ids, ids], dim=1), torch.cat([cache.attention_mask, real], dim=1)
            self.base.check_context(real)
            if num_new:
                positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
                inputs = {"input_ids": ids[:, -num_new:], "attention_mask": real.long(), "position_ids": positions}
                self.base.run(past, **inputs)
        return self.make_cache(past, ids, real)

    def make_cache(self, past: DynamicCache, input_ids: Tensor, real: Tensor) -> GemCache:
        """A cache of what the model has read. Shape: ``(B, T)`` each"""
        tags = torch.full((len(real),), self.base.weights_id(), device=real.device)
        mask = real.bool()
        return GemCache(tensors_of(past), input_ids=input_ids, attention_mask=mask, weights_tag=tags).keep(mask)


class Generator:
    """Writes text, as the language model that the base still is.

    Args:
        base: The base.
        reader: Reads what was written last.
        tokens: The GEM tokens.
        suppressed: Ids that are never written; the saved ``generation_config`` names them as well.
    """

    def __init__(self, base: GemBase, reader: Reader, tokens: GemTokens, suppressed: list[int]) -> None:
        self.base = base
        self.reader = reader
        self.tokens = tokens
        self.suppressed = suppressed
        if suppressed:
            config = base.model.generation_config
            config.suppress_tokens = sorted({*(config.suppress_tokens or []), *suppressed})

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        cache: GemCache | None = None,
        return_cache: bool = False,
        batch_size: int = BATCH_SIZE,
        chat_template_kwargs: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> str | list[str] | GeneratedText:
        """Continue texts or what a cache has read, see :meth:`GemTransformer.generate`."""
        if (prompts is None) == (cache is None):
            raise ValueError("generate needs either prompts or a cache, and not both.")
        if return_cache:
            self.reader.facts.require_cache()
            if self._option("num_beams", generate_kwargs, 1) > 1:
                raise ValueError("return_cache=True needs num_beams=1.")
        is_single = False
        begin: Callable[[list[int]], tuple[Tensor, Tensor, DynamicCache | None]]
        if cache is None:
            assert prompts is not None
            rows, is_single = self._rows_of(prompts, chat_template_kwargs)
            if not rows and return_cache:
                raise ValueError("There is nothing to read: an empty list was given.")
            lengths, begin = [len(row) for row in rows], partial(self._begin_with_rows, rows, return_cache)
        else:
            if chat_template_kwargs:
                raise ValueError("chat_template_kwargs were given with a cache. Give them to `prefill`, which reads.")
            self.base.check_cache(cache)
            if bool((cache.lengths == 0).any()):
                raise ValueError("A row of the cache is empty: there is nothing to continue.")
            lengths, begin = cache.lengths.tolist(), partial(self._begin_with_cache, cache, generate_kwargs)
        generate_kwargs = self._count_new(lengths, generate_kwargs)
        stopped = self._stopped(lengths, generate_kwargs, return_cache)
        batches = split_rows(lengths, batch_size, stopped)
        parts = []
        for batch in batches:
            options = options_of_rows(generate_kwargs, batch, len(lengths))
            if (length := lengths[batch[0]]) in stopped:
                options = {**options, "max_length": None, "max_new_tokens": stopped[length]}
            parts.append(self._write(*begin(batch), return_cache, options))
        order = order_of(batches, [len(texts) for texts, _ in parts])
        texts = [text for new_texts, _ in parts for text in new_texts]
        texts = [texts[index] for index in order]
        result = texts[0] if is_single and len(texts) == 1 else texts
        if not return_cache:
            return result
        caches = [new_cache for _, new_cache in parts if new_cache is not None]
        return GeneratedText(result, caches[0] if len(caches) == 1 else GemCache.join(caches)[order])

    def _count_new(self, lengths: list[int], generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """``max_length`` as new tokens behind the longest row, as in one batch, however many batches there are."""
        max_length, longest = self._option("max_length", generate_kwargs), max(lengths, default=0)
        if not max_length or max_length <= longest or self._option("max_new_tokens", generate_kwargs) is not None:
            return generate_kwargs
        return {**generate_kwargs, "max_length": None, "max_new_tokens": max_length - longest}

    def _stopped(self, lengths: list[int], generate_kwargs: dict[str, Any], keep: bool) -> dict[int, int]:
        """Of rows that would outgrow the model's positions, or a context that is read back, the tokens that fit in."""
        limits = (self.reader.facts.num_positions, *((self.base.context, self.base.rope_limit) if keep else ()))
        limit, longest = min(limits), max(lengths, default=0)
        if longest >= limit:
            raise ValueError(
                f"{longest} tokens leave no place to write in the model's context of {limit:.0f}. Shorten the texts, "
                "or the cache with cache.crop(...)."
            )
        num_new = self._option("max_new_tokens", generate_kwargs)
        max_length = self._option("max_length", generate_kwargs)
        ends = {length: (max_length or length + 20) if num_new is None else length + num_new for length in lengths}
        return {length: int(limit) - length for length, end in ends.items() if end > limit}

    def _rows_of(self, prompts: Prompts, chat_template_kwargs: Any) -> tuple[list[list[int]], bool]:
        """Token ids of prompts, of which none is empty, and whether a single one was given."""
        text = self.base.text
        rows, is_single = text.encode_prompts(prompts, chat_template_kwargs=chat_template_kwargs)
        start = text.tokenizer.bos_token_id
        empty = [] if start is None or not text.is_readable(start) else [start]
        if any(not row for row in rows) and not empty:
            raise ValueError("An empty prompt needs a tokenizer with a BOS token to start from; give some text.")
        return [row or empty for row in rows], is_single

    def _begin_with_rows(
        self, rows: list[list[int]], keep: bool, batch: list[int]
    ) -> tuple[Tensor, Tensor, DynamicCache | None]:
        """Ids and mask of some of the rows, and a cache to be written to if what is read is kept."""
        inputs = self.base.text.pad([torch.tensor(rows[index]) for index in batch], padding_side="left")
        ids, real = (inputs[name].to(self.base.model.device) for name in ("input_ids", "attention_mask"))
        return ids, real, DynamicCache() if keep else None

    def _begin_with_cache(
        self, cache: GemCache, generate_kwargs: dict[str, Any], batch: list[int]
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Ids and mask of some of the rows of a cache, and their keys and values, which are written to."""
        if len(batch) < len(cache):
            cache = cache[batch]
            cache = cache.keep(cache.attention_mask)  # without padding that no row of it needs
        # The last token is read again, for its logits.
        past = cache_of((tensor[:, :, :-1] for tensor in layer) for layer in cache.layers)
        names = ("num_beams", "num_return_sequences")
        past.batch_repeat_interleave(max(self._option(name, generate_kwargs, 1) for name in names))
        return cache.input_ids, cache.attention_mask.long(), past

    def _write(
        self, ids: Tensor, real: Tensor, past: DynamicCache | None, return_cache: bool, generate_kwargs: dict[str, Any]
    ) -> tuple[list[str], GemCache | None]:
        """What is written behind the rows of one batch. Shape: ``(B, T)`` each"""
        output = self.continue_ids(ids, real, past, **generate_kwargs)
        written = self._is_written(output.sequences[:, ids.shape[1] :], generate_kwargs)
        keep = F.pad(written, (ids.shape[1], 0), value=True)
        sequences = [sequence[mask] for sequence, mask in zip(output.sequences, keep, strict=True)]
        texts = [self.base.text.decode_continuation(sequence, ids.shape[1]) for sequence in sequences]
        return texts, self._cache_of_output(output, real, written) if return_cache else None

    def continue_ids(
        self, input_ids: Tensor, attention_mask: Tensor, past: DynamicCache | None = None, **generate_kwargs: Any
    ) -> Any:
        """What transformers' ``generate`` returns as a dict, of token ids padded on the left.

        Args:
            input_ids: Token ids. Shape: ``(B, T)``
            attention_mask: 1 for real tokens. Shape: ``(B, T)``
            past: Keys and values of the first of them, to be written to.
            **generate_kwargs: Passed to ``generate``.

        Raises:
            ValueError: If the options cannot be had with a cache.
        """
        if self.suppressed:  # beside the option `suppress_tokens`, which is the user's and the base's
            own = WithoutGemTokens(self.suppressed, device=str(input_ids.device))
            generate_kwargs["logits_processor"] = [*(generate_kwargs.get("logits_processor") or []), own]
        if past is not None:
            if generate_kwargs.get("use_cache", True) is False:
                raise ValueError("use_cache=False was given, but a cache is to be read or returned.")
            is_assisted = any(self._option(name, generate_kwargs) for name in ASSISTED_GENERATION)
            if is_assisted and past.get_seq_length():
                raise ValueError(f"Assisted generation ({', '.join(ASSISTED_GENERATION)}) cannot start from a cache.")
            generate_kwargs |= {"use_cache": True, cache_name(create_masks_for_generate): past}
        if self._option("stop_strings", generate_kwargs) or "assistant_tokenizer" in generate_kwargs:
            generate_kwargs.setdefault("tokenizer", self.base.text.tokenizer)
        generate_kwargs["pad_token_id"] = self._pad_token_id(generate_kwargs)
        options = {**generate_kwargs, "return_dict_in_generate": True}
        return self.base.model.generate(input_ids, attention_mask=attention_mask, **options)

    def reconstruct(self, memory: GemMemory, *, batch_size: int = BATCH_SIZE, **generate_kwargs: Any) -> list[str]:
        """Write the texts that a memory was made of, see :meth:`GemTransformer.reconstruct`."""
        if getattr(memory, "kind", type(memory).__name__) != GemMemory.kind:
            raise ValueError(f"A GemMemory is needed, got {type(memory).__name__}. `compress` makes one.")
        self.base.check_weights(memory)
        num_around = self.base.text.num_special_tokens + len(self.base.text.end_ids)
        limit, lengths = self.reader.facts.num_positions, memory.lengths.tolist()
        num_new = [int(max(0, min(length - num_around, limit - length))) for length in lengths]
        stopped = {length for length in lengths if length + max(num_new) > limit}
        batches = split_rows(lengths, batch_size, stopped)
        parts = [self._reconstruct(memory[rows], [num_new[row] for row in rows], generate_kwargs) for rows in batches]
        texts = [text for part in parts for text in part]
        return [texts[index] for index in order_of(batches, [len(part) for part in parts])]

    def _reconstruct(self, memory: GemMemory, num_new: list[int], generate_kwargs: dict[str, Any]) -> list[str]:
        """Write so many tokens of each text of one batch."""
        longest = max(num_new)
        if longest < 1:
            return [""] * len(memory)
        logits = self.base.logits(memory.last_hidden_state)
        logits[:, self.suppressed] = -torch.inf
        # The ids of the GEM tokens are not read again: their keys and values are there.
        ids = F.pad(logits.argmax(dim=-1, keepdim=True), (len(self.tokens), 0), value=self.base.text.pad_token_id)
        sequences = ids
        max_new_tokens = min(generate_kwargs.get("max_new_tokens") or longest, longest - 1)
        if max_new_tokens > 0:
            sequences = self.continue_ids(
                ids,
                torch.ones_like(ids),
                cache_of(memory.layers),
                position_ids=memory.lengths[:, None] + 1 + torch.arange(-len(self.tokens), 1, device=ids.device),
                **{"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens},
            ).sequences
        new = sequences[:, len(self.tokens) :]
        written = self._is_written(new, generate_kwargs)
        decode: Any = partial(self.base.text.tokenizer.decode, skip_special_tokens=True)
        return [decode(row[mask][:limit]) for row, mask, limit in zip(new, written, num_new, strict=True)]

    def _cache_of_output(self, output: Any, prompt_mask: Tensor, written: Tensor) -> GemCache:
        """What transformers' ``generate`` has read and written, the last token included, as a :class:`GemCache`."""
        sequences = output.sequences
        prompt_mask = prompt_mask.bool().repeat_interleave(len(sequences) // len(prompt_mask), dim=0)
        real = torch.cat([prompt_mask, written], dim=1)
        past = output[cache_name(create_masks_for_generate)]
        num_read = past.get_seq_length()
        cache = self.reader.make_cache(past, sequences[:, :num_read], real[:, :num_read])
        rest = [ids[keep].tolist() for ids, keep in zip(sequences[:, num_read:], real[:, num_read:], strict=True)]
        with torch.no_grad():
            return self.reader.append(cache, rest)

    def _is_written(self, new_ids: Tensor, generate_kwargs: dict[str, Any]) -> Tensor:
        """True for tokens before the end token and the padding behind it. Shapes: ``(B, T)`` -> ``(B, T)``"""
        eos = self._option("eos_token_id", generate_kwargs)
        eos_ids = torch.as_tensor([] if eos is None else eos, device=new_ids.device).reshape(-1)
        is_over = torch.isin(new_ids, eos_ids).cumsum(dim=1) > 0
        is_text = new_ids != self._pad_token_id(generate_kwargs)
        is_padding = is_text.flip(1).cumsum(dim=1).flip(1) == 0
        return ~is_over & ~is_padding

    def _pad_token_id(self, generate_kwargs: dict[str, Any]) -> int:
        """As given, unless the model has no row for it that finished rows could read."""
        given = generate_kwargs.get("pad_token_id")
        return self.base.text.pad_token_id if given is None or not self.base.text.is_readable(given) else given

    def _option(self, name: str, generate_kwargs: dict[str, Any], default: Any = None) -> Any:
        """An option of `generate`: as given, else of the given `generation_config`, else of the model's."""
        configs = (generate_kwargs.get("generation_config"), self.base.model.generation_config)
        values = [generate_kwargs[name]] if name in generate_kwargs else [getattr(c, name, None) for c in configs]
        return next((value for value in values if value is not None), default)
