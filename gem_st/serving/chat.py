"""Chat and completion by transformers' own handlers, one answer after another or in continuous batches.

This is the one file that touches ``transformers.cli.serving``, which calls itself experimental.
"""

from __future__ import annotations

import asyncio
import bisect
import copy
import inspect
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import ContinuousBatchingConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseHandler,
    CBGenerateManager,
    CBWorkerDeadError,
    GenerateManager,
    GenerationState,
    Modality,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.masking_utils import create_masks_for_generate

from ..modeling.gem_cache import cache_name
from .bodies import ChatBody, CompletionBody, Sampling
from .errors import RequestError, too_long

if TYPE_CHECKING:
    from .engine import Engine

# They log a line for each request, what a parser could not make of an answer, and ids of a prompt that was dropped.
for _name in ("transformers.cli.serving", "ContinuousBatchingLogger"):
    logging.getLogger(_name).setLevel(logging.ERROR)

REUSED_HEADER = "x-gem-reused-tokens"
"""Header that says how many tokens of a conversation were not read again."""
STREAM_ERROR = 'data: {"error": "'
"""How a handler begins what went wrong in a stream. Within JSON these quotes would be escaped."""
PAGE_TOKENS = 32
"""Tokens of a page of the memory that answers in one batch share."""
STEP_TOKENS = 512
"""Tokens that a step of continuous batching reads; a longer prompt takes several."""
SCHEDULER = "gem_st"
"""What transformers knows :class:`Scheduler` by."""
SHARED = "the server was started with --continuous-batching, and its answers share the sampling of the model."
ALONE_ONLY = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length", "min_new_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "exponential_decay_length_penalty"),
    *("guidance_scale", "watermarking_config", "stop_strings", "max_time", "num_beams", "num_return_sequences"),
)
"""Options of a generation configuration that continuous batching drops without a word, or fails at."""


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


def forgive(tokenizer: Any) -> Any:
    """A tokenizer that gives an answer as it was written where it holds half a call of a tool, or one of none."""
    forgiving, parse = copy.copy(tokenizer), tokenizer.parse_response

    def parse_response(ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with suppress(ValueError, RuntimeError, KeyError, TypeError):
            parsed: dict[str, Any] = parse(ids, *args, **kwargs)
            if all({"name", "arguments"} <= call["function"].keys() for call in parsed.get("tool_calls") or ()):
                return parsed
        return {"content": tokenizer.decode(ids, skip_special_tokens=True)}

    forgiving.parse_response = parse_response
    return forgiving


class Turn(StoppingCriteria):
    """One answer of the language model; it stands where transformers' handlers expect the model.

    Called between decoding steps, it lets embeddings in, and stops where the client has hung up.

    Args:
        engine: Whose turn it is.
        field: The field of the request that holds the prompt.

    Attributes:
        stops: Texts that end the answer where one of them is written.
        sampling: What of the shared sampling is this answer's own, in continuous batching.
        num_prompt: Tokens of the prompt.
        num_new: Tokens written so far.
        num_reused: Tokens of the prompt that were not read again; None where nothing was looked up.
        has_begun: True from the time it waits for the language model.
        has_ended: True when continuous batching has written all of it.
        receive: What continuous batching calls with what it has written.
    """

    def __init__(self, engine: Engine, field: str) -> None:
        self.engine = engine
        self.field = field
        self.stops: list[str] = []
        self.sampling: dict[str, Any] = {}
        self.num_prompt = self.num_new = 0
        self.num_reused: int | None = None
        self.has_begun = self.has_ended = False
        self.receive: Callable[[Any], None] | None = None
        self._is_cancelled = threading.Event()
        self._ids: Any = None

    def begin(self, input_ids: torch.Tensor | list[int], config: Any, limit: int) -> None:
        """Check that a prompt fits, and let the answer end where there is no more room.

        Args:
            input_ids: The prompt. Shape: ``(1, T)``, or a list
            config: The generation configuration, which is changed.
            limit: Tokens that there is room for.

        Raises:
            RequestError: 413 or 400, if it does not fit, is empty, or holds a token that was trained to embed.
        """
        ids: list[int] = input_ids if isinstance(input_ids, list) else input_ids[0].tolist()
        if not ids:
            raise RequestError(400, f"{self.field} holds no token.", param=self.field)
        if len(ids) >= limit:
            raise too_long(len(ids), limit - 1, self.field)
        gem = self.engine.gem
        if gem.mode != "frozen" and not gem.base.text.gem_token_ids.isdisjoint(ids):
            raise RequestError(400, f"{self.field} spells the name of a GEM token. Leave it out.", param=self.field)
        if max(ids) >= gem.model.config.get_text_config().vocab_size:
            message = f"{self.field} holds a token that was added to the tokenizer, but not to the model. Leave it out."
            raise RequestError(400, message, param=self.field)
        config.max_new_tokens = min(config.max_new_tokens, limit - len(ids))
        self.num_prompt, self.has_begun = len(ids), True

    def cancel(self) -> None:
        """Stop before the next decoding step."""
        self._is_cancelled.set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """True for rows that are to end. Shape: ``(B, T)`` -> ``(B,)``"""
        self.num_new, self._ids = input_ids.shape[1] - self.num_prompt, input_ids
        self.engine.let_embeddings_in()
        is_over = [self._is_cancelled.is_set() or self._is_stopped(row) for row in input_ids]
        return torch.tensor(is_over, device=input_ids.device)

    def _is_stopped(self, row: torch.Tensor) -> bool:
        """True if one of the stops has been written. Shape: ``(T,)``

        transformers' own criterion makes a table of all tokens by all their places in the stops, which may take
        gigabytes.
        """
        if not self.stops:
            return False
        width = max(len(stop.encode()) for stop in self.stops) + 1  # a token is one byte at least
        text = self.engine.tokenizer.decode(row[self.num_prompt :][-width:], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stops)

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


class WithTurns:
    """What a manager of transformers' does here first: the :class:`Turn` of a request begins.

    Attributes:
        turns: Turns by the id of their request.
        room: Tokens that a prompt and its answer have room for.
    """

    turns: dict[str, Turn]
    room: int

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        """As the base class; see :meth:`Turn.begin` for what is refused."""
        turn = self._begin(inputs, gen_config, kwargs["request_id"])
        return super().generate_streaming(turn, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        """As the base class; see :meth:`Turn.begin` for what is refused."""
        turn = self._begin(inputs, gen_config, kwargs["request_id"])
        return await super().generate_non_streaming(turn, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]

    def _begin(self, inputs: Any, config: Any, request_id: str) -> Turn:
        turn = self.turns[request_id]
        turn.begin(inputs["input_ids"], config, self.room)
        return turn


class OneByOne(WithTurns, GenerateManager):  # type: ignore[misc]  # what they are called with is handed on
    """transformers' manager of the inference thread, with a :class:`Turn` in place of the model."""

    def __init__(self, turns: dict[str, Turn], room: int) -> None:
        super().__init__()
        self.turns = turns
        self.room = room

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future:
        """As the base class; a client that hangs up does not cancel what the inference thread will deliver to."""
        return asyncio.shield(super().async_submit(fn, *args, **kwargs))


class Scheduler(FIFOScheduler):
    """transformers' scheduler, which also lets in who waits where the answer that was waited for is given up."""

    def clear_cancelled_requests(self) -> list[RequestState]:
        """As the base class."""
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


SCHEDULER_MAPPING[SCHEDULER] = Scheduler


class FirstOfEqual(LogitsProcessor):
    """Leaves one token where only equals are left, as at temperature 0 in bfloat16, so that none is drawn."""

    supports_continuous_batching = True

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Shape: ``(B, V)`` -> ``(B, V)``"""
        best, first = scores.max(dim=-1, keepdim=True).values, scores.argmax(dim=-1, keepdim=True)
        are_equal = ((scores == best) | scores.isneginf()).all(dim=-1, keepdim=True)
        is_first = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)
        return scores.masked_fill(are_equal & ~is_first, -torch.inf)


class Loop:
    """transformers' loop of continuous batching, with the turns that its requests belong to.

    Args:
        loop: The loop, which runs.
        turns: Turns by the id of their request.
    """

    def __init__(self, loop: Any, turns: dict[str, Turn]) -> None:
        self._loop = loop
        self._turns = turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_request(self, input_ids: list[int], request_id: str, **options: Any) -> str:
        """Have an answer written, with the sampling of its turn.

        Raises:
            CBWorkerDeadError: If the loop has ended.
        """
        turn = self._turns[request_id]

        def note(output: Any) -> None:  # in the thread that listens, after what it is doing now
            turn.num_new, turn.has_ended = len(output.generated_tokens), output.is_finished()
            if turn.receive is not None:
                turn.receive(output)

        # Before it is asked: a short answer is written before its handler is there.
        self._loop.register_result_handler(request_id, note)
        added = self._loop.add_request(input_ids, request_id=request_id, **options, **turn.sampling)
        # The loop may have ended after it was asked, too late to tell this request of it.
        if added is None or self._loop.background_thread_status.can_accept_new_requests() is not None:
            raise CBWorkerDeadError("The loop of continuous batching has ended.")
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        """Have a function called with what was written; see :meth:`add_request`."""
        self._turns[request_id].receive = callback

    def forget(self, request_id: str) -> None:
        """Stop an answer before the next step."""
        self._loop.cancel_request(request_id)
        router = self._loop.output_router
        router.result_handlers.pop(request_id, None)
        while not router.output_queue.empty():  # what came for those that were forgotten
            router.output_queue.get_nowait()


class InBatches(WithTurns, CBGenerateManager):  # type: ignore[misc]  # what they are called with is handed on
    """transformers' manager of continuous batching, whose loop runs from the start, with one sampling for all.

    Args:
        turns: Turns by the id of their request.
        room: Tokens that the model has places for.
        model: The language model.
        num_bytes: Memory for keys and values of the answers that are being written.

    Raises:
        ValueError: If the model cannot do it, or there is not enough memory.
    """

    def __init__(self, turns: dict[str, Turn], room: int, model: Any, num_bytes: int) -> None:
        super().__init__()
        self.turns = turns
        self.loop: Any = Loop(start_loop(model, num_bytes), turns)
        self.room = count_places(self.loop.batch_processor.cache, room)
        self._cb: Any = self.loop  # where the base class looks for it

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Nothing: the loop runs."""

    def sampling_of(self, body: Sampling) -> dict[str, Any]:
        """What a request asks for that differs from the sampling that all share.

        Raises:
            RequestError: 400, if it cannot be had.
        """
        shared = self.loop.generation_config
        refused = ["stop", "logit_bias", "frequency_penalty", *(["seed"] if shared.do_sample else [])]
        if field := next((name for name in refused if getattr(body, name, None)), None):
            raise RequestError(400, f"{field} cannot be set: {SHARED}", param=field)
        if not shared.do_sample:
            return {}
        given = {"top_k": 1} if body.temperature == 0 else {"temperature": body.temperature, "top_p": body.top_p}
        own: dict[str, Any] = {
            name: value for name, value in given.items() if value not in (None, getattr(shared, name))
        }
        for name in own.keys() - self.loop.logit_processor.supported_keys.keys():
            field = "temperature" if name == "top_k" else name
            raise RequestError(400, f"{field} cannot be set: {SHARED}", param=field)
        return own


def bytes_per_token(config: Any) -> int:
    """Memory for keys and values of one token, per byte of a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width


def count_places(cache: Any, most: int) -> int:
    """Tokens of the longest prompt and answer that there is memory for, up to ``most``."""
    state = RequestState(request_id="", initial_tokens=[])
    return bisect.bisect_left(
        range(1, most + 1), True, key=lambda num: not cache.can_store_request_tokens(state, num, dry_run=True)
    )


def shared_config(model: Any) -> Any:
    """The generation configuration that answers share, with the defaults that ``generate`` takes.

    Raises:
        ValueError: If it asks for what continuous batching would leave out.
    """
    config = copy.deepcopy(model.generation_config)
    defaults = config._get_default_generation_params()
    if refused := [name for name in ALONE_ONLY if getattr(config, name, None) not in (None, defaults.get(name))]:
        raise ValueError(
            f"The model's generation_config sets {', '.join(refused)}, which continuous batching cannot do. Start the "
            "server without --continuous-batching, or take it out of generation_config.json if answers may differ."
        )
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    config.use_cache = False
    return config


def start_loop(model: Any, num_bytes: int) -> Any:
    """transformers' loop of continuous batching, which runs in a thread of its own.

    Args:
        model: The language model.
        num_bytes: Memory for keys and values.

    Raises:
        ValueError: If the model cannot do it, or there is not enough memory.
    """
    attention = model.config._attn_implementation
    if not hasattr(model, "init_continuous_batching") or attention not in ("sdpa", "flash_attention_2"):
        raise ValueError(f"{type(model).__name__} with {attention} attention cannot do continuous batching.")
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if refused := kinds & {"dynamic", "longrope"}:
        raise ValueError(f"With {refused.pop()} positions answers that are written together would change each other.")
    config = shared_config(model)
    page = PAGE_TOKENS * bytes_per_token(model.config.get_text_config()) * model.dtype.itemsize
    if num_bytes < 4 * page:
        raise ValueError(f"Continuous batching needs memory: {4 * page / 2**30:.4f} GiB at least, see --cache-gib.")
    options = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=num_bytes // page,
        max_batch_tokens=STEP_TOKENS,
        per_request_processors=True,
        auto_switch_to_flash=False,
        scheduler_type=SCHEDULER,
    )
    loop = model.init_continuous_batching(generation_config=config, continuous_batching_config=options)
    if config.do_sample:
        loop.logit_processor.logits_processor.append(FirstOfEqual())
    loop.start()
    while loop.batch_processor is None and loop.is_running():
        time.sleep(0.01)
    if loop.batch_processor is None:
        loop.stop()
        raise ValueError(f"Continuous batching cannot start: {loop.background_thread_status.fatal_error}")
    prove(loop)
    return loop


def prove(loop: Any) -> None:
    """Have a token written, which ends the loop if the model is of those that do not know its memory.

    Raises:
        ValueError: If it cannot be.
    """
    loop.add_request([0], max_new_tokens=1)
    written = None
    while written is None and loop.is_running():
        written = loop.get_result(timeout=0.1)
    if written is None or written.error is not None:
        loop.stop(hard_stop=True)
        raise ValueError(f"{type(loop.model).__name__} cannot do continuous batching.")


class OneManager(GenerationState):
    """Has one manager for whatever is asked for."""

    def __init__(self, manager: OneByOne | InBatches) -> None:
        super().__init__(continuous_batching=isinstance(manager, InBatches))
        self._one = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager."""
        return self._one


class Chat:
    """Answers of the language model, and the thread that it is used in.

    Args:
        engine: What it belongs to.
        name: What requests call the model.
        batch_bytes: Memory for answers that are written together; None to write one after another.

    Raises:
        ValueError: If they cannot be written together.
    """

    def __init__(self, engine: Engine, name: str, batch_bytes: int | None) -> None:
        self.engine = engine
        self.name = name
        self.turns: dict[str, Turn] = {}
        self.thread = OneByOne(self.turns, engine.context)
        model = engine.gem.model
        self.batches: InBatches | None = None
        if batch_bytes is not None:  # its thread ends with the process, as the one that it is started in
            made = self.thread.submit(InBatches, self.turns, engine.context, model, batch_bytes)
            self.batches = made.result()
        arguments = OneModel(name, model, forgive(engine.tokenizer)), OneManager(self.batches or self.thread)
        self._chat = ChatCompletionHandler(*arguments)
        self._complete = CompletionHandler(*arguments)

    @property
    def is_alive(self) -> bool:
        """False if no answer can be written any more."""
        return self.batches is None or self.batches.loop.is_running()

    def close(self) -> None:
        """Write no more."""
        if self.batches is not None:
            self.batches.loop.stop(hard_stop=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context in which the inference thread has the model for itself, between two steps."""
        with ExitStack() as stack:
            if self.batches is not None:
                with suppress(RuntimeError):  # the loop has ended, perhaps while it was waited for
                    stack.enter_context(self.batches.loop.pause())
            yield

    @property
    def is_paused(self) -> bool:
        """True if there are answers that wait for the end of :meth:`pause`."""
        return self.batches is not None and bool(self.turns)

    def open_turn(self, request_id: str, field: str) -> Turn:
        """The turn of a request that is about to be handled, and the field that holds its prompt."""
        turn = self.turns[request_id] = Turn(self.engine, field)
        return turn

    def close_turn(self, request_id: str) -> None:
        """Forget a turn, and stop it where it is not over."""
        turn = self.turns.pop(request_id)
        turn.cancel()
        if self.batches is not None and turn.has_begun and not turn.has_ended:
            self.batches.loop.forget(request_id)

    async def chat(self, body: ChatBody, request_id: str) -> JSONResponse | StreamingResponse:
        """An answer to messages, as transformers' handler gives it.

        Raises:
            RequestError: If the model has no chat template, it does not take these messages, or they are too long.
        """
        if self.engine.tokenizer.chat_template is None:
            raise RequestError(400, "The model has no chat template. Use /v1/completions.", param="messages")
        self._check_template_names(body.chat_template_kwargs or {})
        self._check_bias(body.logit_bias or {})
        return await self._handle(self._chat, body, request_id)

    async def complete(self, body: CompletionBody, request_id: str) -> JSONResponse | StreamingResponse:
        """A continuation of text, as transformers' handler gives it.

        Raises:
            RequestError: If the text is too long, or empty.
        """
        return await self._handle(self._complete, body, request_id)

    async def _handle(self, handler: Any, body: ChatBody | CompletionBody, request_id: str) -> Any:
        turn = self.turns[request_id]
        field = turn.field
        turn.stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if self.batches is not None:
            turn.sampling = self.batches.sampling_of(body)
        try:
            response = await handler.handle_request(body.for_handler(self.name), request_id)
        except HTTPException as error:
            raise RequestError(error.status_code, str(error.detail)) from error
        except CBWorkerDeadError as error:
            raise RequestError(503, "Answers cannot be written any more. Restart the server.", code="failed") from error
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
        own = {*inspect.signature(self.engine.tokenizer.apply_chat_template).parameters, "load_audio_from_video"}
        if refused := sorted(own & given.keys()):
            message = f"{', '.join(refused)} cannot be set; what the model's template names can, e.g. enable_thinking."
            raise RequestError(400, message, param="chat_template_kwargs")

    def _check_bias(self, bias: dict[str, float]) -> None:
        is_readable = self.engine.gem.base.text.is_readable
        for token_id in bias:
            if not (token_id.isdecimal() and len(token_id) < 10 and is_readable(int(token_id))):
                raise RequestError(400, f"There is no token {token_id!r:.40}.", param="logit_bias")


def messages_for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers' handler of chats gives them to the template."""
    return BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)


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
