"""Reading a server-sent event stream: bytes in, the data of whole events out.

Pure: no I/O, no clock. Bytes may be split anywhere, multi-byte characters included.
"""

from __future__ import annotations

DONE = "[DONE]"
"""Data of the event that ends an OpenAI stream."""


class EventReader:
    """Splits a byte stream into events and yields the data of each. One instance per response."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Take the next bytes; return the data of every event they complete, in order. Comments are dropped."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events: list[str] = []
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", errors="replace")
            if not line:
                self._close_event(events)
            elif line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
        return events

    def _close_event(self, events: list[str]) -> None:
        if self._data:
            events.append("\n".join(self._data))
            self._data = []
