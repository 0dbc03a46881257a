"""Calls between marks, name and arguments apart: Mistral's, DeepSeek's, Kimi's."""

from __future__ import annotations

from millpond.dialects.json_calls import NoCall, objects
from millpond.dialects.json_values import SPACE, skip_space, value
from millpond.dialects.pieces import CallBegun, CallEnded
from millpond.dialects.tape import Reading, Tape

FENCE = "```"


def mistral(tape: Tape) -> Reading[None]:
    """Behind `[TOOL_CALLS]`: a list of objects, or `name[CALL_ID]id[ARGS]{…}`. Raises NoCall."""
    yield from skip_space(tape)
    if (yield from tape.ahead("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[", "{")) in ("[", "{"):
        yield from objects(tape)
        return
    name = yield from _before(tape, "[CALL_ID]", "[ARGS]", "{")
    found = yield from tape.expect("[CALL_ID]")
    own = (yield from _before(tape, "[ARGS]", "{")) if found else ""
    yield from tape.expect("[ARGS]")
    yield from _told(tape, name, own)


def deepseek(tape: Tape, section_end: str, begin: str, between: str, end: str) -> Reading[None]:
    """Behind the section's beginning: `name`, ``between``, JSON, ``end``; or a kind in place of the name, and the name
    and fenced JSON behind ``between``. Raises NoCall."""
    told = False
    while True:
        yield from skip_space(tape)
        if not (yield from tape.expect(begin)):
            break
        name = yield from _before(tape, between, end, section_end)
        yield from tape.expect(between)
        yield from skip_space(tape)
        fenced = (yield from tape.ahead("{")) != "{"
        if fenced:
            name = yield from _before(tape, "\n", FENCE, end)
            yield from skip_space(tape)
            yield from tape.expect(f"{FENCE}json", FENCE)
        yield from _told(tape, name, "")
        told = True
        yield from skip_space(tape)
        yield from tape.expect(FENCE)
        yield from skip_space(tape)
        yield from tape.expect(end)
    if not told:
        raise NoCall
    yield from tape.expect(section_end)


def kimi(tape: Tape, section_end: str, begin: str, between: str, end: str) -> Reading[None]:
    """The same with names such as `functions.look_up:0`, which are ids, too."""
    told = False
    while True:
        yield from skip_space(tape)
        if not (yield from tape.expect(begin)):
            break
        own = (yield from _before(tape, between, end, section_end)).strip()
        yield from tape.expect(between)
        name = own.removeprefix("functions.").rpartition(":")[0] or own
        yield from _told(tape, name, own)
        told = True
        yield from skip_space(tape)
        yield from tape.expect(end)
    if not told:
        raise NoCall
    yield from tape.expect(section_end)


def _told(tape: Tape, name: str, own: str) -> Reading[None]:
    """A call of that name whose arguments come next. Raises NoCall."""
    name = name.strip()
    if not name or SPACE.search(name):
        raise NoCall
    yield from skip_space(tape)
    if (yield from tape.peek()) != "{":
        raise NoCall
    yield CallBegun(name, own.strip())
    yield CallEnded((yield from value(tape)))


def _before(tape: Tape, *ends: str) -> Reading[str]:
    """The text before one of these, or the end."""
    text = ""
    while (yield from tape.more()) and not (yield from tape.ahead(*ends)):
        text += tape.before(*ends)
    return text
