"""Marks around what messages say: whether a template shows a message is seen by what becomes of its marks.

Marks are digits, which no template changes, and random, so that no text has them by itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence

Message = Mapping[str, object]

_WIDTH = 8
"""Digits of a message's index."""


class Marks:
    """The marks of one rendering."""

    def __init__(self) -> None:
        self._key = f"{secrets.randbelow(10**18):018d}"

    def around(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, each content that is not blank between two marks."""
        return [
            {**message, "content": f"{self._key}{_begin(index)}{message['content']}{self._key}{_end(index)}"}
            if _says_something(message)
            else message
            for index, message in enumerate(messages)
        ]

    def hidden(self, messages: Sequence[Message], text: str) -> list[int]:
        """Indexes of the messages that ``text``, rendered from ``around``, does not show, or only in part.

        Of an assistant's message the end is enough: templates leave out what earlier answers reasoned, which stands
        first.
        """
        # One by one: a single call that found them all would hold the interpreter meanwhile.
        found = {mark[1] for mark in re.finditer(rf"{self._key}(\d{{{_WIDTH + 1}}})", text)}
        return [
            index
            for index, message in enumerate(messages)
            if _says_something(message)
            and not (_end(index) in found and (message.get("role") == "assistant" or _begin(index) in found))
        ]


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content) and not content.isspace()


def _begin(index: int) -> str:
    return f"{index:0{_WIDTH}d}0"


def _end(index: int) -> str:
    return f"{index:0{_WIDTH}d}1"
