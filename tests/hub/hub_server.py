"""A Hugging Face Hub in memory, on a free port of 127.0.0.1, for tests of uploads and downloads.

The unmodified ``huggingface_hub`` works against it through ``HF_ENDPOINT``, with ``HF_HUB_DISABLE_XET=1``. It speaks
whoami, creation, deletion and visibility of model repositories, card validation, preupload, the LFS batch with basic
transfer and verification, commits (to branches and pull requests), branches, tags, refs, merges, model info, tree,
paths-info, history, and file resolution. As on the Hub, a file in LFS is redirected to another origin with a signed
address, other files are served directly, and a private repository is, without access, one that does not exist. Errors
have the status and the ``X-Error-Code`` by which the client picks its exceptions. Data sets, ``datasets/acme/corpus``,
can be read only. There are no spaces, gated or renamed repositories, multipart uploads, plain discussions,
``.gitignore`` or pages of lists.

    with HubServer({"hf_writer": ("alice", "write")}, orgs={"acme": ["alice"]}) as server:
        subprocess.run([...], env=server.env(tmp_path, token="hf_writer"))
        assert "README.md" in server.files("acme/model")
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LFS_SIZE = 10_000_000
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())
REPO_NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)\w([\w.-]{0,94}\w)?", re.ASCII)
DATA_SETS = "datasets/"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
FRONT_MATTER = re.compile(r"^\s*---\r?\n([\S\s]*?)\r?\n---[ \t]*(\r?\n|$)")


class HubError(Exception):
    """An answer that is an error, with the code by which the client tells what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        one_line = message.replace("\n", " ").encode("latin-1", "replace").decode("latin-1")
        self.headers = {"X-Error-Message": one_line, **({"X-Error-Code": code} if code else {})}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class User:
    """Owner of a token: what it is called, the token's role, and the namespaces it belongs to."""

    name: str
    role: str
    namespaces: frozenset[str]


@dataclass(frozen=True)
class Blob:
    """Content of a file, in git itself or behind an LFS pointer."""

    data: bytes = field(repr=False)
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """The object's name in git: that of the pointer if the content is in LFS."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with the whole tree it leads to."""

    title: str
    message: str
    author: str
    parent: str | None
    files: Mapping[str, Blob] = field(repr=False)
    date: str = field(default_factory=lambda: _now())
    salt: str = field(default_factory=lambda: secrets.token_hex(8), repr=False)

    @cached_property
    def oid(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(repr((self.title, self.parent, self.date, self.salt, tree)).encode()).hexdigest()


@dataclass
class Pull:
    """A pull request and the commit that it started from."""

    num: int
    title: str
    author: str
    base: str
    merged_as: str | None = None
    date: str = field(default_factory=lambda: _now())


@dataclass
class Repo:
    """A repository: refs, the commits by id, objects in LFS, and pull requests."""

    id: str
    private: bool
    created: str = field(default_factory=lambda: _now())
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def ref(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref, or (shortened) commit id stands for."""
        oid = self.refs.get(self.ref(revision) or "")
        if oid is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            oid = next((oid for oid in self.history if oid.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def log(self, commit: Commit) -> Iterator[Commit]:
        yield commit
        while commit.parent:
            commit = self.history[commit.parent]
            yield commit

    def commit(self, ref: str, files: Mapping[str, Blob], title: str, author: str, message: str = "") -> Commit:
        commit = Commit(title, message, author, self.refs.get(ref), dict(files))
        self.history[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def open_pull(self, title: str, author: str, base: Commit) -> Pull:
        num = len(self.pulls) + 1
        self.pulls[num] = Pull(num, title, author, base.oid)
        self.refs[f"refs/pr/{num}"] = base.oid
        return self.pulls[num]

    def changes(self, pull: Pull) -> tuple[dict[str, Blob | None], list[str]]:
        """What a pull request changes, by path, and the paths that have changed on main, too."""
        base, head = self.history[pull.base].files, self.find(f"refs/pr/{pull.num}").files
        main = self.find("main").files
        changed = {path: head.get(path) for path in {*base, *head} if base.get(path) != head.get(path)}
        return changed, [path for path, new in changed.items() if main.get(path) not in (base.get(path), new)]

    def merge(self, pull: Pull, author: str) -> None:
        changed, conflicts = self.changes(pull)
        if pull.merged_as or conflicts:
            raise HubError(409, f"Cannot merge: {conflicts or 'already merged'}")
        merged = {**self.find("main").files, **changed}
        files = {path: blob for path, blob in merged.items() if blob is not None}
        pull.merged_as = self.commit("refs/heads/main", files, f"{pull.title} (#{pull.num})", author).oid

    def apply(self, files: Mapping[str, Blob], revision: str, operations: Iterable[Mapping[str, Any]]) -> dict:
        """The tree after the operations of a commit."""
        tree = dict(files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if not path or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
                raise HubError(400, f"Invalid path: {path!r}")
            if operation["key"] == "file":
                tree[path] = _regular_file(path, value)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(404, f"An LFS pointer ({path}) pointed to a file that does not exist.")
                tree[path] = self.lfs[value["oid"]]
            elif operation["key"] in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/" if operation["key"] == "deletedFolder" else None
                gone = [name for name in tree if (name.startswith(folder) if folder else name == path)]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                tree = {name: blob for name, blob in tree.items() if name not in gone}
            else:
                raise HubError(400, f"Unknown operation: {operation['key']}")
        return tree


@dataclass
class Fault:
    """A failure that waits for its request; ``fired`` counts how often it has happened."""

    pattern: str
    method: str | None
    status: int | None
    after_bytes: int | None
    side: str | None
    times: int
    fired: int = 0

    def matches(self, method: str, path: str) -> bool:
        return self.times > self.fired and self.method in (None, method) and bool(re.search(self.pattern, path))


class _Protocol(H11Protocol):
    """HTTP/1.1 that shows the application its TCP connection, so that it can be dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_transport(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "transport": transport}, receive, send)

        self.app = with_transport


class HubServer:
    """The server: a context manager that runs it in a thread.

    Args:
        tokens: For each token, the name of its user and its role, ``"write"`` or ``"read"``.
        orgs: For each organization, the names of its members, who may all write to it.
    """

    def __init__(
        self, tokens: Mapping[str, tuple[str, str]], orgs: Mapping[str, Collection[str]] | None = None
    ) -> None:
        self.orgs = dict(orgs or {})
        self.users = {token: self._make_user(name, role) for token, (name, role) in tokens.items()}
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self._faults: list[Fault] = []
        self._signed: dict[str, tuple[Repo, str, Blob | int]] = {}  # what signed addresses give access to
        handlers = {HubError: _error_response}
        self._app = Starlette(routes=self._routes(), exception_handlers=handlers)  # type: ignore[arg-type]
        self._app.router.redirect_slashes = False

    def __enter__(self) -> HubServer:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        hosts = ("127.0.0.1", "localhost")  # two hosts, as clients tell redirects inside one from those to another
        self.url, self.cdn_url = (f"http://{h}:{sock.getsockname()[1]}" for h, sock in zip(hosts, sockets, strict=True))
        config = uvicorn.Config(
            self._serve,
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": sockets}, daemon=True)
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()

    # For tests

    def env(self, home: str | Path, token: str | None = None, **extra: str) -> dict[str, str]:
        """Environment of a process whose Hub this is and whose cache is under ``home``."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return {**env, **({"HF_TOKEN": token} if token else {}), **extra}

    def seed(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Commit:
        """Commits files to main, without a request, to a repository that is made if there is none."""
        repo = self.repos.get(repo_id) or self._create(repo_id, private, repo_id.split("/")[-2])
        tree = dict(repo.find("main").files)
        for path, data in files.items():
            blob = Blob(data, lfs=_is_lfs(path, len(data), data[:512], tree))
            tree[path] = blob
            if blob.lfs:
                repo.lfs[blob.sha256] = blob
        return repo.commit("refs/heads/main", tree, "Upload", repo.namespace)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of the files of a revision, by path."""
        return {path: blob.data for path, blob in self.repos[repo_id].find(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits that lead to a revision, the newest first."""
        repo = self.repos[repo_id]
        return list(repo.log(repo.find(revision)))

    def clear_faults(self) -> None:
        """Nothing fails any more."""
        self._faults.clear()

    def fail_next(
        self,
        path_regex: str,
        method: str | None = None,
        after_bytes: int | None = None,
        status: int | None = None,
        times: int = 1,
        side: str | None = None,
    ) -> Fault:
        """Lets the next requests whose path and query the expression is found in fail.

        With ``status`` they are answered with it. With ``after_bytes``, the connection is dropped once so much of the
        body has been transferred: of the response's body if ``side`` is ``"response"`` (default for GET and HEAD; 0
        drops it before the status line, when the request has been handled), else of the request's. A request with a
        shorter body passes, and the fault waits for the next.
        """
        self._faults.append(Fault(path_regex, method, status, after_bytes, side, times))
        return self._faults[-1]

    # Wire

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, raw_path = scope["method"], scope["raw_path"].decode()
        path = unquote(raw_path) + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        self.requests.append((method, path))
        scope["path"] = raw_path  # the router shall not take an encoded slash for a separator
        fault = next((fault for fault in self._faults if fault.matches(method, path)), None)
        if fault is not None and fault.status is not None:
            fault.fired += 1
            await Request(scope, receive).body()
            await JSONResponse({"error": "Injected failure"}, fault.status)(scope, receive, send)
        elif fault is not None:
            await self._serve_and_drop(fault, scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await self._app(scope, receive, send)

    async def _serve_and_drop(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        side = fault.side or ("response" if scope["method"] in ("GET", "HEAD") else "request")
        limit, passed, dropped = fault.after_bytes or 0, 0, False

        def due(on_side: str) -> bool:
            return on_side == side and not dropped and fault.fired < fault.times

        def drop(close: Callable[[], None]) -> None:
            nonlocal dropped
            dropped = True
            fault.fired += 1
            close()

        async def receive_some() -> Message:
            nonlocal passed
            message = await receive()
            passed += len(message.get("body", b"")) if side == "request" else 0
            if due("request") and passed >= limit:
                drop(scope["transport"].abort)
            return {"type": "http.disconnect"} if dropped else message

        async def send_some(message: Message) -> None:
            nonlocal passed
            body = message.get("body", b"")
            if due("response") and (limit == 0 or passed + len(body) > limit):
                if limit:
                    await send({**message, "body": body[: limit - passed], "more_body": True})
                drop(scope["transport"].close)  # what was sent still arrives
            elif not dropped:
                passed += len(body) if side == "response" else 0
                await send(message)

        await self._answer(scope, receive_some, send_some)
        while dropped and (await receive())["type"] != "http.disconnect":
            pass

    def _routes(self) -> list[Route]:
        repo, lfs = "/api/models/{owner}/{name}", "/{owner}/{name}.git/info/lfs"
        data_set = "/api/datasets/{owner}/{name}"
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create_repo),
            ("DELETE", "/api/repos/delete", self._delete_repo),
            ("PUT", f"{repo}/settings", self._change_settings),
            ("POST", f"{repo}/preupload/{{rev}}", self._preupload),
            ("POST", f"{repo}/commit/{{rev}}", self._commit),
            ("POST", f"{lfs}/objects/batch", self._lfs_batch),
            ("POST", f"{lfs}/verify", self._lfs_verify),
            ("PUT", "/cdn/{owner}/{name}/{oid}", self._cdn_put),
            ("GET", "/cdn/{owner}/{name}/{oid}", self._cdn_get),
            ("GET", repo, self._info),
            ("GET", f"{repo}/revision/{{rev}}", self._info),
            ("GET", f"{repo}/tree/{{rev}}", self._tree),
            ("GET", f"{repo}/tree/{{rev}}/{{path:path}}", self._tree),
            ("POST", f"{repo}/paths-info/{{rev}}", self._paths_info),
            ("GET", f"{repo}/commits/{{rev}}", self._list_commits),
            ("GET", f"{repo}/refs", self._list_refs),
            ("POST", f"{repo}/{{kind}}/{{rev}}", self._create_ref),
            ("DELETE", f"{repo}/{{kind}}/{{rev}}", self._delete_ref),
            ("GET", f"{repo}/discussions/{{num:int}}", self._show_pull),
            ("POST", f"{repo}/discussions/{{num:int}}/merge", self._merge_pull),
            ("GET", "/{owner}/{name}/resolve/{rev}/{path:path}", self._resolve),
            ("GET", data_set, self._info),
            ("GET", f"{data_set}/revision/{{rev}}", self._info),
            ("GET", f"{data_set}/tree/{{rev}}", self._tree),
            ("GET", f"{data_set}/tree/{{rev}}/{{path:path}}", self._tree),
            ("POST", f"{data_set}/paths-info/{{rev}}", self._paths_info),
            ("GET", "/datasets/{owner}/{name}/resolve/{rev}/{path:path}", self._resolve),
            # what there is none of: repositories without a namespace, and of other types
            ("GET", "/api/models/{name}", self._no_repo),
            ("GET", "/api/datasets/{path:path}", self._no_repo),
            ("GET", "/api/spaces/{path:path}", self._no_repo),
            ("GET", "/{kind}/{owner}/{name}/resolve/{path:path}", self._no_repo),
            ("GET", "/{name}/resolve/{path:path}", self._no_repo),
        ]
        return [Route(path, endpoint, methods=[method]) for method, path, endpoint in table]

    # Access

    def _make_user(self, name: str, role: str) -> User:
        return User(name, role, frozenset({name, *(org for org, members in self.orgs.items() if name in members)}))

    def _user(self, request: Request) -> User | None:
        header = request.headers.get("authorization")
        user = self.users.get(header.removeprefix("Bearer ")) if header else None
        if header and user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _writer(self, request: Request, namespace: str, hint: str = "") -> User:
        user = self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.role != "write" or namespace not in user.namespaces:
            message = hint or f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise HubError(403, message if user.role == "write" else "Forbidden: you must use a write token")
        return user

    def _named(self, request: Request, repo_id: str) -> Repo:
        """The repository of that name, as far as the user can know of it."""
        user = self._user(request)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (user and repo.namespace in user.namespaces)):
            raise _no_repo_error(user)
        return repo

    def _repo(self, request: Request) -> Repo:
        kind = DATA_SETS if request.scope["path"].removeprefix("/api").startswith(f"/{DATA_SETS}") else ""
        return self._named(request, f"{kind}{_param(request, 'owner')}/{_param(request, 'name')}")

    def _written_repo(self, request: Request, revision: str = "", pull_request: bool = False) -> tuple[Repo, User]:
        """The repository and the user, who may write to it; to pull requests, all may if it is their own."""
        repo, user = self._repo(request), self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        pull = repo.pulls.get(int(revision.removeprefix("refs/pr/")) if revision.startswith("refs/pr/") else 0)
        own = pull_request or (pull is not None and pull.author == user.name)
        hint = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
        return repo, self._writer(request, user.name if own else repo.namespace, hint)

    async def _no_repo(self, request: Request) -> Response:
        raise _no_repo_error(self._user(request))

    async def _whoami(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "fullname": org} for org in sorted(user.namespaces - {user.name})]
        token = {"displayName": user.role, "role": user.role, "createdAt": _now()}
        auth = {"type": "access_token", "accessToken": token}
        return JSONResponse({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})

    # Repositories

    def _create(self, repo_id: str, private: bool, author: str) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id.removeprefix(DATA_SETS), private)
        repo.commit("refs/heads/main", {".gitattributes": Blob(GITATTRIBUTES.encode())}, "initial commit", author)
        return repo

    async def _create_repo(self, request: Request) -> Response:
        body, user = await request.json(), self._user(request)
        repo_id = f"{body.get('organization') or (user and user.name)}/{body['name']}"
        writer = self._writer(request, repo_id.split("/")[0])
        if not all(map(REPO_NAME.fullmatch, repo_id.split("/"))) or body.get("type", "model") != "model":
            raise HubError(400, f"Invalid repo name: {repo_id}")
        answer = {"name": repo_id, "url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            error = f"You already created this model repo: {repo_id}"
            return JSONResponse({"error": error, **answer}, 409, {"X-Error-Message": error})
        repo = self._create(repo_id, _is_private(body), writer.name)
        return JSONResponse({**answer, "private": repo.private})

    async def _delete_repo(self, request: Request) -> Response:
        body, user = await request.json(), self._user(request)
        repo = self._named(request, f"{body.get('organization') or (user and user.name)}/{body['name']}")
        self._writer(request, repo.namespace)
        del self.repos[repo.id]
        return Response("OK")

    async def _change_settings(self, request: Request) -> Response:
        body = await request.json()
        repo, _ = self._written_repo(request)
        repo.private = _is_private(body)
        return JSONResponse({"private": repo.private})

    # Uploads

    async def _validate_yaml(self, request: Request) -> Response:
        errors, warnings, _ = read_card((await request.json())["content"])
        listed = ([{"message": text} for text in texts] for texts in (errors, warnings))
        return JSONResponse(dict(zip(("errors", "warnings"), listed, strict=True)), 400 if errors else 200)

    async def _preupload(self, request: Request) -> Response:
        body, revision = await request.json(), _param(request, "rev")
        repo, _ = self._written_repo(request, revision, _flag(request, "create_pr"))
        commit = repo.find(revision)
        answer = []
        for file in body["files"]:
            path, known = file["path"], commit.files.get(file["path"])
            lfs = _is_lfs(path, file["size"], base64.b64decode(file["sample"]), commit.files)
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append({"path": path, **mode, **({"oid": known.etag} if known else {})})
        return JSONResponse({"files": answer, "commitOid": commit.oid})

    async def _lfs_batch(self, request: Request) -> Response:
        body = await request.json()
        repo, _ = self._written_repo(request, pull_request=True)  # whoever may open a pull request may upload
        if body["operation"] != "upload" or "basic" not in body.get("transfers", ["basic"]):
            raise HubError(400, "Only uploads with basic transfer")
        objects = []
        for item in body["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.lfs:
                upload = {"href": self._sign(repo, item["oid"], item["size"])}
                verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        answer = {"transfer": "basic", "objects": objects}
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    async def _lfs_verify(self, request: Request) -> Response:
        body = await request.json()
        repo, _ = self._written_repo(request, pull_request=True)
        blob = repo.lfs.get(body["oid"])
        if blob is None or len(blob.data) != body["size"]:
            raise HubError(404, f"There is no object {body['oid']} of {body['size']} bytes")
        return JSONResponse({})

    async def _commit(self, request: Request) -> Response:
        header, *operations = (json.loads(line) for line in (await request.body()).splitlines())
        revision, create_pr = _param(request, "rev"), _flag(request, "create_pr")
        repo, user = self._written_repo(request, revision, create_pr)
        base, ref, parent = repo.find(revision), repo.ref(revision), header["value"].get("parentCommit")
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(400, f"Not a branch: {revision}")
        if create_pr and parent:
            base = repo.find(parent)
        elif parent and parent != base.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files, title = repo.apply(base.files, revision, operations), header["value"]["summary"]
        answer: dict[str, Any] = {"success": True}
        if create_pr:
            pull = repo.open_pull(title, user.name, base)
            ref = f"refs/pr/{pull.num}"
            answer["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{pull.num}"
        commit = repo.commit(ref, files, title, user.name, header["value"].get("description", ""))
        answer |= {"commitOid": commit.oid, "commitUrl": f"{self.url}/{repo.id}/commit/{commit.oid}"}
        return JSONResponse(answer)

    # Downloads

    def _sign(self, repo: Repo, oid: str, content: Blob | int, filename: str = "") -> str:
        signature = secrets.token_urlsafe(16)
        self._signed[signature] = repo, oid, content
        return f"{self.cdn_url}/cdn/{repo.id}/{oid}?filename={quote(filename, safe='')}&signature={signature}"

    async def _cdn_put(self, request: Request) -> Response:
        data = await request.body()
        repo, oid, size = self._signed.get(request.query_params.get("signature", ""), (None, None, None))
        if repo is None or not isinstance(size, int) or oid != _param(request, "oid"):
            raise HubError(403, "SignatureDoesNotMatch")
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "BadDigest: the content is not what was announced")
        repo.lfs[oid] = Blob(data, lfs=True)
        return Response(headers={"ETag": f'"{oid}"'})

    async def _cdn_get(self, request: Request) -> Response:
        _, oid, blob = self._signed.get(request.query_params.get("signature", ""), (None, None, None))
        if not isinstance(blob, Blob) or oid != _param(request, "oid"):
            raise HubError(403, "SignatureDoesNotMatch")
        return _content(request, blob, request.query_params["filename"])

    async def _resolve(self, request: Request) -> Response:
        repo, path = self._repo(request), _param(request, "path")
        commit = repo.find(_param(request, "rev"))
        blob = _entry(commit, path)
        headers = {"X-Repo-Commit": commit.oid}
        if not blob.lfs:
            return _content(request, blob, path, headers)
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data)), "Accept-Ranges": "bytes"}
        return RedirectResponse(self._sign(repo, blob.sha256, blob, path), 302, {**headers, "ETag": f'"{blob.oid}"'})

    # Listings

    async def _info(self, request: Request) -> Response:
        repo = self._repo(request)
        commit = repo.find(_param(request, "rev") or "main")
        info = _model_info(repo, commit, _flag(request, "blobs"))
        if _flag(request, "securityStatus"):
            info["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        expand = [*request.query_params.getlist("expand"), *request.query_params.getlist("expand[]")]
        if expand:
            info = {key: value for key, value in info.items() if key in ("id", *expand)}
        return JSONResponse(info)

    async def _tree(self, request: Request) -> Response:
        repo, folder = self._repo(request), _param(request, "path").strip("/")
        commit = repo.find(_param(request, "rev"))
        prefix = f"{folder}/" if folder else ""
        names = [path for path in _with_folders(commit) if path.startswith(prefix)]
        if folder and not names:
            raise HubError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
        if not _flag(request, "recursive"):
            names = [path for path in names if "/" not in path.removeprefix(prefix)]
        return JSONResponse([_path_info(commit, path) for path in names])

    async def _paths_info(self, request: Request) -> Response:
        form = parse_qs((await request.body()).decode())
        repo = self._repo(request)
        commit = repo.find(_param(request, "rev"))
        known, asked = _with_folders(commit), [path.strip("/") for path in form.get("paths", [])]
        return JSONResponse([_path_info(commit, path) for path in asked if path in known])

    async def _list_commits(self, request: Request) -> Response:
        repo = self._repo(request)
        commits = list(repo.log(repo.find(_param(request, "rev"))))
        answer = [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in commits
        ]
        return JSONResponse(answer, headers={"X-Total-Count": str(len(answer))})

    # Refs

    async def _list_refs(self, request: Request) -> Response:
        repo = self._repo(request)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        if _flag(request, "include_prs"):
            kinds["pullRequests"] = "refs/pr/"
        answer = {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        return JSONResponse(answer)

    async def _create_ref(self, request: Request) -> Response:
        body, start = await request.json(), _param(request, "rev")
        repo, _ = self._written_repo(request)
        ref = f"refs/tags/{body.get('tag')}"
        if _ref_folder(request) == "heads":
            ref, start = f"refs/heads/{start}", body.get("startingPoint", "main")
        oid = repo.find(start).oid
        if ref in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[ref] = oid
        return JSONResponse({})

    async def _delete_ref(self, request: Request) -> Response:
        repo, _ = self._written_repo(request)
        ref = f"refs/{_ref_folder(request)}/{_param(request, 'rev')}"
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the main branch")
        if repo.refs.pop(ref, None) is None:
            raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return JSONResponse({})

    # Pull requests

    async def _show_pull(self, request: Request) -> Response:
        repo = self._repo(request)
        pull = _pull(request, repo)
        merged = {"mergeCommitId": pull.merged_as} if pull.merged_as else {}
        answer = {
            "num": pull.num,
            "title": pull.title,
            "author": {"name": pull.author},
            "status": "merged" if pull.merged_as else "open",
            "createdAt": pull.date,
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": "model"},
            "changes": {"base": "refs/heads/main", **merged},
            "filesWithConflicts": [] if pull.merged_as else repo.changes(pull)[1],
            "events": [],
        }
        return JSONResponse(answer)

    async def _merge_pull(self, request: Request) -> Response:
        repo, user = self._written_repo(request)
        repo.merge(_pull(request, repo), user.name)
        return JSONResponse({})


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _param(request: Request, name: str) -> str:
    return unquote(request.path_params.get(name, ""))


def _flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")


def _is_private(body: Mapping[str, Any]) -> bool:
    return body.get("visibility", "private" if body.get("private") else "public") == "private"


def _ref_folder(request: Request) -> str:
    folder = {"branch": "heads", "tag": "tags"}.get(_param(request, "kind"))
    if folder is None:
        raise HubError(404, f"This server has no {request.url.path}")
    return folder


def _pull(request: Request, repo: Repo) -> Pull:
    if request.path_params["num"] not in repo.pulls:
        raise HubError(404, "Discussion not found")
    return repo.pulls[request.path_params["num"]]


def _no_repo_error(user: User | None) -> HubError:
    if user is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


async def _error_response(request: Request, error: HubError) -> Response:
    return JSONResponse({"error": str(error)}, error.status, error.headers)


def _entry(commit: Commit, path: str) -> Blob:
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    return commit.files[path]


def _regular_file(path: str, value: Mapping[str, str]) -> Blob:
    data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    errors = read_card(data.decode("utf-8", "replace"))[0] if path == "README.md" else []
    if errors:
        raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return Blob(data)


def _is_lfs(path: str, size: int, sample: bytes, files: Mapping[str, Blob]) -> bool:
    """Whether a file belongs in LFS: by ``.gitattributes``, its size, or the start of its content."""
    lfs = size > LFS_SIZE
    for line in files.get(".gitattributes", Blob(b"")).data.decode().splitlines():
        pattern, *attributes = line.split() or [""]
        name = path if "/" in pattern else path.rsplit("/", 1)[-1]
        lfs |= "filter=lfs" in attributes and fnmatchcase(name, pattern)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        return True
    return lfs or b"\0" in sample


def _content(request: Request, blob: Blob, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """Content of a file, or the range of it that was asked for."""
    name, size = quote(path.rsplit("/", 1)[-1]), len(blob.data)
    headers = {
        **(headers or {}),
        "ETag": f'"{blob.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";",
    }
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked or not any(asked.groups()):
        return Response(blob.data, 200, headers, "application/octet-stream")
    first, last = asked.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Response(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(blob.data[start:stop], 206, headers, "application/octet-stream")


def _with_folders(commit: Commit) -> list[str]:
    folders = {"/".join(path.split("/")[:end]) for path in commit.files for end in range(1, path.count("/") + 1)}
    return sorted({*folders, *commit.files})


def _path_info(commit: Commit, path: str) -> dict[str, Any]:
    blob = commit.files.get(path)
    if blob is None:
        below = sorted((name, blob.oid) for name, blob in commit.files.items() if name.startswith(f"{path}/"))
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(repr(below).encode()).hexdigest()}
    lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid, **({"lfs": lfs} if blob.lfs else {})}


def _sibling(path: str, blob: Blob, details: bool) -> dict[str, Any]:
    info: dict[str, Any] = {"rfilename": path}
    if details:
        info |= {"size": len(blob.data), "blobId": blob.oid}
    if details and blob.lfs:
        info["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return info


def _read_config(files: Mapping[str, Blob]) -> dict[str, Any]:
    try:
        config = json.loads(files["config.json"].data)
    except (KeyError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _model_info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    files = commit.files
    card = read_card(files["README.md"].data.decode())[2] if "README.md" in files else {}
    config = _read_config(files)
    guess = "sentence-transformers" if "modules.json" in files else "transformers" if config else None
    library = card.get("library_name", guess)
    info = {
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": False,
        "tags": _tags(card, config, library, files),
        "library_name": library,
        "pipeline_tag": card.get("pipeline_tag", "sentence-similarity" if library == "sentence-transformers" else None),
        "config": {key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config},
        "cardData": card or None,
        "model-index": card.get("model-index"),
        "siblings": [_sibling(path, files[path], blobs) for path in sorted(files)],
    }
    return {key: value for key, value in info.items() if value is not None}


def _tags(card: Mapping[str, Any], config: Mapping[str, Any], library: str | None, files: Iterable[str]) -> list[str]:
    def listed(key: str) -> list[str]:
        value = card.get(key) or []
        return [value] if isinstance(value, str) else value

    tags = [library, "safetensors" if any(path.endswith(".safetensors") for path in files) else None]
    tags += [config.get("model_type"), *listed("tags"), *listed("language")]
    for prefix, key in (("base_model", "base_model"), ("dataset", "datasets"), ("license", "license")):
        tags += [f"{prefix}:{value}" for value in listed(key)]
    return list(dict.fromkeys(tag for tag in (*tags, "region:us") if tag))


def read_card(content: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """Errors and warnings that the Hub has for a model card, and its metadata."""
    block = FRONT_MATTER.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"], {}
    try:
        card = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML parse error: {error}"], [], {}
    if not isinstance(card, dict):
        return ([] if card is None else ["metadata must be a mapping"]), [], {}
    try:
        errors = [*_field_errors(card), *_results_errors(card.get("model-index"))]
    except (AttributeError, TypeError):
        errors = ['"model-index" is not valid']
    return errors, [], json.loads(json.dumps(card, default=str), parse_constant=lambda _: None)


def _field_errors(card: Mapping[str, Any]) -> Iterator[str]:
    for key in ("license", "library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(card.get(key), str | None):
            yield f'"{key}" must be a string'
    for key in ("language", "tags", "datasets", "metrics", "base_model"):
        value = card.get(key)
        if not isinstance(value, list | None) and (key == "tags" or not isinstance(value, str)):
            yield f'"{key}" must be an array'
            continue
        for i, item in enumerate([value] if isinstance(value, str) else value or []):
            if not isinstance(item, str):
                yield f'"{key}[{i}]" must be a string'
            elif key in ("datasets", "base_model") and not HUB_ID.fullmatch(item):
                yield f'"{key}[{i}]" with value "{item}" is not valid. Use an id from https://hf.co.'


def _results_errors(index: Any) -> Iterator[str]:
    for i, model in enumerate(index or []):
        if not isinstance(model.get("name"), str):
            yield f'"model-index[{i}].name" is required'
        for j, result in enumerate(model.get("results") or []):
            at = f"model-index[{i}].results[{j}]"
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not (result.get(part) or {}).get(key):
                    yield f'"{at}.{part}.{key}" is required'
            for k, metric in enumerate(result.get("metrics") or []):
                for key in ("type", "value"):
                    if metric.get(key) is None:
                        yield f'"{at}.metrics[{k}].{key}" is required'
