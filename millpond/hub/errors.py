"""The one error of this package."""

from __future__ import annotations


class SourceError(Exception):
    """A model that cannot be had; the message names what was given and what is allowed."""
