"""Versions of a run: the constraints file, what differs from it, floors, and the page of what was tested.

python .ci/versions.py freeze > constraints.txt    # in an environment whose tests have passed
python .ci/versions.py diff                        # this environment against the constraints file
python .ci/versions.py floors                      # oldest versions that pyproject.toml admits, for pip
python .ci/versions.py record junit.xml            # note a run of the tests in this environment
python .ci/versions.py page > docs/compatibility.md
"""

from __future__ import annotations

import json
import platform
import re
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / ".ci" / "runs.jsonl"
CORE = (
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "bitsandbytes",
)
"""The packages that decide whether anything works."""

HEADER = """\
# Versions that passed all tests together, for `make demo`, `make test` and CI; the package itself has ranges.
# Made by `make constraints` on {date} with Python {python}. Python 3.10 takes the newest it can have.
# Of torch a CPU build is enough for everything in this repository.
"""
PAGE = """\
# Compatibility

Runs of the whole test suite, newest first. `make test` installs the versions of [constraints.txt](../constraints.txt),
`make test-newest` the newest of everything, `make test-floor` the oldest that pyproject.toml admits.
This page is made by `make compatibility`; a run is noted with `RECORD=1`.

| date | Python | {packages} | bf16 CPU | passed | failed | skipped |
|---|---|{rule}|---|---|---|---|
{rows}
"""


def installed() -> dict[str, str]:
    """Version of each package in this environment, without local labels such as ``+cpu``."""
    found = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.split("+")[0] for d in metadata.distributions()
    }
    return {name: found[name] for name in sorted(found) if name not in ("gem-st", "pip")}


def constrained() -> dict[str, str]:
    """Versions in the constraints file."""
    return dict(
        re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )


def freeze() -> str:
    """Text of the constraints file."""
    lines = [
        f"{name}=={version}" + ("" if name == "torch" else ' ; python_version >= "3.11"')
        for name, version in installed().items()
    ]
    return HEADER.format(date=date.today(), python=platform.python_version()) + "\n".join(lines)


def diff() -> str:
    """What is installed in other versions than the constraints file has."""
    here, there = installed(), constrained()
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    rows = [f"{name:<28}{there.get(name, '-'):<20}{here.get(name, '-')}" for name in names]
    return "\n".join([f"{'package':<28}{'constraints.txt':<20}here", *rows]) if rows else "As in constraints.txt."


def floors() -> str:
    """Requirements of the oldest releases, with their latest corrections."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lows = {name: low for name, low in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', text) if name in CORE}
    return " ".join(f"{name}~={low}{'.0' if low.count('.') == 1 else ''}" for name, low in lows.items())


def record(junit: Path) -> None:
    """Append a run to those on the page."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    run = {
        "date": str(date.today()),
        "python": platform.python_version(),
        **{name: version for name, version in installed().items() if name in CORE},
        "bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else None,
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }
    with RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def page() -> str:
    """Text of docs/compatibility.md."""
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    keys = ("date", "python", *CORE, "bf16", "passed", "failed", "skipped")
    words = {True: "yes", False: "no", None: "-"}
    cells = [
        [words.get(run.get(key), run.get(key)) if key == "bf16" else run.get(key, "-") for key in keys] for run in runs
    ]
    rows = "\n".join(f"| {' | '.join(map(str, row))} |" for row in reversed(cells))
    return PAGE.format(packages=" | ".join(CORE), rule="|".join(["---"] * len(CORE)), rows=rows).rstrip("\n")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["diff"]
    if command == "record":
        record(Path(arguments[0]))
    else:
        print({"freeze": freeze, "diff": diff, "floors": floors, "page": page}[command]())
