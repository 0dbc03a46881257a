"""How a model has written the arguments of its calls.

Clients send calls back in later turns, often written anew: other white space, other escapes, names in another order.
The same call is given to the chat template as the model wrote it, so that the prompt goes on where the answer ended and
what is cached of it is found. What a call means is not touched: only the same values are the same call.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece

MOST_BYTES = 16 * 1024 * 1024
"""Of all texts together; the ones used last stay."""
LONGEST = 128 * 1024
"""Characters of one: it is looked into on the event loop."""


class Spellings:
    """Of one served model; any thread."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, salt: str, name: str, text: str) -> None:
        """A call of ``name`` has been written, with these arguments. ``salt``: who may learn of it."""
        key = _key(salt, name, text)
        if key is None or len(text) > LONGEST:
            return
        with self._lock:
            self._forget(key)
            self._known[key] = text
            self._bytes += len(text)
            while self._bytes > self._most_bytes:
                self._forget(next(iter(self._known)))

    def find(self, salt: str, name: str, text: str) -> str:
        """The same arguments as the model wrote them last; empty where it did not."""
        key = _key(salt, name, text)
        if key is None:
            return ""
        with self._lock:
            found = self._known.get(key, "")
            if found:
                self._known.move_to_end(key)
            return found

    def _forget(self, key: bytes) -> None:
        self._bytes -= len(self._known.pop(key, ""))


class Listener:
    """Hears the pieces of one answer, and keeps how its calls are written."""

    def __init__(self, spellings: Spellings, salt: str) -> None:
        self._spellings = spellings
        self._salt = salt
        self._name = ""
        self._text: list[str] = []

    def hear(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            match piece:
                case CallBegun(name):
                    self._name, self._text = name, []
                case CallText(text):
                    self._text.append(text)
                case CallEnded(whole=True):
                    self._spellings.keep(self._salt, self._name, "".join(self._text))


def _key(salt: str, name: str, text: str) -> bytes | None:
    """The same for all that say the same; None for what is no object of JSON."""
    try:
        values = json.loads(text, strict=False)
        said = json.dumps([salt, name, values], sort_keys=True)
    except (ValueError, RecursionError):
        return None
    return blake2b(said.encode(), digest_size=16).digest() if isinstance(values, dict) else None
