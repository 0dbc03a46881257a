"""Text from command lines and pipes and to terminals, whatever their encoding."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import suppress


class NoText(Exception):  # noqa: N818 - it names what is wrong
    """Bytes that are no text; the message says where they came from."""


def forgive_terminal() -> None:
    """What a terminal's encoding lacks is shown as an escape, as on standard error, instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # of what says that it can be sought in, and cannot
            sys.stdout.reconfigure(errors="backslashreplace")


def is_text(text: str) -> bool:
    """Whether it can be sent. Bytes of a command line or a terminal that are not in its encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def argument(text: str) -> str:
    """A flag's value, refused if it is no text."""
    if not is_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text")
    return text


def piped() -> str:
    """All of standard input: UTF-8, else in the terminal's encoding. Raises NoText."""
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    for encoding in ("utf-8-sig", sys.stdin.encoding if sys.stdin is not None else "utf-8"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start + 1} is {data[error.start]:#04x}"
    raise NoText(f"standard input is not UTF-8 text: {wrong}")
