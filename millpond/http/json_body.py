"""A request's body as a JSON object, within a limit on its values, so that others are held up as little as may be.

One call that makes Python's objects of a JSON text holds the interpreter until it is done, and the event loop asks for
the interpreter several times for each token that it passes on.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from millpond.http.errors import ApiError, bad_value
from millpond.http.values import more_names_than, more_values_than

LARGE = 256 * 1024
"""Bytes of a value that take a few milliseconds at most to read, whatever they are."""
LARGE_FIELDS = frozenset(
    ("messages", "prompt", "input", "system", "instructions", "content", "tokens", "tools", "prediction")
)
"""Those of any API in which more can be meant. What else is large is no value that any field may have, or nobody's
field: nothing is made of it."""
MOST_NAMES = 1000
"""Of a large body itself: many times as many as any API has."""
_PARTS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_WHOLE: Final = msgspec.json.Decoder(msgspec.Raw)


@dataclass(frozen=True, slots=True)
class TooLarge:
    """Stands for a value of which nothing was made."""

    size: int

    def __repr__(self) -> str:
        return f"{self.size} bytes"


class JsonBodies:
    """Reads the bodies of one process; any thread."""

    def __init__(self, most: int) -> None:
        """``most``: values and names in a body."""
        self._most = most
        self._turn = threading.Lock()

    def read(self, body: bytearray) -> dict[str, object]:
        """The object; a large value that no field may have is ``TooLarge``.

        It takes milliseconds per megabyte and per ten thousand values; large ones wait for each other. Raises ApiError
        400 or 413.
        """
        if more_values_than(body, self._most):
            message = f"the request's body has more than the {self._most} values and names allowed (max_values)"
            raise ApiError(413, message, code="too_many_values")
        try:
            value = msgspec.json.decode(body) if len(body) <= LARGE else self._read_parts(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise bad_value("body", value, "a JSON object", code="invalid_json")
        return value

    def _read_parts(self, body: bytearray) -> object:
        if not body.lstrip(b" \t\r\n").startswith(b"{"):
            _WHOLE.decode(body)
            return TooLarge(len(body))
        if more_names_than(body, MOST_NAMES):
            raise ApiError(413, f"the request's body has more than {MOST_NAMES} fields", code="too_many_values")
        return {name: self._read_part(name, part) for name, part in _PARTS.decode(body).items()}

    def _read_part(self, name: str, part: msgspec.Raw) -> object:
        size = memoryview(part).nbytes
        if size <= LARGE:
            return msgspec.json.decode(part)
        if name not in LARGE_FIELDS:
            return TooLarge(size)
        with self._turn:
            begun = time.perf_counter()
            value: object = msgspec.json.decode(part)
            # As long for the others: else the next of these comes before the event loop has done what it woke up for.
            time.sleep(time.perf_counter() - begun)
        return value
