"""What a GEM module does besides embedding texts: read once, then embed, extend, continue and reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .gem_base import Evaluating
from .gem_batches import BATCH_SIZE, slices
from .gem_cache import GemCache, GemMemory
from .gem_generator import GeneratedText
from .gem_parts import GemParts
from .gem_text import Prompts, list_of

logger = logging.get_logger(__name__)


class LanguageMethods(GemParts):
    """Methods of :class:`GemTransformer` that take texts or caches, and put the module in evaluation mode meanwhile."""

    @torch.no_grad()
    def prefill(
        self,
        texts: Prompts,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> GemCache:
        """Read texts once, to embed and to continue them.

        Args:
            texts: Texts or chat messages, as :meth:`generate` takes them.
            prompt: Put before every text; none of the model's prompts is by itself.
            max_length: Tokens in a row, the K places for GEM tokens included, instead of :attr:`max_seq_length`.
                Longer texts are truncated as `encode` does, with a warning.
            batch_size: Texts that are read at once.
            chat_template_kwargs: Passed to the tokenizer's ``apply_chat_template``, for messages, e.g.
                ``{"enable_thinking": False}``, ``{"tools": [...]}`` or ``{"add_generation_prompt": False}``.

        Returns:
            A cache of B rows, whose GEM tokens are yet to come, and so are the tokens that some tokenizers put behind
            every text: :meth:`embed` reads them, and :meth:`generate` goes on where the text ends.
        """
        rows = self._rows_of(texts, prompt or "", max_length, chat_template_kwargs)
        with Evaluating(self):
            parts = [self.reader.append(None, rows[part]) for part in slices(len(rows), batch_size)]
        return parts[0] if len(parts) == 1 else GemCache.join(parts)

    def _rows_of(
        self,
        texts: Prompts,
        prompt: str = "",
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[list[int]]:
        """Token ids of texts, with a warning if some had to be truncated."""
        text, width = self.base.text, self._num_places(max_length)
        rows, _ = text.encode_prompts(texts, prompt, None, chat_template_kwargs)
        if not rows:
            raise ValueError("There is nothing to read: an empty list was given.")
        if any(len(row) > width - len(text.end_ids) for row in rows):
            logger.warning(
                f"Some of {len(rows)} texts were truncated to {width} tokens; raise max_length to keep more."
            )
            rows, _ = text.encode_prompts(texts, prompt, width, chat_template_kwargs)
        return rows

    @torch.no_grad()
    def extend(self, cache: GemCache, texts: str | Sequence[str]) -> GemCache:
        """Append text to what a cache has read, at the price of the new tokens.

        Args:
            cache: What was read before; it stays as it is.
            texts: One text for each row, or one for all. Each is tokenised on its own, without special tokens.

        Returns:
            A new cache.

        Raises:
            ValueError: If there are more or fewer texts than rows, or they exceed the model's context.
        """
        texts = [texts] * len(cache) if isinstance(texts, str) else list_of(texts)
        if len(texts) != len(cache):
            raise ValueError(f"extend needs one text for each of {len(cache)} rows, or one for all, got {len(texts)}.")
        with Evaluating(self):
            return self.reader.append(cache, self.base.text.encode(texts, add_special_tokens=False))

    @torch.no_grad()
    def embed(self, cache: GemCache) -> Tensor:
        """Embed what a cache has read, at the price of K tokens; `summarize` is another name of it.

        Args:
            cache: From :meth:`prefill`, :meth:`extend` or :meth:`generate`; it stays as it is.

        Returns:
            What `encode` gives for the same tokens, before further modules.
            Shape: ``(B, D)``, or ``(B, K * D)`` for concat

        Raises:
            ValueError: If the cache is not of this model.
        """
        with Evaluating(self):
            return self.embedder.embed_cache(self._end(cache)).to(self.embedding_dtype)

    summarize = embed

    @torch.no_grad()
    def compress(
        self,
        texts: Prompts | GemCache,
        *,
        batch_size: int = BATCH_SIZE,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> GemMemory:
        """Keep of texts only the keys and values of their K GEM tokens (paper, table 6).

        Args:
            texts: Texts or chat messages, or a cache that has read them.
            batch_size: Texts that are read at once.
            chat_template_kwargs: As :meth:`prefill` takes them.

        Returns:
            A memory of B rows, whose size does not depend on the texts' length.
        """
        given: Any = texts
        with Evaluating(self):
            if hasattr(given, "weights_tag"):
                if chat_template_kwargs:
                    raise ValueError("chat_template_kwargs were given with a cache. Give them to `prefill`.")
                return self.embedder.compress(self._end(given))
            rows = self._rows_of(given, chat_template_kwargs=chat_template_kwargs)
            parts = (self.reader.append(None, rows[part]) for part in slices(len(rows), batch_size))
            return GemMemory.join([self.embedder.compress(self._end(part)) for part in parts])

    def _end(self, cache: GemCache) -> GemCache:
        """What a cache has read, with the tokens that the tokenizer puts behind a text that is embedded, if any."""
        end_ids = self.base.text.end_ids
        return self.reader.append(cache, [end_ids] * len(cache)) if end_ids else cache

    @torch.no_grad()
    def reconstruct(self, memory: GemMemory, *, batch_size: int = BATCH_SIZE, **generate_kwargs: Any) -> list[str]:
        """Write the texts that a memory was made of, as far as it holds them (paper, table 6).

        It takes a model trained with the reconstruction task of :class:`gem_st.GemLoss`. Decoding is greedy unless
        asked otherwise, and stops after as many tokens as the text had.

        Args:
            memory: From :meth:`compress`.
            batch_size: Texts that are written at once.
            **generate_kwargs: Passed to transformers' ``generate``; the first token is always the most likely one.

        Returns:
            One text for each row.

        Raises:
            ValueError: If it is no memory.
        """
        with Evaluating(self):
            return self.generator.reconstruct(memory, batch_size=batch_size, **generate_kwargs)

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
        """Continue text, or answer chat messages, as the language model that this model still is.

        Args:
            prompts: A text, a list of texts, the messages of a conversation (dicts with ``role`` and ``content``),
                or a list of such conversations. Messages need a tokenizer with a chat template.
            cache: What was read before, instead of prompts; it stays as it is.
            return_cache: Also return what was read and written, without the end token, to be embedded or extended.
            batch_size: Rows that are continued at once, of like length; the order of the results is that of the rows.
            chat_template_kwargs: As :meth:`prefill` takes them, for messages.
            **generate_kwargs: Passed to transformers' ``generate``, e.g. ``max_new_tokens=40, do_sample=True``.

        Returns:
            The new text, without the prompt: a string for a single prompt, otherwise, and for a cache, a list of
            strings. With ``num_return_sequences`` above 1 always a list, all sequences of a prompt in a row. With
            ``return_cache`` the pair ``(text, cache)``. Text stops where the model's context ends if it looks positions
            up in a table, as GPT-2 does, or if the cache is returned.

        Raises:
            ValueError: If a prompt is not text, messages are given and the tokenizer has no chat template, there
                is not either a prompt or a cache to start from, or no place is left to write in such a context.
        """
        options = {"cache": cache, "return_cache": return_cache, "batch_size": batch_size, **generate_kwargs}
        options["chat_template_kwargs"] = chat_template_kwargs
        with Evaluating(self):
            return self.generator.generate(prompts, **options)
