"""One copy of the weights: chat by transformers' own handlers, and embeddings between their decoding steps.

This is the one file that touches ``transformers.cli.serving``, which calls itself experimental.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState, Modality
from transformers.masking_utils import create_masks_for_generate

from ..finding import require_gem
from ..modeling.gem_cache import cache_name
from .bodies import ChatBody, CompletionBody, EmbeddingBody
from .conversations import Conversations
from .embeddings import EmbeddingQueue, Job, Kind, check_dimensions
from .errors import RequestError, too_long

# Its handlers log a line for each request, and what a parser could not make of an answer.
logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)

MAX_ID = 2**31 - 1
REUSED_HEADER = "x-gem-reused-tokens"
"""Header that says how many tokens of a conversation were not read again."""
STREAM_ERROR = 'data: {"error": "'
"""How a handler begins what went wrong in a stream. Within JSON these quotes would be escaped."""


class OneModel(ModelManager):
    """Knows one model, which is in memory, under one name; it neither loads nor downloads.

    Args:
        name: What requests call it.
        model: The language model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name  # given to the line above, it would be loaded once more
        self._pair = model, tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is, whatever folder is called like it."""
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """What is in memory."""
        return self._pair


class Turn(StoppingCriteria):
    """One answer of the language model; it stands where transformers' handlers expect the model.

    Called between decoding steps, it lets embeddings in, and stops where the client has hung up.

    Args:
        engine: Whose turn it is.
        field: The field of the request that holds the prompt.

    Attributes:
        num_prompt: Tokens of the prompt.
        num_new: Tokens written so far.
        num_reused: Tokens of the prompt that were not read again; None where nothing was looked up.
        has_begun: True from the time it waits for the inference thread.
    """

    def __init__(self, engine: Engine, field: str) -> None:
        self.engine = engine
        self.field = field
        self.num_prompt = self.num_new = 0
        self.num_reused: int | None = None
        self.has_begun = False
        self._is_cancelled = threading.Event()
        self._ids: Any = None

    def begin(self, input_ids: torch.Tensor, config: Any) -> None:
        """Check that a prompt fits, and let the answer end where the model's context does.

        Args:
            input_ids: The prompt. Shape: ``(1, T)``
            config: The generation configuration, which is changed.

        Raises:
            RequestError: 413 or 400, if it does not fit, is empty, or holds a token that was trained to embed.
        """
        limit, num_prompt = self.engine.context, input_ids.shape[-1]
        if not num_prompt:
            raise RequestError(400, f"{self.field} holds no token.", param=self.field)
        if num_prompt >= limit:
            raise too_long(num_prompt, limit - 1, self.field)
        gem = self.engine.gem
        if gem.mode != "frozen" and not gem.base.text.gem_token_ids.isdisjoint(input_ids[0].tolist()):
            raise RequestError(400, f"{self.field} spells the name of a GEM token. Leave it out.", param=self.field)
        config.max_new_tokens = min(config.max_new_tokens, limit - num_prompt)
        self.num_prompt, self.has_begun = num_prompt, True

    def cancel(self) -> None:
        """Stop before the next decoding step."""
        self._is_cancelled.set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """True for rows that are to end. Shape: ``(B, T)`` -> ``(B,)``"""
        self.num_new, self._ids = input_ids.shape[1] - self.num_prompt, input_ids
        self.engine.let_embeddings_in()
        return torch.full((len(input_ids),), self._is_cancelled.is_set(), device=input_ids.device)

    def generate(self, **kwargs: Any) -> Any:
        """What ``model.generate`` gives, in the inference thread."""
        if self._is_cancelled.is_set():
            if "streamer" in kwargs:
                kwargs["streamer"].end()
            return kwargs["input_ids"]
        model, past = self.engine.gem.model, self._past(kwargs["input_ids"], kwargs["generation_config"])
        if past is not None:
            kwargs[cache_name(create_masks_for_generate)] = past
        result = model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([self]))
        if past is not None:
            self.engine.keep(past, self._ids)
        return result

    def _past(self, input_ids: torch.Tensor, config: Any) -> DynamicCache | None:
        """Keys and values to begin with, and to be written to; None where none could be kept."""
        is_plain = config.cache_implementation is None and config.use_cache and (config.num_beams or 1) == 1
        if not (is_plain and self.engine.can_keep and len(input_ids) == 1):
            return None
        found = self.engine.conversations.find(input_ids[0, :-1].tolist())  # the last is read for its logits
        self.num_reused = 0 if found is None else found.input_ids.shape[1]
        return DynamicCache() if found is None else found.past_key_values()


class TurnManager(GenerateManager):
    """transformers' manager of the inference thread, with a :class:`Turn` in place of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: dict[str, Turn] = {}

    def generate_streaming(  # type: ignore[override]  # what it is called with is handed on
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        """As the base class; see :meth:`Turn.begin` for what is refused."""
        turn = self.turns[kwargs["request_id"]]
        turn.begin(inputs["input_ids"], gen_config)
        return super().generate_streaming(turn, processor, inputs, gen_config, **kwargs)  # type: ignore[arg-type]

    async def generate_non_streaming(  # type: ignore[override]  # what it is called with is handed on
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        """As the base class; see :meth:`Turn.begin` for what is refused."""
        turn = self.turns[kwargs["request_id"]]
        turn.begin(inputs["input_ids"], gen_config)
        answer = super().generate_non_streaming(turn, processor, inputs, gen_config, **kwargs)  # type: ignore[arg-type]
        # A client that hangs up must not cancel what the inference thread will deliver to.
        return await asyncio.shield(answer)


class OneThread(GenerationState):
    """Has one manager, and one thread, for whatever is asked for."""

    def __init__(self, manager: TurnManager) -> None:
        super().__init__()
        self._one = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager."""
        return self._one


class Engine:
    """A model that chats and embeds.

    Args:
        model: A SentenceTransformer whose first module is a GEM module.
        name: What requests call it.
        cache_bytes: Memory for conversations that have been read.
        batch_tokens: Tokens of a batch of embeddings.
        slice_seconds: Time that embeddings may take between two decoding steps; it takes as long as one text at least.
        allow_truncate: Give vectors of fewer dimensions to who asks for them.

    Raises:
        ValueError: If there is no GEM module.
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
    ) -> None:
        self.gem = require_gem(model, "gem-st serve")
        self.model = model.eval()
        self.name = name
        self.slice_seconds = slice_seconds
        self.allow_truncate = allow_truncate
        self.conversations = Conversations(cache_bytes)
        self.context = int(min(self.gem.base.context, self.gem.facts.num_positions, 2**31))
        self.num_places = self.gem.max_seq_length - self.gem.num_gem_tokens
        self.width = int(model.get_embedding_dimension() or self.gem.get_embedding_dimension())
        self.tokenizer = self.gem.tokenizer
        self._manager = TurnManager()
        handler_arguments = OneModel(name, self.gem.model, self.tokenizer), OneThread(self._manager)
        self._chat = ChatCompletionHandler(*handler_arguments)
        self._complete = CompletionHandler(*handler_arguments)
        self._embeddings = EmbeddingQueue(self._embed, batch_tokens)
        self._lock = threading.Lock()
        self._is_called = False

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

    # ---- chat

    def open_turn(self, request_id: str, field: str) -> Turn:
        """The turn of a request that is about to be handled, and the field that holds its prompt."""
        turn = self._manager.turns[request_id] = Turn(self, field)
        return turn

    def close_turn(self, request_id: str) -> None:
        """Forget a turn, and stop it where it is not over."""
        self._manager.turns.pop(request_id).cancel()

    async def chat(self, body: ChatBody, request_id: str) -> JSONResponse | StreamingResponse:
        """An answer to messages, as transformers' handler gives it.

        Raises:
            RequestError: If the model has no chat template, it does not take these messages, or they are too long.
        """
        self.check_name(body.model)
        if self.tokenizer.chat_template is None:
            raise RequestError(400, "The model has no chat template. Use /v1/completions.", param="messages")
        self._check_template_names(body.chat_template_kwargs or {})
        self._check_bias(body.logit_bias or {})
        return await self._handle(self._chat, body.for_handler(self.name), request_id)

    async def complete(self, body: CompletionBody, request_id: str) -> JSONResponse | StreamingResponse:
        """A continuation of text, as transformers' handler gives it.

        Raises:
            RequestError: If the text is too long, or empty.
        """
        self.check_name(body.model)
        return await self._handle(self._complete, body.for_handler(self.name), request_id)

    async def _handle(self, handler: Any, body: dict[str, Any], request_id: str) -> Any:
        turn = self._manager.turns[request_id]
        field = turn.field
        try:
            response = await handler.handle_request(body, request_id)
        except HTTPException as error:
            raise RequestError(error.status_code, str(error.detail)) from error
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            if turn.has_begun:
                raise
            what = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise RequestError(400, f"{field} cannot be read by the model's tokenizer: {what}.", param=field) from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = finish_stream(response.body_iterator)
        elif turn.num_reused is not None:
            response.headers[REUSED_HEADER] = str(turn.num_reused)
        return response

    def _check_template_names(self, given: dict[str, Any]) -> None:
        """Refuse what would not go to the template: another template above all, which is a program."""
        own = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "load_audio_from_video"}
        if refused := sorted(own & given.keys()):
            message = f"{', '.join(refused)} cannot be set; what the model's template names can, e.g. enable_thinking."
            raise RequestError(400, message, param="chat_template_kwargs")

    def _check_bias(self, bias: dict[str, float]) -> None:
        for token_id in bias:
            if not (token_id.isdecimal() and len(token_id) < 10 and self.gem.base.text.is_readable(int(token_id))):
                raise RequestError(400, f"There is no token {token_id!r:.40}.", param="logit_bias")

    # ---- embeddings

    async def embed(self, body: EmbeddingBody) -> Job:
        """The vectors of a request.

        Raises:
            RequestError: If something in it cannot be had, or is too long.
        """
        self.check_name(body.model)
        check_dimensions(body.dimensions, self.width, allow_truncate=self.allow_truncate)
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
            messages = BaseHandler.get_processor_inputs_from_messages(given, Modality.LLM)
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
            names = ("query",) if body.input_type == "query" else ("document", "passage", "corpus")
            name = next((candidate for candidate in names if candidate in prompts), None)
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
        self._manager.submit(self._embed_a_while)

    def _embed_a_while(self) -> None:
        """Embed for a slice, and queue up again for the rest, behind answers that wait."""
        with self._lock:
            self._is_called = False
        self._embeddings.run(self.slice_seconds)
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


async def finish_stream(parts: Any) -> AsyncIterator[str]:
    """A handler's stream with the end that clients of OpenAI's wait for, and an error in the shape that they read."""
    async for part in parts:
        start = part.find(STREAM_ERROR)
        if start < 0:
            yield part
            continue
        error = RequestError(500, "The answer could not be finished.").response().body
        yield f"{part[:start]}data: {bytes(error).decode()}\n\n"
    yield "data: [DONE]\n\n"
