"""The command `gem-st`: each command calls one function of the library and prints what it returns."""

from . import train, evaluate, hub, serve, encode  # noqa: F401, I001  # which add their commands, in the order of the help
from .common import app

__all__ = ["app"]
