"""Marks around what messages say: by what becomes of them is seen whether a template shows a message, and where.

Marks are digits, which no template changes, and random, so that no text has them by itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Message = Mapping[str, object]

_WIDTH = 8
"""Digits of a message's index."""
_BEGIN, _END = "0", "1"


class Span(NamedTuple):
    """Where what a message says stands in a prompt."""

    message: int
    """Its index."""
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shown:
    """What a template has made of marked messages."""

    text: str
    """Without the marks."""
    spans: list[Span]
    """In order, in characters; of a message whose beginning is not shown, the end alone. None where a template shows
    one twice, or messages in another order."""
    hidden: list[int]
    """Indexes of the messages that it does not show, or only in part."""


class Marks:
    """The marks of one rendering."""

    def __init__(self) -> None:
        self._key = f"{secrets.randbelow(10**18):018d}"

    def around(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, each content that is not blank between two marks."""
        return [
            {**message, "content": f"{self._mark(index, _BEGIN)}{message['content']}{self._mark(index, _END)}"}
            if _says_something(message)
            else message
            for index, message in enumerate(messages)
        ]

    def shown(self, messages: Sequence[Message], text: str) -> Shown:
        """What there is in ``text``, rendered from ``around``."""
        plain: list[str] = []
        begun, ended = dict[int, int](), dict[int, int]()
        size, behind, orderly = 0, 0, True
        # One by one: a single call that found them all would hold the interpreter meanwhile.
        for mark in re.finditer(rf"{self._key}(\d{{{_WIDTH}}})([{_BEGIN}{_END}])", text):
            plain.append(text[behind : mark.start()])
            size, behind = size + len(plain[-1]), mark.end()
            places, index = (begun if mark[2] == _BEGIN else ended), int(mark[1])
            orderly = orderly and index not in places
            places.setdefault(index, size)
        plain.append(text[behind:])
        spans = [Span(index, begun.get(index, end), end) for index, end in ended.items()]
        orderly = orderly and all(one.message < next_.message for one, next_ in pairwise(spans))
        # Of an assistant's message the end is enough: templates leave out what earlier answers reasoned, which stands
        # first.
        hidden = [
            index
            for index, message in enumerate(messages)
            if _says_something(message)
            and not (index in ended and (message.get("role") == "assistant" or index in begun))
        ]
        return Shown("".join(plain), spans if orderly else [], hidden)

    def _mark(self, index: int, edge: str) -> str:
        return f"{self._key}{index:0{_WIDTH}d}{edge}"


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content) and not content.isspace()
