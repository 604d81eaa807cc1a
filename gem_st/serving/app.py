"""The server: routes, places in the queue, keys, limits, and what is told of requests. It knows no model."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .bodies import ChatBody, Checked, CompletionBody, EmbeddingBody, check_body
from .chat import REUSED_HEADER, Chat, Turn
from .embeddings import render
from .engine import Engine
from .errors import RETRY_AFTER, RequestError
from .metrics import Metrics

logger = logging.getLogger("gem_st.serving")
logging.getLogger("uvicorn.access").setLevel(logging.ERROR)  # its lines hold paths and queries as they were sent

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics")
OPEN_ROUTES = ("/health",)
"""Routes that need no key."""
BODY_SECONDS = 60
"""Time that a client has to send its request."""
Result = TypeVar("Result")


@dataclass
class ServerOptions:
    """What the server takes.

    Attributes:
        api_key: What clients have to send as ``Authorization: Bearer ...``; None for nothing.
        max_queue: Requests that are answered or wait at once.
        max_body_bytes: Size of a request.
        hosts: Names that clients may call it by; None for any.
    """

    api_key: str | None = None
    max_queue: int = 256
    max_body_bytes: int = 8_000_000
    hosts: tuple[str, ...] | None = None


class ClientGone(Exception):  # noqa: N818  # nobody reads it
    """The client has hung up."""


class Server:
    """What the routes share.

    Args:
        options: What is taken.
        load: Gives the engine; called in a thread when the server starts.
        on_failure: Called if that fails, with what was raised.
    """

    def __init__(
        self,
        options: ServerOptions,
        load: Callable[[], Engine],
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.options = options
        self.metrics = Metrics()
        self.num_places_taken = 0
        self._load = load
        self._on_failure = on_failure
        self._engine: Engine | None = None

    @property
    def is_ready(self) -> bool:
        """True once the model is loaded."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            RequestError: 503, while it is being loaded.
        """
        if self._engine is None:
            raise RequestError(503, "The model is being loaded. Ask again.", code="loading", headers=RETRY_AFTER)
        return self._engine

    async def start(self) -> None:
        """Load the engine."""
        try:
            self._engine = await asyncio.to_thread(self._load)
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def take_place(self) -> None:
        """Take a place, which :meth:`leave_place` gives back.

        Raises:
            RequestError: 429, if all are taken.
        """
        if self.num_places_taken >= self.options.max_queue:
            message = f"{self.num_places_taken} requests are waiting, which is all that may. Ask again."
            raise RequestError(429, message, code="queue_full", headers=RETRY_AFTER)
        self.num_places_taken += 1
        self.metrics.queue.set(self.num_places_taken)

    def leave_place(self) -> None:
        """Give a place back."""
        self.num_places_taken -= 1
        self.metrics.queue.set(self.num_places_taken)

    async def read(self, request: Request, kind: type[Checked]) -> Checked:
        """The fields of a request, of which there are not too many bytes.

        Raises:
            RequestError: 400, 408, 413 or 415.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # What a page of another site may send unasked is of other types.
            raise RequestError(415, "Send JSON, with the header Content-Type: application/json.")
        try:
            raw = await asyncio.wait_for(read_body(request, self.options.max_body_bytes), BODY_SECONDS)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise RequestError(408, f"The request took longer than {BODY_SECONDS} seconds to arrive.") from error
        request.state.num_bytes = len(raw)
        return check_body(raw, kind)

    # ---- routes

    async def answer(
        self, request: Request, kind: type[Any], field: str, handle: Callable[[Chat], Callable[..., Awaitable[Any]]]
    ) -> Response:
        """An answer that is written token by token, by a handler of the engine."""
        engine = self.engine
        body = await self.read(request, kind)
        engine.check_name(body.model)
        self.take_place()
        request_id = request.state.request_id
        turn = engine.chat.open_turn(request_id, field)

        def close() -> None:
            engine.chat.close_turn(request_id)
            self.leave_place()
            self._count(turn)

        try:
            response = await unless_gone(request, handle(engine.chat)(body, request_id))
        except BaseException:
            close()
            raise
        if isinstance(response, StreamingResponse):
            return ClosingStream(response.body_iterator, close)
        close()
        return response

    async def embed(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        engine = self.engine
        body = await self.read(request, EmbeddingBody)
        self.take_place()
        try:
            job = await unless_gone(request, engine.embed(body))
            num_tokens = sum(job.lengths)
            vectors = np.stack(job.vectors)
            response = await asyncio.to_thread(lambda: JSONResponse(render(body, engine.name, vectors, num_tokens)))
        finally:
            self.leave_place()
        if job.num_reused is not None:
            response.headers[REUSED_HEADER] = str(job.num_reused)
        self.metrics.count_tokens(embedded=num_tokens, reused=job.num_reused or 0)
        self.metrics.count_lookup(job.num_reused)
        return response

    def _count(self, turn: Turn) -> None:
        self.metrics.count_tokens(prompt=turn.num_prompt, written=turn.num_new, reused=turn.num_reused or 0)
        self.metrics.count_lookup(turn.num_reused)


class ClosingStream(StreamingResponse):
    """A stream of events that tells when it is over, also if the client hangs up.

    Args:
        parts: The events.
        close: Called once.
    """

    def __init__(self, parts: Any, close: Callable[[], None]) -> None:
        super().__init__(parts, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request.

    Raises:
        RequestError: 413, if it is larger; where the client says so, before any of it is read.
    """
    message = f"The request is larger than {max_bytes} bytes."
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise RequestError(413, message, code="request_too_large")
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise RequestError(413, message, code="request_too_large")
        parts.append(part)
    return b"".join(parts)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for a result as long as the client does.

    Raises:
        ClientGone: If it hangs up; the work is cancelled then.
    """

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()


def place_of(error: BaseException) -> str:
    """File and line that an error comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def name_of(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return URL(f"http://{host}").hostname
    except ValueError:
        return None


class Gate:
    """What every request goes through: its id, host and key; and one line in the log and two metrics when it is over.

    Args:
        app: What is behind it.
        server: Whose options and metrics they are.
    """

    def __init__(self, app: Any, server: Server) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 499  # as nginx has it, where the client is gone
        request = Request(scope, receive)
        request.state.request_id, request.state.num_bytes = str(uuid.uuid4()), 0

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request.state.request_id.encode()))
            await send(message)

        try:
            refusal = self._refuse(request)
            await (refusal.response() if refusal else self.app)(scope, receive, tell)
        except (ClientGone, ClientDisconnect):
            pass
        except Exception as error:  # whose message may hold what was sent
            logger.error("%s failed: %s in %s", request.state.request_id, type(error).__name__, place_of(error))
            if status == 499:
                await RequestError(500, "The server failed at this request.").response()(scope, receive, tell)
        finally:
            self._note(request, status, time.monotonic() - begin)

    def _refuse(self, request: Request) -> RequestError | None:
        key, hosts = self.server.options.api_key, self.server.options.hosts
        if hosts is not None and name_of(request.headers.get("host", hosts[0])) not in hosts:
            message = f"This server is called {' or '.join(hosts)}. For other names start it with a key, --api-key."
            return RequestError(403, message, code="wrong_host")
        if key is None or request.scope["path"] in OPEN_ROUTES:  # that of request.url may come from the Host header
            return None
        given = request.headers.get("authorization", "")
        if hmac.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
            return None
        message, headers = "The key is missing or wrong.", {"WWW-Authenticate": "Bearer"}
        return RequestError(401, message, code="invalid_api_key", headers=headers)

    def _note(self, request: Request, status: int, seconds: float) -> None:
        route = request.scope["path"] if request.scope["path"] in ROUTES else "other"
        self.server.metrics.requests.labels(route, status).inc()
        self.server.metrics.seconds.labels(route).observe(seconds)
        num_bytes = request.state.num_bytes
        logger.info("%s %s %d, %d bytes, %.3f s", request.state.request_id, route, status, num_bytes, seconds)


def create_app(
    load: Callable[[], Engine],
    options: ServerOptions | None = None,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application, which loads its engine when it starts and answers 503 until then.

    Args:
        load: Gives the engine.
        options: What is taken.
        on_failure: Called with what ``load`` raised.
    """
    server = Server(options or ServerOptions(), load, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(server.start())
        yield
        await loading
        if server.is_ready:
            await asyncio.to_thread(server.engine.chat.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_middleware(Gate, server=server)
    _add_routes(app, server)
    _add_errors(app)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, ChatBody, "messages", lambda chat: chat.chat)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await server.answer(request, CompletionBody, "prompt", lambda chat: chat.complete)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        return await server.embed(request)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": server.engine.name, "object": "model", "created": 0, "owned_by": "gem_st"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        server.engine.check_name(name)
        return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "gem_st"})

    @app.get("/health")
    async def health() -> Response:
        if not server.is_ready:
            return JSONResponse({"status": "loading"}, 503, RETRY_AFTER)
        is_alive = server.engine.chat.is_alive
        return JSONResponse({"status": "ok" if is_alive else "failed"}, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.content_type)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def miss(_: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, f"{error.detail}.", headers=dict(error.headers or {})).response()
