"""The run of `gem-st serve`: the model is loaded beside the server, which answers 503 until it is there."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from sentence_transformers import SentenceTransformer

from .. import hub
from .app import ServerOptions, create_app
from .engine import Engine

logger = logging.getLogger("gem_st.serving")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_NAMES = (*LOOPBACK, "host.docker.internal")
M_ARENA_MAX = -8
"""glibc's name for how many places memory is kept in."""
TRIM_SECONDS = 5


@dataclass
class ServeConfig:
    """Settings of a server.

    Attributes:
        checkpoint: Folder or Hub id.
        host: Address to listen at.
        port: Port to listen at.
        api_key: What clients have to send; None for nothing.
        name: What requests call the model; by default the Hub id, or the folder's name.
        cache_gib: Memory for conversations that have been read.
        max_queue: Requests that are answered or wait at once.
        batch_tokens: Tokens of a batch of embeddings.
        embed_slice_ms: Time for embeddings between two decoding steps.
        allow_truncate: Give vectors of fewer dimensions to who asks for them.
        allow_token_ids: Embed token ids, too.
        continuous_batching: Write answers together.
        drain_seconds: Time that requests have to be finished when the server is told to stop.
        dtype: Data type to load in.
        device: Where to run; None for what Sentence Transformers finds.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        trust_remote_code: Run the code that the checkpoint carries.
    """

    checkpoint: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str | None = None
    cache_gib: float = 1.0
    max_queue: int = 256
    batch_tokens: int = 4096
    embed_slice_ms: float = 50.0
    allow_truncate: bool = False
    allow_token_ids: bool = False
    continuous_batching: bool = False
    drain_seconds: int = 60
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        for name, least in (("cache_gib", 0), ("max_queue", 1), ("batch_tokens", 1), ("embed_slice_ms", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.api_key == "":
            raise ValueError("The API key is empty. Leave it out for a server that needs none.")

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        folder = Path(self.checkpoint)
        return self.name or (folder.resolve().name if folder.is_dir() else self.checkpoint)

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names that it answers to: a page of another site could give this machine its own, and needs no key."""
        return OWN_NAMES if self.api_key is None and self.host in LOOPBACK else None


def make_engine(model: SentenceTransformer, config: ServeConfig) -> Engine:
    """The engine of a loaded model."""
    return Engine(
        model,
        config.model_name,
        cache_bytes=int(config.cache_gib * 2**30),
        batch_tokens=config.batch_tokens,
        slice_seconds=config.embed_slice_ms / 1000,
        allow_truncate=config.allow_truncate,
        allow_token_ids=config.allow_token_ids,
        continuous_batching=config.continuous_batching,
    )


def load_engine(config: ServeConfig) -> Engine:
    """The engine of a checkpoint, whose code is not run without trust.

    Raises:
        ValueError: If there is no GEM checkpoint, or its code is not trusted.
        OSError: If it cannot be reached.
    """
    model = hub.load(
        config.checkpoint,
        revision=config.revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        device=config.device,
        model_kwargs={"dtype": config.dtype},
    )
    return make_engine(model, config)


def give_memory_back() -> None:
    """Have threads share memory, and what is freed go back to the system now and then, where that is glibc's to say.

    By default each thread that loads, chats or embeds keeps what it once needed most, and gives it to no other; what is
    freed between conversations that are kept stays with the process. A threshold above which all goes back at once
    would do as much, but slows answers in continuous batches by a fifth: their tensors are large ones.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_ARENA_MAX, 1)

    def trim() -> None:
        while True:
            time.sleep(TRIM_SECONDS)
            libc.malloc_trim(0)

    threading.Thread(target=trim, daemon=True).start()


def serve(config: ServeConfig) -> None:
    """Serve until a signal says to stop; requests that have been taken are answered then.

    Raises:
        ValueError: If there is no GEM checkpoint, or its code is not trusted.
        OSError: If it cannot be reached.
    """
    give_memory_back()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("gem_st.serving", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
    failures: list[BaseException] = []

    def load() -> Engine:
        engine = load_engine(config)
        logger.info("%s is ready.", engine.name)
        return engine

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    options = ServerOptions(config.api_key, config.max_queue, hosts=config.hosts)
    app = create_app(load, options, on_failure=stop)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.drain_seconds,
    )
    server = uvicorn.Server(settings)
    server.run()
    if failures:
        raise failures[0]
