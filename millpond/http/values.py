"""How much there is in a JSON text, before anything is made of it.

Python's objects are many times larger than their JSON, and one call that makes them holds the interpreter until it is
done: what a text of so many bytes costs is decided by how many values there are in it. Counting them costs a
millisecond per megabyte, in calls of a fraction of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PIECE = 256 * 1024
STRUCTURE = (b",", b":", b"[", b"{")
"""Each value is the first of its container or has one of these before it; so has each name."""
QUOTE, COMMA = ord('"'), ord(",")
DEEPER = np.zeros(256, np.int8)
"""What each character outside of strings adds to the depth."""
DEEPER[[ord("["), ord("{")]], DEEPER[[ord("]"), ord("}")]] = 1, -1


def more_values_than(body: bytearray, most: int) -> bool:
    """Whether a JSON text has more than ``most`` values and names. Of a text that is no JSON the answer means nothing,
    and is found as fast."""
    # Strings may have such characters, too, but seldom so many that it is worth the trouble to tell them apart.
    if (
        1 + sum(body.count(sign, start, start + PIECE) for start in range(0, len(body), PIECE) for sign in STRUCTURE)
        <= most
    ):
        return False
    count = 1
    for codes in _outside_strings(body):
        count += sum(int(np.count_nonzero(codes == sign[0])) for sign in STRUCTURE)
        if count > most:
            return True
    return False


def more_names_than(body: bytearray, most: int) -> bool:
    """Whether the outermost object has more than ``most`` names, be some of them equal. It takes ten milliseconds per
    megabyte, in calls of a few. Of a text that is no JSON the answer means nothing, and is found as fast."""
    count, depth = 1, 0
    for codes in _outside_strings(body):
        depths = depth + np.cumsum(DEEPER[codes], dtype=np.int64)
        count += int(np.count_nonzero(depths[codes == COMMA] == 1))
        if count > most:
            return True
        depth = int(depths[-1]) if len(depths) else depth
    return False


def _outside_strings(body: bytearray) -> Iterator[NDArray[np.uint8]]:
    """What of the text is not within quotes, in pieces."""
    inside = np.uint8(0)
    for piece in _without_escapes(body):
        codes = np.frombuffer(piece, np.uint8)
        strings = np.bitwise_xor.accumulate(np.concatenate(([inside], codes == QUOTE)).astype(np.uint8))[1:]
        if len(strings):
            inside = strings[-1]
        yield codes[strings == 0]


def _without_escapes(body: bytearray) -> Iterator[bytes]:
    r"""The text in pieces, without ``\\`` and ``\"``, which are all that could be taken for the end of a string."""
    rest = b""
    for start in range(0, len(body), PIECE):
        piece = rest + bytes(body[start : start + PIECE])
        slashes = len(piece) - len(piece.rstrip(b"\\"))
        whole = len(piece) - slashes % 2
        rest, piece = piece[whole:], piece[:whole]
        yield piece.replace(b"\\\\", b"").replace(b'\\"', b"")
    yield rest


def holds_more_than(value: object, most: int) -> bool:
    """Whether there are more than ``most`` values in lists and objects, one within the other."""
    count, level = 0, [value]
    while level and count <= most:
        inner = _inside(level)
        count += len(inner)
        level = [each for each in inner if isinstance(each, dict | list)]
    return count > most


def deeper_than(value: object, most: int) -> bool:
    """Whether lists and objects stand within each other on more than ``most`` levels."""
    level: list[object] = [value]
    for _ in range(most):
        level = [each for each in _inside(level) if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _inside(level: list[object]) -> list[object]:
    """What these lists and objects hold."""
    inner: list[object] = []
    for each in level:
        if isinstance(each, dict):
            inner += each.values()
        elif isinstance(each, list):
            inner += each
    return inner
