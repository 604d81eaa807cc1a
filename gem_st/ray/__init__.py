"""Corpora larger than a machine, on Ray Data: a class for `map_batches`, and the run of `gem-st encode`.

Names are imported when they are asked for: Ray's own workers import what lies beside them here, and need no torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .config import EncodeConfig
    from .encoder import Encoder
    from .errors import EncodeError
    from .run import EncodeResult, encode, preview
    from .verifying import verify

__all__ = ["EncodeConfig", "EncodeError", "EncodeResult", "Encoder", "encode", "preview", "verify"]

if find_spec("pyarrow") is None:
    raise ImportError("pyarrow is not installed: pip install 'gem-st[ray]'")

__getattr__ = lazy(
    __name__,
    {
        "ray.config": ("EncodeConfig",),
        "ray.encoder": ("Encoder",),
        "ray.errors": ("EncodeError",),
        "ray.run": ("EncodeResult", "encode", "preview"),
        "ray.verifying": ("verify",),
    },
)
