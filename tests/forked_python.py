"""Processes that start with the libraries imported: each is forked from a server that has done so once.

A process started here is what a new one would be as to ``__main__``, arguments, environment, ``sys.path``,
``sitecustomize``, working directory, output and exit status. The server never imports gem_st. What libraries read when
they are imported is as in a new process, too: another environment gets another server, but for ``READ_LATE``. Folders
named by ``HF_HOME``, which differ between tests, are seen through a link, whose address stays.

    python = ForkedPython(folder)
    done = python.run("script.py", "argument", env={**os.environ, "HF_HOME": "home"}, cwd=tmp_path)
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "transformers", "sentence_transformers", "datasets", "accelerate", "peft")
READ_LATE = {"HF_HOME", "HF_TOKEN", "MPLBACKEND", "PATH", "PYTEST_CURRENT_TEST", "PYTHONPATH"}
"""Variables of which no preloaded library keeps a copy."""


class ForkedPython:
    """Runs Python scripts one after another, on Linux in processes forked from servers, elsewhere in new ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: dict[tuple, tuple[subprocess.Popen[str], Path]] = {}

    def run(
        self, script: str | Path, *args: object, env: dict[str, str], cwd: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with arguments, as ``subprocess.run([sys.executable, ...], capture_output=True)`` does.

        Args:
            script: Path; a relative one is made absolute.
            args: Arguments, made strings.
            env: Environment, with ``HF_HOME``.
            cwd: Working directory.
        """
        command = [str(Path(cwd, script)), *map(str, args)]
        if sys.platform != "linux":
            return subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True)
        server, home = self._server(env)
        target = Path(cwd, env["HF_HOME"])
        target.mkdir(parents=True, exist_ok=True)
        home.unlink(missing_ok=True)
        home.symlink_to(target)
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            request = {"args": command, "env": {**env, "HF_HOME": str(home)}, "cwd": str(cwd), "outputs": outputs}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            if not (answer := server.stdout.readline()):
                raise RuntimeError("The server ended: " + home.with_name("stderr").read_text())
            return subprocess.CompletedProcess(command, int(answer), *(Path(path).read_text() for path in outputs))

    def _server(self, env: dict[str, str]) -> tuple[subprocess.Popen[str], Path]:
        env = {name: value for name, value in env.items() if name not in READ_LATE}
        key = tuple(sorted(env.items()))
        if key not in self.servers:
            folder = self.folder / str(len(self.servers))
            folder.mkdir(parents=True)
            home = folder / "home"
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with open(folder / "stderr", "w") as errors:
                process = subprocess.Popen(
                    [sys.executable, __file__], env={**env, "HF_HOME": str(home)}, stderr=errors, **pipes
                )
            self.servers[key] = process, home
        return self.servers[key]

    def close(self) -> None:
        for process, _ in self.servers.values():
            process.communicate()


def wait_for_request() -> dict[str, Any]:
    """Fork at each request. Returns in the child; the server reports exit statuses until its input ends."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def become(args: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """Make this process what ``python *args`` would be in that environment and directory."""
    for fd, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_CREAT | os.O_RDWR), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = args
    places = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [os.path.dirname(args[0]), *map(os.path.abspath, places)]
    importlib.invalidate_caches()
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")


if __name__ == "__main__":
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # takes seconds, where PEFT finds it
    path = list(sys.path)
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path[:] = path  # some add a folder of their own
    if any(name.partition(".")[0] == "gem_st" for name in sys.modules):
        sys.exit("gem_st was imported by the server")
    gc.collect()
    gc.freeze()  # pages stay shared for longer
    become(**wait_for_request())
    runpy.run_path(sys.argv[0], run_name="__main__")
