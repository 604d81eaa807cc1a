"""The command `gem-st`."""

from .app import app

__all__ = ["app"]
