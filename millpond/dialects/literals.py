"""Values as programs write them, translated to JSON while they come: Python's, and those with strings between marks."""

from __future__ import annotations

import re
from collections.abc import Callable

from millpond.dialects.json_values import escaped, skip_space
from millpond.dialects.pieces import CallText
from millpond.dialects.tape import Looking, Mark, Reading, Tape

NAME = re.compile(r"[\w.\-]+")
_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+)")
_SPELLED = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORD = re.compile(r"[^\s,:=\[\](){}'\"<]+")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_PLAIN = re.compile(r"[^'\"\\\x00-\x1f]+")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}

String = Callable[[Tape], Reading[bool | None]]
"""Copies the string that is next, as JSON. False: it was cut off; None: there is none."""


def value(tape: Tape, string: String) -> Reading[bool]:
    """Copy the value that is next, as JSON. False: it was cut off, or it is nothing of the kind."""
    copied = yield from string(tape)
    if copied is not None:
        return copied
    character = yield from tape.peek()
    if isinstance(character, Mark) or not character:
        return False
    if character in _CLOSING:
        return (yield from _collection(tape, character, string))
    word = yield from tape.word(_WORD)
    yield CallText(_word(word))
    return bool(word)


def _collection(tape: Tape, opening: str, string: String) -> Reading[bool]:
    """A list, a tuple, or an object."""
    yield from tape.characters(1)
    closing, keyed = _CLOSING[opening], opening == "{"
    yield CallText("{" if keyed else "[")
    first = True
    while True:
        yield from skip_space(tape)
        character = yield from tape.peek()
        if character == closing:
            yield from tape.characters(1)
            yield CallText("}" if keyed else "]")
            return True
        if character == "," and not first:
            yield from tape.characters(1)
            continue
        if isinstance(character, Mark) and character.text not in tape.tokens:
            return False
        if not first:
            yield CallText(", ")
        first = False
        if keyed and not (yield from _key(tape, string)):
            return False
        if not (yield from value(tape, string)):
            return False


def _key(tape: Tape, string: String) -> Reading[bool]:
    """The key of an object, quoted or not, and its colon."""
    copied = yield from string(tape)
    if copied is None:
        name = yield from tape.word(NAME)
        yield CallText(f'"{escaped(name)}"')
        copied = bool(name)
    yield from skip_space(tape)
    if not copied or not (yield from tape.expect(":")):
        return False
    yield CallText(": ")
    yield from skip_space(tape)
    return True


def _word(word: str) -> str:
    """A number or a name, as JSON: numbers as they were spelled, where JSON has them so."""
    if word in _SPELLED:
        return _SPELLED[word]
    if _JSON_NUMBER.fullmatch(word):
        return word
    plain = word.replace("_", "").removeprefix("+")
    if _NUMBER.fullmatch(word):
        return str(int(plain, 0))
    if re.fullmatch(r"-?\d+", plain):
        return str(int(plain))
    if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", plain):
        return repr(float(plain))
    return f'"{escaped(word)}"'


def python_string(tape: Tape) -> Reading[bool | None]:
    """In single or double quotes, or three of them."""
    quote = yield from tape.ahead('"""', "'''", '"', "'")
    if not quote:
        return None
    empty = yield from tape.ahead(quote * 2) if len(quote) == 1 else tape.ahead("\0")
    if empty:
        tape.skip(empty)
        yield CallText('""')
        return True
    tape.skip(quote)
    yield CallText('"')
    while True:
        character = yield from tape.peek()
        if isinstance(character, Mark):
            tape.skip(character.text)
            yield CallText(escaped(character.text))
        elif not character:
            return False
        elif (yield from tape.expect(quote)):
            yield CallText('"')
            return True
        elif character == "\\":
            yield CallText(escaped((yield from _unescaped(tape))))
        else:
            yield CallText(escaped(tape.run(_PLAIN) or (yield from tape.characters(1))))


def _unescaped(tape: Tape) -> Looking[str]:
    """What an escape sequence of Python stands for; an unknown one for itself."""
    pair = yield from tape.characters(2)
    kind = pair[1:]
    if kind in _DIGITS:
        digits = yield from tape.characters(_DIGITS[kind])
        code = int(digits, 16) if re.fullmatch("[0-9a-fA-F]+", digits) else -1
        known = len(digits) == _DIGITS[kind] and 0 <= code < 0x110000
        return chr(code) if known else pair + digits
    return _ESCAPES.get(kind, kind if kind and kind in "\\'\"" else pair)


def marked_string(mark: str) -> String:
    """Between two of the same mark, as it is."""

    def string(tape: Tape) -> Reading[bool | None]:
        if not (yield from tape.expect(mark)):
            return None
        yield CallText('"')
        while True:
            if (yield from tape.expect(mark)):
                yield CallText('"')
                return True
            if not (yield from tape.more()):
                return False
            if text := tape.before(mark):
                yield CallText(escaped(text))

    return string
