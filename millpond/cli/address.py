"""The address of a running server, as the client commands take it."""

from __future__ import annotations

import argparse

DEFAULT_URL = "http://127.0.0.1:8000"


def address(text: str) -> str:
    """Check the address of a server as given to a flag."""
    import httpx

    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as {DEFAULT_URL}")
    return text
