"""A process that is forked with the imports done is, for its script, one that was started anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, json, multiprocessing, os, sys
environment = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
loaded = [name for name in ("gem_st", "sitecustomize", "helper") if sys.modules.get(name)]
home = os.path.realpath(os.environ["HF_HOME"])
print(json.dumps([__name__, __file__, sys.argv, os.getcwd(), sys.path, environment, home, loaded, sys.stdin.read()]))
print("to the other", file=sys.stderr)
atexit.register(print, "at the end")
import helper
END
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)])
def test_a_script_finds_what_it_finds_in_a_new_process(python, tmp_path, end, status):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "helper.py").write_text("print('helped')")
    (tmp_path / "place" / "sitecustomize.py").write_text("")
    (tmp_path / "script.py").write_text(SCRIPT.replace("END", end))
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_a", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **home, "PYTHONPATH": str(tmp_path / "place")}
    options = {"cwd": tmp_path, "env": env}
    command = [sys.executable, str(tmp_path / "script.py"), "a b", "1"]
    new = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options)
    forked = python.run("script.py", "a b", 1, **options)
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr)
    assert new.returncode == status
    if status == 0:
        assert json.loads(new.stdout.splitlines()[0])[7] == ["sitecustomize"]
        assert new.stdout.splitlines()[1:] == ["helped", "at the end"]


def test_an_error_that_is_not_caught_ends_it_as_it_ends_a_new_process(python, tmp_path):
    (tmp_path / "script.py").write_text("print('so far')\nraise ValueError('no')")
    done = python.run("script.py", env={**os.environ, "HF_HOME": "home", "HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert done.stderr.splitlines()[-1] == "ValueError: no"
