"""A page to ask: passages are found by a model's embeddings, and the same model answers from them.

    gem-st serve runs/demo/frozen        # in one terminal: the model, once
    python examples/rag_server/app.py    # in another: this app; then open http://127.0.0.1:8080

The app talks to the server by OpenAI's client only. Passages and their vectors lie in LanceDB, in a folder that is kept
between starts. A table belongs to one model: it holds the vector of a fixed text, which is embedded again with every
question, so that vectors of another model are never compared.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI
from starlette.middleware.trustedhost import TrustedHostMiddleware

HERE = Path(__file__).resolve().parent
PASSAGES = HERE.parent / "data" / "passages.jsonl"

PROBE = "The train to the city is late, and it rains on the old clock."
"""Its vector tells models apart."""
SAME = 0.99
"""Cosine of two vectors of it above which they are of one model, for all that rounding does."""
BATCH = 32
"""Passages that are embedded at once."""
PIECE = 400
"""Characters of a passage that is cut from a longer text; demo's model reads about 128 tokens at once."""
MAX_QUESTION, MAX_TEXT, MAX_PASSAGES, MAX_BODY = 1_000, 50_000, 20_000, 250_000
"""Characters of a question and of pasted text, passages in the table, and bytes of a request."""
PROMPT = "{passages}\n\nAnswer in one sentence: {question}"
PASTED = "pasted"

Event = dict[str, Any]


@dataclass
class Settings:
    """What the app is told.

    Attributes:
        server: Address of `gem-st serve`.
        passages: File of passages: JSON lines with ``text``, or plain text.
        db: Folder of the table.
        api_key: The server's key.
        shown: Passages that are found for a question.
        read: Of these, how many the model answers from.
        max_tokens: Length of an answer.
        rebuild: Embed all passages again, where the table is of another model.
    """

    server: str = "http://127.0.0.1:8000/v1"
    passages: Path = PASSAGES
    db: Path = Path("runs/rag")
    api_key: str | None = None
    shown: int = 3
    read: int = 1
    max_tokens: int = 160
    rebuild: bool = False


class Problem(Exception):  # noqa: N818  # it is shown to people
    """What is wrong and what to do, in words for the page."""


# ---- texts


def split_text(text: str) -> list[str]:
    """Passages of a text: its paragraphs; of long ones, sentences or words that fit together."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        piece = ""
        for part in _parts(" ".join(paragraph.split())):
            if piece and len(piece) + 1 + len(part) > PIECE:
                pieces.append(piece)
                piece = part
            else:
                piece = f"{piece} {part}".strip()
        pieces.append(piece)
    return [piece for piece in pieces if piece]


def _parts(paragraph: str) -> list[str]:
    """Sentences of a paragraph; of one that is too long, words; of one of those, pieces."""
    parts: list[str] = []
    for sentence in re.split(r"(?<=[.?!])\s+", paragraph):
        words = [sentence] if len(sentence) <= PIECE else sentence.split()
        parts += [word[start : start + PIECE] for word in words for start in range(0, len(word), PIECE)]
    return parts


def read_passages(path: Path) -> list[str]:
    """Passages of a file.

    Raises:
        Problem: If it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else []
        passages = [str(json.loads(line)["text"]) for line in lines if line.strip()] or split_text(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} cannot be read: {error}. Give JSON lines with a field text, or plain text.") from error
    passages = list(dict.fromkeys(passages))
    if not passages:
        raise Problem(f"{path} holds no passages.")
    if len(passages) > MAX_PASSAGES:
        raise Problem(f"{path} holds {len(passages)} passages, and there is room for {MAX_PASSAGES}. Give fewer.")
    return passages


# ---- the table


class Store:
    """Passages and vectors of one model, on the disk.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._db = lancedb.connect(str(folder), read_consistency_interval=timedelta(0))
        self._table: Any = self._db.open_table("passages") if (folder / "passages.lance").exists() else None

    @property
    def made_by(self) -> dict[str, Any] | None:
        """Name of the model and its vector of PROBE; None before there are passages."""
        return None if self._table is None else json.loads(self._table.schema.metadata[b"made_by"])

    def sources(self) -> dict[str, str]:
        """Where each passage is from."""
        if self._table is None:
            return {}
        rows = self._table.search().select(["text", "source"]).limit(MAX_PASSAGES + 1).to_list()
        return {row["text"]: row["source"] for row in rows}

    def create(self, rows: list[dict[str, Any]], model: str, probe: np.ndarray) -> None:
        """Make the table, in place of the one that is there."""
        fields = [pa.field("id", pa.string()), pa.field("text", pa.string()), pa.field("source", pa.string())]
        vector = pa.field("vector", pa.list_(pa.float32(), len(probe)))
        made_by = json.dumps({"model": model, "probe": probe.tolist()})
        schema = pa.schema([*fields, vector], metadata={"made_by": made_by})
        mode = "create" if self._table is None else "overwrite"
        self._table = self._db.create_table("passages", pa.Table.from_pylist(rows, schema), mode=mode)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add passages that are not there yet."""
        if rows:
            self._table.add(pa.Table.from_pylist(rows, self._table.schema))

    def remove(self, texts: set[str]) -> None:
        """Remove passages."""
        if texts:
            self._table.delete(f"id IN ({', '.join(repr(name_of(text)) for text in texts)})")

    def search(self, vector: np.ndarray, num: int) -> list[dict[str, Any]]:
        """The most similar passages, from all of them, with their cosines."""
        found = self._table.search(vector).distance_type("cosine").limit(num).to_list()
        return [{"text": row["text"], "source": row["source"], "similarity": 1 - row["_distance"]} for row in found]


def name_of(text: str) -> str:
    """Id of a passage: the same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def make_rows(texts: dict[str, str], vectors: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table, for texts and where they are from."""
    return [
        {"id": name_of(text), "text": text, "source": source, "vector": vector}
        for (text, source), vector in zip(texts.items(), vectors, strict=True)
    ]


# ---- from a question to an answer


class Rag:
    """The way of a question: embedded, searched, answered; both ends by one server.

    Args:
        settings: What the app was told.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.status: Event = {"model": None, "dimension": None, "passages": None, "problem": None}
        self._client = AsyncOpenAI(base_url=settings.server, api_key=settings.api_key or "none", max_retries=0)
        self._store = Store(settings.db)
        self._turn = asyncio.Lock()
        self._is_synchronized = False

    async def ask(self, question: str) -> AsyncIterator[Event]:
        """Events of an answer: passages, then tokens, then timings."""
        start = time.perf_counter()
        model = await self._model()
        probe, vector = await self._embed(model, [PROBE, question], "query")
        embedded = time.perf_counter()
        async for event in self._prepare(model, probe):
            yield event
        prepared = time.perf_counter()
        found = await asyncio.to_thread(self._store.search, vector, self.settings.shown)
        searched = time.perf_counter()
        passages = [{**passage, "read": index < self.settings.read} for index, passage in enumerate(found)]
        yield {"type": "passages", "passages": passages}
        first, reason = None, None
        async for text, ended in self._answer(model, question, [p["text"] for p in passages if p["read"]]):
            reason = ended or reason
            if text:
                first = first or time.perf_counter()
                yield {"type": "token", "text": text}
        end = time.perf_counter()
        marks = {"embedding": embedded - start, "search": searched - prepared}
        marks |= {"first token": (first or end) - searched, "total": end - start}
        yield {"type": "done", "finish_reason": reason, "timings": marks}

    async def add(self, text: str) -> AsyncIterator[Event]:
        """Events of adding a text to the passages."""
        model = await self._model()
        (probe,) = await self._embed(model, [PROBE], "query")
        async for event in self._prepare(model, probe):
            yield event
        async with self._turn:
            known = await asyncio.to_thread(self._store.sources)
            new = {piece: PASTED for piece in split_text(text) if piece not in known}
            if len(known) + len(new) > MAX_PASSAGES:
                raise Problem(f"There is room for {MAX_PASSAGES} passages, and {len(known)} are there.")
            async for event in self._embed_all(model, new, self._store.add):
                yield event
            self.status["passages"] = len(known) + len(new)
        yield {"type": "added", "added": len(new), **self.status}

    async def warm(self) -> None:
        """Embed the passages before the first question, as soon as the server is there."""
        while self.status["model"] is None:
            try:
                model = await self._model()
                (probe,) = await self._embed(model, [PROBE], "query")
                async for event in self._prepare(model, probe):
                    print(f"{event['done']} of {event['total']} passages are embedded.", flush=True)
            except (Problem, APIError) as error:
                problem = explain(error, self.settings)
                if problem != self.status["problem"]:
                    print(problem, file=sys.stderr, flush=True)
                self.status["problem"] = problem
                if isinstance(error, Problem):
                    return
                await asyncio.sleep(1)

    async def _prepare(self, model: str, probe: np.ndarray) -> AsyncIterator[Event]:
        """Have a table of this model with the file's passages; those that were pasted stay."""
        async with self._turn:
            is_new = await asyncio.to_thread(self._must_be_made, model, probe)
            if is_new or not self._is_synchronized:
                known = await asyncio.to_thread(self._store.sources)
                file = str(self.settings.passages)
                wanted = dict.fromkeys(read_passages(self.settings.passages), file)
                wanted |= {text: source for text, source in known.items() if source == PASTED and text not in wanted}
                missing = wanted if is_new else {text: wanted[text] for text in wanted if text not in known}
                keep: Callable[..., None] = self._store.add
                if is_new:
                    keep = lambda rows: self._store.create(rows, model, probe)  # noqa: E731
                async for event in self._embed_all(model, missing, keep):
                    yield event
                await asyncio.to_thread(self._store.remove, known.keys() - wanted.keys())
                self._is_synchronized = True
                self.status["passages"] = len(wanted)
            self.status |= {"model": model, "dimension": len(probe), "problem": None}

    def _must_be_made(self, model: str, probe: np.ndarray) -> bool:
        """Whether there is no table of this model.

        Raises:
            Problem: If there is one of another model, which may not be made again.
        """
        made_by = self._store.made_by
        if made_by is None or is_same(np.array(made_by["probe"]), probe):
            return made_by is None
        if self.settings.rebuild:
            return True
        old = f"{made_by['model']} ({len(made_by['probe'])} dimensions)"
        raise Problem(
            f"The passages in {self.settings.db} were embedded by another model, {old}; the server has {model} "
            f"({len(probe)}). Start this app with --rebuild to embed them again, or with another --db."
        )

    async def _model(self) -> str:
        """Name of the model that is served."""
        return (await self._client.models.list()).data[0].id

    async def _embed(self, model: str, texts: list[str], kind: str) -> np.ndarray:
        """Vectors of texts. Shape: (B, D)."""
        reply = await self._client.embeddings.create(model=model, input=texts, extra_body={"input_type": kind})
        return np.array([row.embedding for row in reply.data], dtype=np.float32)

    async def _embed_all(
        self, model: str, texts: dict[str, str], keep: Callable[[list[dict[str, Any]]], None]
    ) -> AsyncIterator[Event]:
        """Embed passages, and keep them once all are.

        Raises:
            Problem: If one is longer than the model reads.
        """
        vectors: list[np.ndarray] = []
        todo = list(texts)
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            try:
                vectors.extend(await self._embed(model, batch, "document"))
            except APIStatusError as error:
                if error.status_code != 413:
                    raise
                place = re.search(r"input\.(\d+) has", str(error))
                passage = batch[int(place[1]) if place else 0]
                raise Problem(f"{explain(error, self.settings)} It is the passage: {passage[:80]}...") from error
            yield {"type": "indexing", "done": len(vectors), "total": len(todo)}
        await asyncio.to_thread(keep, make_rows(texts, np.array(vectors)))

    async def _answer(self, model: str, question: str, passages: list[str]) -> AsyncIterator[tuple[str, str | None]]:
        """Pieces of an answer, and why it ended. Whoever goes away while it is written ends it on the server, too."""
        prompt = PROMPT.format(passages="\n\n".join(passages), question=question)
        stream = await self._client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=self.settings.max_tokens,
            stream=True,
        )
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    yield choice.delta.content or "", choice.finish_reason


def is_same(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether two vectors of one text are of one model."""
    if old.shape != new.shape:
        return False
    return bool(old @ new >= SAME * np.linalg.norm(old) * np.linalg.norm(new))


def explain(error: Exception, settings: Settings) -> str:
    """An error in plain words."""
    if isinstance(error, Problem):
        return str(error)
    status = error.status_code if isinstance(error, APIStatusError) else None
    body = error.body if isinstance(error, APIError) else None
    message = str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
    words = {
        401: "The server wants another key. Start this app with GEM_ST_API_KEY set to the key of the server.",
        413: f"That is too long for the model: {message.partition(' has ')[2] or message}",
        429: "The server has as many requests waiting as it takes. Ask again in a moment.",
        503: "The model is still being loaded. Ask again in a moment.",
    }
    if status in words:
        return words[status]
    if status is not None:
        return f"The server refused ({status}): {message}"
    if isinstance(error, APIConnectionError):
        return f"No server answers at {settings.server}. Start it: gem-st serve runs/demo/frozen"
    return "The server stopped answering. Ask again; if it goes on, its log says why."


# ---- routes


async def read_text(request: Request, field: str, limit: int) -> str:
    """A text that was sent as JSON, within limits. Pages of other sites cannot send JSON without being asked first.

    Raises:
        Problem: If it is none, is empty, or is too long.
    """
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Problem("Send JSON.")
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise Problem(f"That is more than {MAX_BODY} bytes.")
    try:
        text = str(json.loads(raw)[field]).strip()
        text.encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Problem(f'Send {{"{field}": "..."}}.') from error
    if not text:
        raise Problem("There is nothing written in it.")
    if len(text) > limit:
        raise Problem(f"That is {len(text)} characters long, and there is room for {limit}.")
    return text


def send_events(events: AsyncIterator[Event], settings: Settings) -> Response:
    """Events as lines of JSON; the last one may be an error."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield json.dumps(event) + "\n"
        except Exception as error:
            if not isinstance(error, (Problem, APIError)):
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            yield json.dumps({"type": "error", "message": explain(error, settings)}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"cache-control": "no-store"})


def page() -> Response:
    """The page, whose own script is the only one that may run in it."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-{nonce}'; "
    policy += f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    html = (HERE / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(html.replace("{{nonce}}", nonce), headers=headers)


def create_app(settings: Settings, hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")) -> FastAPI:
    """The app; ``hosts`` are the names that browsers may call it by."""
    rag = Rag(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(rag.warm())
        yield
        warming.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(Problem, lambda _, problem: JSONResponse({"error": str(problem)}, 400))

    @app.get("/")
    async def show() -> Response:
        return page()

    @app.get("/api/status")
    async def status() -> Response:
        return JSONResponse(rag.status)

    @app.post("/api/ask")
    async def ask(request: Request) -> Response:
        return send_events(rag.ask(await read_text(request, "question", MAX_QUESTION)), settings)

    @app.post("/api/passages")
    async def add(request: Request) -> Response:
        return send_events(rag.add(await read_text(request, "text", MAX_TEXT)), settings)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=Settings.server, help="address of gem-st serve (%(default)s)")
    parser.add_argument("--passages", type=Path, default=PASSAGES, help="JSON lines with a field text, or plain text")
    parser.add_argument("--db", type=Path, default=Settings.db, help="folder of the table (%(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="embed again what another model had embedded")
    parser.add_argument("--shown", type=int, default=Settings.shown, help="passages that are found (%(default)s)")
    parser.add_argument("--read", type=int, default=Settings.read, help="of these, answered from (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=Settings.max_tokens, help="of an answer (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at (%(default)s)")
    args = vars(parser.parse_args())
    host, port = args.pop("host"), args.pop("port")
    settings = Settings(**args, api_key=os.environ.get("GEM_ST_API_KEY"))
    if min(settings.shown, settings.read, settings.max_tokens) < 1:
        raise SystemExit("--shown, --read and --max-tokens must be 1 or more.")
    hosts = ("127.0.0.1", "localhost", "[::1]", host) if host not in ("0.0.0.0", "::") else ("*",)
    print(f"Open http://{host}:{port}", flush=True)
    uvicorn.run(create_app(settings, hosts), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
