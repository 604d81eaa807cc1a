"""Python of the documentation, taken from its page and run, so that a page's lines are a test's."""

from __future__ import annotations

import re
from typing import Any

from .conftest import ROOT


def snippet(document: str, heading: str) -> str:
    """The Python blocks under a heading of the third level, as one."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^### |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    blocks = re.findall(r"```python\n(.*?)```", section[1], flags=re.DOTALL)
    assert blocks, heading
    return "\n".join(blocks)


def run_snippet(document: str, heading: str, replaced: dict[str, str], **names: Any) -> dict[str, Any]:
    """Run them, and give the names they define.

    Args:
        document: File in ``docs``.
        heading: Heading of the third level.
        replaced: What of the page is something else in the test; each must be there.
        names: What the lines go on from.
    """
    code = snippet(document, heading)
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    namespace = {"__name__": "snippet", **names}
    exec(compile(code, f"{document}: {heading}", "exec"), namespace)
    return namespace
