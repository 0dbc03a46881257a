"""Calls as a program makes them: `[f(a="x", b=2), g()]`, and Gemma's `call:f{a:<|"|>x<|"|>}`."""

from __future__ import annotations

from collections.abc import Collection

from millpond.dialects.json_calls import NoCall
from millpond.dialects.json_values import escaped, skip_space
from millpond.dialects.literals import NAME, String, python_string, value
from millpond.dialects.pieces import CallBegun, CallEnded, CallText
from millpond.dialects.tape import Mark, Reading, Tape


def functions(tape: Tape, *ends: str, known: Collection[str] | None = None) -> Reading[None]:
    """Calls in Python's syntax, in a list or not, up to one of ``ends``. ``known``: names that a call can have. Raises
    NoCall."""
    yield from skip_space(tape)
    listed = bool((yield from tape.expect("[")))
    told = False
    while True:
        yield from skip_space(tape)
        character = yield from tape.peek()
        if character == "," and told:
            yield from tape.characters(1)
            continue
        if character == "]" and listed and told:
            yield from tape.characters(1)
            break
        if isinstance(character, Mark) or not (character.isalpha() or character == "_"):
            break
        name = yield from tape.word(NAME)
        if (known is not None and name not in known) or not (yield from tape.expect("(")):
            break
        yield CallBegun(name)
        told = True
        whole = yield from _arguments(tape, ")", "=", python_string)
        yield CallEnded(whole)
        if not whole:
            break
    if not told:
        raise NoCall
    if ends:
        yield from skip_space(tape)
        yield from tape.expect(*ends)


def named_objects(tape: Tape, string: String, *ends: str) -> Reading[None]:
    """One call as `call:name{…}`, up to one of ``ends``. Raises NoCall."""
    yield from skip_space(tape)
    if not (yield from tape.expect("call:")):
        raise NoCall
    name = yield from tape.word(NAME)
    if not name or not (yield from tape.expect("{")):
        raise NoCall
    yield CallBegun(name)
    yield CallEnded((yield from _arguments(tape, "}", ":", string)))
    yield from skip_space(tape)
    yield from tape.expect(*ends)


def _arguments(tape: Tape, closing: str, between: str, string: String) -> Reading[bool]:
    """From behind the opening to behind ``closing``, as a JSON object. False: it was cut off."""
    yield CallText("{")
    first = True
    while True:
        yield from skip_space(tape)
        if (yield from tape.expect(closing)):
            yield CallText("}")
            return True
        if not first and (yield from tape.expect(",")):
            continue
        quoted = yield from tape.ahead('"')
        if quoted:
            tape.skip(quoted)
        name = yield from tape.word(NAME)
        if quoted:
            yield from tape.expect(quoted)
        yield from skip_space(tape)
        if not name or not (yield from tape.expect(between)):
            return False
        yield CallText(("" if first else ", ") + f'"{escaped(name)}": ')
        first = False
        yield from skip_space(tape)
        if not (yield from value(tape, string)):
            return False
