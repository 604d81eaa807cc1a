"""The Dockerfile without Docker: what is in it, and its steps in a folder.

python .ci/dockerfile.py    # runs them: a fresh virtual environment, a server of a small model, its health, its end

Paths of the image lie in a temporary folder, `pip` and `python` are those of a fresh virtual environment, and users are
not made: as root, what comes behind `USER` runs with that number, without rights, in a mount of its own in which
nothing but /tmp and /dev can be written; otherwise it runs as whoever runs this.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "base-8m"
FOLDERS = r"(?<![\w.:/-])/(src|home|model)\b"
"""Paths that the image has and this machine has not."""
TINY = "from gem_st import GemTransformer as T; from sentence_transformers import SentenceTransformer as S; "
TINY += "import sys; S(modules=[T(sys.argv[1], freeze_base=True)], device='cpu').save(sys.argv[2])"


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, and what follows each, in one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore leaves a path out: the last pattern says that fits it or a folder that it is in."""
    parts, ignored = path.split("/"), False
    beginnings = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for pattern in patterns:
        bare = pattern.removeprefix("!").strip("/")
        names = parts if bare.startswith("**/") else beginnings
        if any(fnmatch.fnmatchcase(name, bare.removeprefix("**/")) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def context_patterns() -> list[str]:
    """Patterns of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def copied() -> Iterator[tuple[str, str]]:
    """What is copied from the context, and where to."""
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if word == "COPY":
            *sources, target = rest.split()
            yield from ((source, target) for source in sources)


@dataclass
class Image:
    """The image as a folder.

    Attributes:
        root: Where paths of the image lie.
        env: Environment of its commands.
        user: Number of its user.
        workdir: Where its commands run.
    """

    root: Path
    env: dict[str, str]
    user: str = "0"
    workdir: str = "/"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path of the image lies."""
        return self.root / os.path.normpath(os.path.join(self.workdir, path)).lstrip("/")

    def in_root(self, text: str) -> str:
        """A command or value with paths of this machine."""
        return re.sub(FOLDERS, lambda found: f"{self.root}{found.group()}", text)

    def build(self, text: str) -> None:
        """Run the steps.

        Raises:
            subprocess.CalledProcessError: If one fails.
        """
        for word, rest in instructions(text):
            start = time.perf_counter()
            step = getattr(self, f"_{word.lower()}", None)
            if step is None:
                raise ValueError(f"{word} is an instruction that .ci/dockerfile.py does not know.")
            step(rest)
            print(f"{time.perf_counter() - start:7.1f} s  {word} {rest[:90]}", flush=True)

    def _from(self, rest: str) -> None:
        """The Python that runs this stands for the image's."""

    _expose = _from

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.env.setdefault(name, value)

    def _env(self, rest: str) -> None:
        self.env |= {name: self.in_root(value) for name, value in re.findall(r"(\w+)=(\S+)", rest)}

    def _workdir(self, rest: str) -> None:
        self.workdir = rest
        self.place(".").mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        self.user = rest

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        for source in sources:
            if is_ignored(source, context_patterns()):
                raise FileNotFoundError(f".dockerignore leaves {source} out, which the Dockerfile copies.")
            found, place = ROOT / source, self.place(target)
            if found.is_dir():
                shutil.copytree(found, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = place / found.name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, place)

    def _run(self, rest: str) -> None:
        if rest.startswith("useradd"):  # of this machine nothing is changed
            self.place("/home/gem/.cache/huggingface").mkdir(parents=True)
            return
        subprocess.run(["sh", "-c", self.in_root(rest)], cwd=self.place("."), env=self.env, check=True)

    def _healthcheck(self, rest: str) -> None:
        self.health = json.loads(rest.partition(" CMD ")[2])

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = json.loads(rest)

    def command(self, arguments: list[str]) -> list[str]:
        """A command as the image's user runs it, whose program is found as the image finds it."""
        program = shutil.which(arguments[0], path=self.env["PATH"]) or arguments[0]
        command = [program, *(self.in_root(argument) for argument in arguments[1:])]
        if os.getuid() != 0:
            return command
        as_user = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--no-new-privs"]
        as_user += ["--inh-caps=-all", "--bounding-set=-all", "--"]
        if not can_mount():
            return [*as_user, *command]
        root, start = self.root, self.place(".")
        steps = [
            f"mount -t tmpfs none /mnt && mkdir /mnt/root && mount --rbind {root} /mnt/root",
            f"mount -t tmpfs -o mode=1777 none /tmp && mkdir -p {root} && mount --move /mnt/root {root} && umount /mnt",
            f"mount -o remount,bind,ro / && mount -o remount,bind,ro {root} && cd {start}",
            'exec "$@"',
        ]
        script = " && ".join(steps)
        return ["unshare", "--mount", "sh", "-c", script, "sh", *as_user, *command]


def can_mount() -> bool:
    """Whether this machine lets root make a mount of its own, with nothing to be written in it."""
    try:
        return (
            subprocess.run(
                ["unshare", "--mount", "mount", "-o", "remount,bind,ro", "/"], capture_output=True
            ).returncode
            == 0
        )
    except FileNotFoundError:
        return False


def make_image(root: Path) -> Image:
    """The image, built."""
    subprocess.run([sys.executable, "-m", "venv", str(root / "python")], check=True)
    path = f"{root / 'python' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "TORCH_INDEX")) or name == "LANG"
    }
    image = Image(root, {**kept, "PATH": path, "HOME": str(root / "home" / "gem")})
    image.build((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return image


def ask(port: int, path: str, key: str | None = None, body: object = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", data, headers), timeout=60) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def check_server(image: Image) -> None:
    """Start the image's server on a small model, and see its health, an embedding, its user, and its end.

    Raises:
        AssertionError: If one of them is not as it should be.
    """
    model = image.root / "model"
    subprocess.run(
        [image.env["PATH"].split(":")[0] + "/python", "-c", TINY, str(BASE), str(model)], env=image.env, check=True
    )
    for path in (model, *model.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    env = {**image.env, "GEM_ST_API_KEY": "key"}
    command = image.command([*image.entrypoint, "/model", "--port", str(port)])
    health = image.command([part.replace(":8000/", f":{port}/") for part in image.health])
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, cwd=image.place("."))
    try:
        while subprocess.run(health, env=image.env, cwd=image.place("."), capture_output=True).returncode != 0:
            assert process.poll() is None, "the server ended"
            assert time.perf_counter() - start < 300, "the server is not healthy after five minutes"
            time.sleep(0.2)
        print(f"{time.perf_counter() - start:7.1f} s  until it is healthy")
        assert ask(port, "/v1/models")[0] == 401, "it answers without the key"
        status, reply = ask(port, "/v1/embeddings", "key", {"input": "bread"})
        assert status == 200, reply
        status, reply = ask(port, "/v1/completions", "key", {"prompt": "The old man", "max_tokens": 8})
        assert status == 200, reply
        user = re.search(r"^Uid:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE).group(1)
        assert user == (image.user if os.getuid() == 0 else str(os.getuid())), f"it runs as {user}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM), "it does not end as asked"
    finally:
        process.kill()
    assert subprocess.run(health, env=image.env, cwd=image.place("."), capture_output=True).returncode != 0


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        root.chmod(0o755)
        image = make_image(root)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        check_server(image)
        print(f"{time.perf_counter() - start:7.1f} s; {size / 2**20:.0f} MiB beside Python; read-only: {can_mount()}")


if __name__ == "__main__":
    main()
