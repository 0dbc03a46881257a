"""Answers in a family's own writing, cut into parts in every way, and what is read from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from millpond.dialects.dialect import Dialect
from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.dialects.reader import AnswerReader
from millpond.dialects.tagged_calls import Tools


@dataclass
class Read:
    """An answer as a client sees it at its end."""

    said: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    order: str = ""
    """s, t and c for each change of what is written."""


def put_together(pieces: Iterable[Piece]) -> Read:
    read = Read()
    for piece in pieces:
        match piece:
            case Said(text):
                read.said += text
            case Thought(text):
                read.thought += text
            case CallBegun(name, own):
                assert len(read.whole) == len(read.calls), "a call within a call"
                read.calls.append((name, ""))
                read.ids.append(own)
            case CallText(text):
                assert len(read.whole) == len(read.calls) - 1, "arguments of no call"
                read.calls[-1] = (read.calls[-1][0], read.calls[-1][1] + text)
            case CallEnded(whole):
                read.whole.append(whole)
        kind = {Said: "s", Thought: "t", CallBegun: "c"}.get(type(piece), "")
        read.order += kind if kind and (kind == "c" or not read.order.endswith(kind)) else ""
    assert len(read.whole) == len(read.calls), "a call without an end"
    return read


def tokens_of(wire: str, marks: Sequence[str]) -> list[tuple[bool, str]]:
    """The texts and marks of an answer in whose vocabulary each of ``marks`` is a token."""
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
    parts: list[tuple[bool, str]] = []
    end = 0
    for found in pattern.finditer(wire):
        parts += [(False, wire[end : found.start()]), (True, found[0])]
        end = found.end()
    return [part for part in (*parts, (False, wire[end:])) if part[1]]


def read(
    dialect: Dialect,
    parts: Iterable[tuple[bool, str]],
    tools: Tools | None,
    tokens: Sequence[str] = (),
    *,
    thinking: bool = False,
) -> Read:
    """``parts``: texts, and (True) marks that are tokens."""
    reader = AnswerReader(dialect, tokens, tools, thinking=thinking)
    pieces: list[Piece] = []
    for is_mark, text in parts:
        pieces += reader.mark(text) if is_mark else reader.write(text)
    return put_together([*pieces, *reader.finish()])


def cuts(parts: Sequence[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """The same, in one piece, character by character, and cut in two at every place."""
    yield list(parts)
    yield [(is_mark, text) for is_mark, whole in parts for text in ([whole] if is_mark else whole)]
    for index, (is_mark, whole) in enumerate(parts):
        for place in range(1, 1 if is_mark else len(whole)):
            yield [*parts[:index], (False, whole[:place]), (False, whole[place:]), *parts[index + 1 :]]
