"""Calls whose arguments stand one by one between tags, as raw text or as JSON by what the tool's schema says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from millpond.dialects.json_calls import NoCall
from millpond.dialects.json_values import escaped, skip_space
from millpond.dialects.pieces import CallBegun, CallEnded, CallText
from millpond.dialects.schemas import Kinds, kinds_of, literal
from millpond.dialects.tape import Looking, Reading, Tape

Tools = Mapping[str, Mapping[str, object]]
"""The schema of each tool's arguments, by its name."""


@dataclass(frozen=True, slots=True)
class Tags:
    """How a family writes them. Names stand between an opening and ``name_end``; all are texts or marks."""

    call: str
    """Before a call's name; empty: the name follows at once."""
    name_end: tuple[str, ...]
    """Behind a call's name. The first one is taken, others are left: the name ends there, too."""
    key: str
    """Before an argument's name."""
    key_end: str
    """Behind an argument's name, up to its value."""
    value_end: str
    """Behind a value."""
    call_end: str
    """Empty: a call ends where the section does."""
    end: str
    """Of the section."""
    framed: bool = False
    """A value's first and last newline belong to the tags."""
    value_begin: str = ""
    """Between ``key_end`` and a value."""
    typed: bool = False
    """The name is followed by `string="true"` or `string="false"`."""


def calls(tape: Tape, tags: Tags, tools: Tools) -> Reading[None]:
    """The calls of a section, up to its end. Raises NoCall."""
    told = False
    while True:
        yield from skip_space(tape)
        if (yield from tape.expect(tags.end)):
            if not told:
                raise NoCall
            return
        if tags.call and not (yield from tape.expect(tags.call)):
            break
        name = yield from _up_to(tape, *tags.name_end, tags.key, tags.end)
        if name is None or not re.fullmatch(r"[^\s<>]+", name.strip()):
            break
        yield CallBegun(name.strip())
        told = True
        yield from tape.expect(tags.name_end[0])
        whole = yield from _arguments(tape, tags, tools.get(name.strip(), {}))
        yield CallEnded(whole)
        if not whole or not tags.call:
            break
    if not told:
        raise NoCall
    yield from skip_space(tape)
    yield from tape.expect(tags.end)


def _up_to(tape: Tape, *ends: str) -> Looking[str | None]:
    """The text before one of these; None where none comes on the same line."""
    text = ""
    while (yield from tape.more()):
        if (yield from tape.ahead(*ends)):
            return text
        text += tape.before(*ends)
        if "\n" in text.strip():
            return None
    return None


def _arguments(tape: Tape, tags: Tags, schema: Mapping[str, object]) -> Reading[bool]:
    """From behind a call's name to its end. False: it was cut off."""
    yield CallText("{")
    first, whole = True, False
    while True:
        yield from skip_space(tape)
        if tags.call_end and (yield from tape.expect(tags.call_end)):
            whole = True
            break
        if (yield from tape.ahead(tags.end)):  # the end of the call may be forgotten, or there is none
            whole = True
            break
        if not (yield from tape.expect(tags.key)):
            break
        name = yield from _up_to(tape, tags.key_end)
        if name is None:
            break
        kinds = kinds_of(schema, name.strip())
        if tags.typed:
            kinds = Kinds() if 'string="true"' in name else Kinds(any=True)
            name = name.partition('"')[0]
        tape.skip(tags.key_end)
        if tags.value_begin:
            yield from skip_space(tape)
            yield from tape.expect(tags.value_begin)
        yield CallText(("" if first else ", ") + f'"{escaped(name.strip())}": ')
        first = False
        if not (yield from _value(tape, tags, kinds)):
            return False
    yield CallText("}")
    return whole


def _value(tape: Tape, tags: Tags, kinds: Kinds) -> Reading[bool]:
    """One value, to behind its end. False: it was cut off."""
    if tags.framed:
        yield from tape.expect("\n")
    streamed = kinds.text
    held, parts = "", list[str]()
    if streamed:
        yield CallText('"')
    while True:
        if not (yield from tape.more()):
            break
        end = yield from _ends(tape, tags)
        if end:
            if tags.framed:
                held = held.removesuffix("\n")
            if streamed:
                yield CallText(escaped(held) + '"')
            else:
                yield CallText(literal("".join(parts) + held, kinds))
            return True
        text = held + (tape.before(tags.value_end) or tape.one())
        held = text[len(text.rstrip("\n")) :][-1:] if tags.framed else ""
        text = text[: len(text) - len(held)]
        if streamed and text:
            yield CallText(escaped(text))
        elif text:
            parts.append(text)
    return False


def _ends(tape: Tape, tags: Tags) -> Looking[bool]:
    """Whether the value ends here, and if so, go behind its end. The same tag inside a value is text: behind the real
    one another tag follows, or nothing."""
    found = yield from tape.ahead(tags.value_end)
    if not found:
        return False
    following = tuple(filter(None, (tags.key, tags.call_end, tags.end)))
    return (yield from tape.followed(found, following))
