"""Calls as JSON objects: `{"name": …, "arguments": {…}}`, one, or several in a list."""

from __future__ import annotations

import json
from collections.abc import Collection

from millpond.dialects.json_values import skip_space, string, text_of, value, whole_text
from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece
from millpond.dialects.tape import Looking, Mark, Reading, Tape, gathered

NAMES = ("name", "tool_name", "function")
ARGUMENTS = ("arguments", "parameters")
IDS = ("id", "tool_call_id", "call_id")
NOTHING = "{}"
_EMPTY = ("", "null", "[]", "{}")


class NoCall(Exception):  # noqa: N818 - reads as the fact it states
    """What was read is no call, and no piece has been told of it: it is text."""


def objects(tape: Tape, *ends: str, known: Collection[str] | None = None) -> Reading[None]:
    """The calls that are next: objects one behind the other, or in a list, up to one of ``ends`` or where no other
    follows. ``known``: names that a call can have. Raises NoCall."""
    listed = (yield from _next(tape)) == "["
    if listed:
        yield from tape.characters(1)
    told = False
    while True:
        character = yield from _next(tape)
        if character in ",;" and told and character:
            yield from tape.characters(1)
        elif character == "]" and listed and told:
            yield from tape.characters(1)
            listed = False
        elif character == "{":
            whole = yield from _object(_Call(tape, ends, known), told)
            told = True
            if not whole:
                break
        elif told:
            break
        else:
            raise NoCall
    if ends:  # a brace too many is nothing that anybody said
        while not (yield from tape.expect(*ends)) and (yield from tape.more()):
            tape.before(*ends)


def _next(tape: Tape) -> Looking[str]:
    """The next character that is no white space; empty for marks and the end."""
    yield from skip_space(tape)
    found = yield from tape.peek()
    return "" if isinstance(found, Mark) else found


def _object(call: _Call, others: bool) -> Reading[bool]:
    """One call. False: it was cut off. ``others``: something has been told before, so that it cannot be text."""
    whole = yield from call.read()
    if not call.begun and not others:
        raise NoCall
    return whole


class _Call:
    """One call while it is read: its fields may come in any order, but arguments are told behind the name."""

    def __init__(self, tape: Tape, ends: tuple[str, ...], known: Collection[str] | None) -> None:
        self._tape = tape
        self._ends = ends
        self._known = known
        self.begun = False
        self._id = ""
        self._given = False
        """There were arguments."""
        self._held: str | None = None
        """Arguments that came before the name."""

    def read(self) -> Reading[bool]:
        """Its object, to its end. False: it was cut off."""
        whole = yield from self._fields()
        if self.begun:
            if whole and not self._given:
                yield CallText(self._held or NOTHING)
            yield CallEnded(whole)
        return whole

    def _fields(self) -> Reading[bool]:
        tape = self._tape
        yield from tape.characters(1)
        while True:
            character = yield from _next(tape)
            if character == "}":
                yield from tape.characters(1)
                return True
            if character == ",":
                yield from tape.characters(1)
                continue
            key = yield from text_of(tape)
            if key is None or (yield from _next(tape)) != ":":
                return False
            yield from tape.characters(1)
            yield from skip_space(tape)
            if not (yield from self._field(key)):
                return False

    def _field(self, key: str) -> Reading[bool]:
        """One value. False: it was cut off."""
        tape = self._tape
        character = yield from tape.peek()
        if key in NAMES and not self.begun and character == '"':
            name = yield from text_of(tape)
            if name is None:
                return False
            yield from self._begin(name)
            return True
        if key == "function" and not self.begun and character == "{":
            return (yield from self._fields())
        if key in ARGUMENTS and not self._given:
            return (yield from self._arguments())
        if key in IDS and not self.begun and character == '"':
            found = yield from text_of(tape)
            self._id = found or ""
            return found is not None
        return (yield from gathered(value(tape, self._ends), lambda _: None))

    def _begin(self, name: str) -> Reading[None]:
        if not name or (self._known is not None and name not in self._known):
            raise NoCall
        self.begun = True
        yield CallBegun(name, self._id)
        if self._held is not None:
            self._given = True
            yield CallText(self._held)

    def _arguments(self) -> Reading[bool]:
        tape = self._tape
        character = yield from tape.peek()
        if character == "{" and self.begun:
            self._given = True
            return (yield from value(tape, self._ends))
        parts: list[Piece] = []
        whole = yield from gathered(string(tape) if character == '"' else value(tape, self._ends), parts.append)
        text = "".join(part.text for part in parts if isinstance(part, CallText))
        if whole and character == '"':
            text = whole_text(json.loads(text, strict=False))
        text = NOTHING if text.strip() in _EMPTY else text
        if self.begun:
            self._given = True
            yield CallText(text)
        else:
            self._held = text
        return whole
