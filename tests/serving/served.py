"""Servers of small models at a free port, and a client that sends what no library would."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from openai import OpenAI
from sentence_transformers import SentenceTransformer

from gem_st.serving.app import ServerOptions, create_app
from gem_st.serving.engine import Engine

MESSAGES = [
    {"role": "system", "content": "You know the village by the sea and everyone in it."},
    {"role": "user", "content": "Who took his boat out before the sun came up?"},
]


AS_JSON = {"Content-Type": "application/json"}


class Reply(NamedTuple):
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]


def send(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
    """Send bytes as they are, anything else as JSON; both are said to be, unless headers say otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    fields = headers or {}
    if "content-type" not in map(str.lower, fields):
        fields = {**AS_JSON, **fields}
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, fields)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    told = {name.lower(): value for name, value in response.getheaders()}
    is_json = told.get("content-type", "").startswith("application/json")
    return Reply(response.status, told, json.loads(text) if is_json else text.decode())


class Served:
    """A running server."""

    def __init__(self, port: int, app: Any, model: SentenceTransformer) -> None:
        self.port = port
        self.server = app.state.server
        self.model = model
        self.openai = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        return send(self.port, method, path, body, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.send("POST", f"/v1/{path}", body, headers)

    def wait_for_empty_queue(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.server.num_places_taken:
            assert time.monotonic() < end, "a place was not given back"
            time.sleep(0.01)


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """Port at which an app is served, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def running(load: Callable[[], Engine], model: Any = None, options: ServerOptions | None = None) -> Iterator[Served]:
    """A server in a thread; it may still be loading."""
    app = create_app(load, options)
    with listening(app) as port:
        yield Served(port, app, model)


@contextmanager
def serving(model: SentenceTransformer, options: ServerOptions | None = None, **kwargs: Any) -> Iterator[Served]:
    """A server that is ready."""
    with running(lambda: Engine(model, "tiny", **kwargs), model, options) as served:
        while not served.server.is_ready:
            time.sleep(0.01)
        yield served
