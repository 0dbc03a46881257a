"""JSON as models write it, copied while it comes: what is no JSON in a way that has one meaning is put right.

Raw control characters in strings are escaped, `True`, `False` and `None` are translated; numbers stay as they were
spelled. Marks inside a string are text: what is written to a file may be anything.
"""

from __future__ import annotations

import json
import re

from millpond.dialects.pieces import CallText, Piece
from millpond.dialects.tape import Looking, Mark, Reading, Tape, gathered

SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[^\s,:\[\]{}\"]+")
_ESCAPABLE = frozenset('"\\/bfnrt')
_SPELLED = {"True": "true", "False": "false", "None": "null"}


def escaped(text: str) -> str:
    """As it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def value(tape: Tape, ends: tuple[str, ...] = ()) -> Reading[bool]:
    """Copy the value that is next. False: it was cut off, by a mark, one of the texts ``ends``, or the end."""
    depth = 0
    while True:
        character = yield from tape.peek()
        if isinstance(character, Mark) or not character or (yield from tape.ahead(*ends)):
            return False
        if character == '"':
            if not (yield from string(tape)):
                return False
        elif character.isspace() or character in ",:":
            yield CallText(tape.run(SPACE) or (yield from tape.characters(1)))
            continue
        elif character in "[{":
            yield CallText((yield from tape.characters(1)))
            depth += 1
        elif character in "]}":
            if not depth:
                return False
            yield CallText((yield from tape.characters(1)))
            depth -= 1
        else:
            word = yield from tape.word(_WORD)
            yield CallText(_SPELLED.get(word, word))
        if not depth:
            return True


def string(tape: Tape) -> Reading[bool]:
    """Copy the string that is next, quotes included. False: it was cut off."""
    yield CallText((yield from tape.characters(1)))
    while True:
        character = yield from tape.peek()
        if isinstance(character, Mark):
            tape.skip(character.text)
            yield CallText(escaped(character.text))
        elif not character:
            return False
        elif character == '"':
            yield CallText((yield from tape.characters(1)))
            return True
        elif character == "\\":
            yield CallText((yield from _escape(tape)))
        elif character < " ":
            yield CallText(escaped((yield from tape.characters(1))))
        else:
            yield CallText(tape.run(_PLAIN))


def _escape(tape: Tape) -> Looking[str]:
    """An escape sequence; what JSON does not know as one stands for itself."""
    pair = yield from tape.characters(2)
    if pair == "\\u":
        digits = yield from tape.characters(4)
        return pair + digits if re.fullmatch("[0-9a-fA-F]{4}", digits) else "\\\\u" + escaped(digits)
    if pair[1:] in _ESCAPABLE and len(pair) == 2:
        return pair
    return escaped(pair[1:]) if pair == "\\'" else "\\\\" + escaped(pair[1:])


def text_of(tape: Tape) -> Looking[str | None]:
    """What the string that is next says; None where it is none, or was cut off."""
    if (yield from tape.peek()) != '"':
        return None
    parts: list[Piece] = []
    if not (yield from gathered(string(tape), parts.append)):
        return None
    said: str = json.loads("".join(part.text for part in parts if isinstance(part, CallText)), strict=False)
    return whole_text(said)


def whole_text(text: str) -> str:
    """Half a character, which JSON can spell and nobody can send, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def skip_space(tape: Tape) -> Looking[None]:
    """Take white space, all of it."""
    yield from tape.word(SPACE)
