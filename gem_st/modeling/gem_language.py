"""What a GEM module does besides embedding texts: read once, then embed, extend, continue and reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .gem_base import Evaluating
from .gem_cache import GemCache, GemMemory
from .gem_generator import GeneratedText
from .gem_parts import GemParts
from .gem_text import Prompts

logger = logging.get_logger(__name__)


class LanguageMethods(GemParts):
    """Methods of :class:`GemTransformer` that take texts or caches, and put the module in evaluation mode meanwhile."""

    @torch.no_grad()
    def prefill(self, texts: Prompts, *, prompt: str | None = None, max_length: int | None = None) -> GemCache:
        """Read texts once, to embed and to continue them.

        Args:
            texts: Texts or chat messages, as :meth:`generate` takes them.
            prompt: Put before every text; none of the model's prompts is by itself.
            max_length: Tokens in a row, the K places for GEM tokens included, instead of :attr:`max_seq_length`.
                Longer texts are truncated as `encode` does, with a warning.

        Returns:
            A cache of B rows, whose GEM tokens are yet to come, and so are the tokens that some tokenizers put behind
            every text: :meth:`embed` reads them, and :meth:`generate` goes on where the text ends.
        """
        text, width = self.base.text, self._num_places(max_length)
        rows, _ = text.encode_prompts(texts, prompt or "")
        if any(len(row) > width - len(text.end_ids) for row in rows):
            logger.warning(
                f"Some of {len(rows)} texts were truncated to {width} tokens; raise max_length to keep more."
            )
            rows, _ = text.encode_prompts(texts, prompt or "", width)
        with Evaluating(self):
            return self.reader.append(None, rows)

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
        texts = [texts] * len(cache) if isinstance(texts, str) else list(texts)
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
    def compress(self, texts: Prompts | GemCache) -> GemMemory:
        """Keep of texts only the keys and values of their K GEM tokens (paper, table 6).

        Args:
            texts: Texts or chat messages, or a cache that has read them.

        Returns:
            A memory of B rows, whose size does not depend on the texts' length.
        """
        cache: Any = texts if hasattr(texts, "weights_tag") else self.prefill(texts)
        with Evaluating(self):
            return self.embedder.compress(self._end(cache))

    def _end(self, cache: GemCache) -> GemCache:
        """What a cache has read, with the tokens that the tokenizer puts behind a text that is embedded, if any."""
        end_ids = self.base.text.end_ids
        return self.reader.append(cache, [end_ids] * len(cache)) if end_ids else cache

    @torch.no_grad()
    def reconstruct(self, memory: GemMemory, **generate_kwargs: Any) -> list[str]:
        """Write the texts that a memory was made of, as far as it holds them (paper, table 6).

        It takes a model trained with the reconstruction task of :class:`gem_st.GemLoss`. Decoding is greedy unless
        asked otherwise, and stops after as many tokens as the text had.

        Args:
            memory: From :meth:`compress`.
            **generate_kwargs: Passed to transformers' ``generate``; the first token is always the most likely one.

        Returns:
            One text for each row.

        Raises:
            ValueError: If it is no memory.
        """
        with Evaluating(self):
            return self.generator.reconstruct(memory, **generate_kwargs)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        cache: GemCache | None = None,
        return_cache: bool = False,
        **generate_kwargs: Any,
    ) -> str | list[str] | GeneratedText:
        """Continue text, or answer chat messages, as the language model that this model still is.

        Args:
            prompts: A text, a list of texts, the messages of a conversation (dicts with ``role`` and ``content``),
                or a list of such conversations. Messages need a tokenizer with a chat template.
            cache: What was read before, instead of prompts; it stays as it is.
            return_cache: Also return what was read and written, without the end token, to be embedded or extended.
            **generate_kwargs: Passed to transformers' ``generate``, e.g. ``max_new_tokens=40, do_sample=True``.

        Returns:
            The new text, without the prompt: a string for a single prompt, otherwise, and for a cache, a list of
            strings. With ``num_return_sequences`` above 1 always a list, all sequences of a prompt in a row. With
            ``return_cache`` the pair ``(text, cache)``.

        Raises:
            ValueError: If a prompt is not text, messages are given and the tokenizer has no chat template, or there
                is not either a prompt or a cache to start from.
        """
        options = {"cache": cache, "return_cache": return_cache, **generate_kwargs}
        with Evaluating(self):
            return self.generator.generate(prompts, **options)
