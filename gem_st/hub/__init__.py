"""What passes between a GEM model and the Hub: export, verify, push, info.

Nothing half-written is ever left: an export appears in its folder when it is whole, a push is one commit.
"""

from .errors import is_unreachable, translate_hub_errors
from .exporting import export, require_new
from .loading import info, is_gem, load, read_card
from .pushing import push
from .verifying import Check, Verification, verify

__all__ = [
    "Check",
    "Verification",
    "export",
    "info",
    "is_gem",
    "is_unreachable",
    "load",
    "push",
    "read_card",
    "require_new",
    "translate_hub_errors",
    "verify",
]
