"""One copy of the weights: chat, and embeddings between its decoding steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from transformers.cache_utils import DynamicCache

from ..finding import find_prompt_name, require_gem
from .bodies import EmbeddingBody
from .chat import Chat, messages_for_template
from .conversations import Conversations
from .embeddings import EmbeddingQueue, Job, Kind, check_dimensions
from .errors import RequestError, too_long

MAX_ID = 2**31 - 1


class Engine:
    """A model that chats and embeds.

    Args:
        model: A SentenceTransformer whose first module is a GEM module.
        name: What requests call it.
        cache_bytes: Memory for conversations that have been read.
        batch_tokens: Tokens of a batch of embeddings.
        slice_seconds: Time that embeddings may take between two decoding steps; it takes as long as one text at least.
        allow_truncate: Give vectors of fewer dimensions to who asks for them.
        allow_token_ids: Embed token ids, too.
        continuous_batching: Write answers together; they have ``cache_bytes`` of memory beside the conversations.

    Raises:
        ValueError: If there is no GEM module, or answers cannot be written together.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        *,
        cache_bytes: int = 2**30,
        batch_tokens: int = 4096,
        slice_seconds: float = 0.05,
        allow_truncate: bool = False,
        allow_token_ids: bool = False,
        continuous_batching: bool = False,
    ) -> None:
        self.gem = require_gem(model, "gem-st serve")
        self.model = model.eval()
        self.name = name
        self.slice_seconds = slice_seconds
        self.allow_truncate = allow_truncate
        self.allow_token_ids = allow_token_ids
        self.conversations = Conversations(cache_bytes)
        self.context = int(min(self.gem.base.context, self.gem.facts.num_positions, 2**31))
        self.num_places = self.gem.max_seq_length - self.gem.num_gem_tokens
        self.width = int(model.get_embedding_dimension() or self.gem.get_embedding_dimension())
        self.tokenizer = self.gem.tokenizer
        self._embeddings = EmbeddingQueue(self._embed, batch_tokens)
        self._lock = threading.Lock()
        self._is_called = False
        self.chat = Chat(self, name, cache_bytes if continuous_batching else None)

    @property
    def can_keep(self) -> bool:
        """True if what was read can be gone on from, and there is memory for it."""
        return self.gem.facts.can_cache and self.conversations.max_bytes > 0

    def check_name(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            RequestError: 404.
        """
        if name not in (None, self.name):
            raise RequestError(
                404, f"There is no model {name!r:.200}; there is {self.name!r}.", param="model", code="model_not_found"
            )

    # ---- embeddings

    async def embed(self, body: EmbeddingBody) -> Job:
        """The vectors of a request.

        Raises:
            RequestError: If something in it cannot be had, or is too long.
        """
        self.check_name(body.model)
        check_dimensions(body.dimensions, self.width, allow_truncate=self.allow_truncate)
        if not self.allow_token_ids:
            body.refuse_ids()
        if (body.input is None) == (body.messages is None):
            raise RequestError(400, "Either input or messages is needed, and not both.", param="input")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Job] = loop.create_future()

        def settle(job: Job) -> None:
            if not future.done():
                future.set_result(job)

        def deliver(job: Job) -> None:
            loop.call_soon_threadsafe(settle, job)

        job = await asyncio.to_thread(self._job_of, body, deliver)
        self._embeddings.put(job)
        self._call()
        try:
            await future
        finally:
            job.is_cancelled = True
        if job.error is not None:
            raise job.error
        return job

    def _job_of(self, body: EmbeddingBody, deliver: Callable[[Job], None]) -> Job:
        """Rows of a request with their lengths, of which none is too long. An input is never truncated."""
        try:
            kind, rows, lengths = self._conversation_of(body) if body.messages is not None else self._rows_of(body)
        except ValueError as error:
            raise RequestError(400, str(error), param="input") from error
        if max(lengths) > self.num_places:
            field = "input" if body.messages is None else "messages"
            place = "" if len(rows) == 1 else f".{lengths.index(max(lengths))}"
            raise too_long(max(lengths), self.num_places, field, place)
        return Job(kind, rows, lengths, deliver)

    def _rows_of(self, body: EmbeddingBody) -> tuple[Kind, list[Any], list[int]]:
        """Texts or rows of token ids, and how many tokens each has with the prompt."""
        rows: Any = body.rows()
        if isinstance(rows[0], str):
            kind = self._kind_of(body)
            return kind, rows, [len(row) for row in self.gem.base.text.encode(rows, kind.prompt or "")]
        self._refuse_prompt(body, "token ids")
        is_readable = self.gem.base.text.is_readable
        refused = next((i for row in rows for i in row if i > MAX_ID or not is_readable(i)), None)
        if refused is not None:
            raise RequestError(400, f"The model has no token {refused!r:.40} for texts.", param="input")
        return Kind("ids"), rows, [len(row) for row in rows]

    def _conversation_of(self, body: EmbeddingBody) -> tuple[Kind, list[Any], list[int]]:
        """Token ids of a conversation, which ends where its last message ends."""
        self._refuse_prompt(body, "messages")
        given = [message.model_dump(exclude_none=True) for message in body.messages or ()]
        text = self.gem.base.text
        try:
            messages = messages_for_template(given)
            rows, _ = text.encode_prompts(messages, chat_template_kwargs={"add_generation_prompt": False})
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RequestError(400, f"messages cannot be read: {error}", param="messages") from error
        num_tokens = len(rows[0]) + len(text.end_ids)
        if self.can_keep:
            return Kind("conversation"), rows, [num_tokens]
        return Kind("ids"), [rows[0] + text.end_ids], [num_tokens]

    def _kind_of(self, body: EmbeddingBody) -> Kind:
        """The prompt that Sentence Transformers would put before these texts."""
        prompts, name = self.model.prompts, body.prompt_name
        if name is not None and name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise RequestError(400, f"There is no prompt {name!r:.80}; there are: {known}.", param="prompt_name")
        if name is None and body.input_type is not None:
            name = find_prompt_name(prompts, body.input_type)
        name = self.model.default_prompt_name if name is None else name
        return Kind("text", prompts.get(name) if name else None, body.input_type)

    def _refuse_prompt(self, body: EmbeddingBody, what: str) -> None:
        for field in ("prompt_name", "input_type"):
            if getattr(body, field) is not None:
                raise RequestError(400, f"{field} puts a prompt before texts, not before {what}.", param=field)

    @torch.no_grad()
    def _embed(self, kind: Kind, rows: list[Any], jobs: list[Job]) -> Any:
        """Vectors of one batch, in the inference thread. Shape: ``(B, D)``"""
        if kind.form == "text":
            options: dict[str, Any] = {"prompt": kind.prompt, "task": kind.task, "show_progress_bar": False}
            vectors: Any = self.model.encode(rows, batch_size=len(rows), convert_to_tensor=True, **options)
        elif kind.form == "ids":
            padded = self.gem.pad([torch.tensor(row + self.gem.gem_token_ids) for row in rows])
            features = {name: tensor.to(self.gem.model.device) for name, tensor in padded.items()}
            vectors = self.model(features)["sentence_embedding"]
        else:
            vectors = self._embed_conversation(rows[0], jobs[0])
        if self.model.truncate_dim is not None:
            vectors = vectors[:, : self.model.truncate_dim]
        return vectors.float().cpu().numpy()

    def _embed_conversation(self, ids: list[int], job: Job) -> torch.Tensor:
        """The vector of a conversation, at the price of the tokens that are new. Shape: ``(1, D)``"""
        found = self.conversations.find(ids)
        job.num_reused = 0 if found is None else found.input_ids.shape[1]
        is_whole = job.num_reused == len(ids)
        cache = found if found is not None and is_whole else self.gem.reader.append(found, [ids[job.num_reused :]])
        self.conversations.keep(cache)
        features = {"sentence_embedding": self.gem.summarize(cache)}
        for module in list(self.model)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    # ---- the inference thread

    def _call(self) -> None:
        """Have the inference thread embed what waits, when what it has begun is over, or between decoding steps."""
        with self._lock:
            if self._is_called:
                return
            self._is_called = True
        self.chat.thread.submit(self._embed_a_while)

    def _embed_a_while(self) -> None:
        """Embed for a slice, and queue up again for the rest, behind answers that wait."""
        with self._lock:
            self._is_called = False
        with self.chat.pause():
            self._embeddings.run(self.slice_seconds, is_awaited=self.chat.is_paused)
        if self._embeddings:
            self._call()

    def let_embeddings_in(self) -> None:
        """Embed for a slice what waits, in the inference thread, between two decoding steps."""
        self._embeddings.run(self.slice_seconds, is_awaited=True)

    def keep(self, past: DynamicCache, ids: torch.Tensor) -> None:
        """Keep what an answer has read and written. Shape: ``(1, T)``, of which a last token may not have been read"""
        ids = ids[:, : past.get_seq_length()]
        with torch.no_grad():
            self.conversations.keep(self.gem.reader.make_cache(past, ids, torch.ones_like(ids)))
