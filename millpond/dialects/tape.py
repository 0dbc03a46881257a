"""An answer as readers of it see it: texts and marks in the order of the tokens, as far as they have come.

A mark is a text with a meaning of its own. Where it is one token of the vocabulary it is recognised by that token
alone: the same letters in other tokens are text. Readers are generators: they yield None where they need to see more.
So they are written as if all were there, and what they read cannot depend on how it came.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from millpond.dialects.pieces import Piece

T = TypeVar("T")
Reading = Generator[Piece | None, None, T]
"""Yields pieces, and None where it waits for more of the tape."""
Looking = Generator[None, None, T]
"""The same without pieces."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A token that is a mark."""

    text: str


class Tape:
    """One answer. ``tokens``: marks that are tokens of their own."""

    def __init__(self, tokens: Collection[str] = ()) -> None:
        self.tokens = frozenset(tokens)
        self._items: deque[str | Mark] = deque()
        self._ended = False
        self._noted: list[str] | None = None
        self.taken = 0
        """Characters that have been read, marks included."""

    # --- the writer's side ------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """More text, in which no mark is that is a token."""
        if text and self._items and isinstance(last := self._items[-1], str):
            self._items[-1] = last + text
        elif text:
            self._items.append(text)

    def mark(self, text: str) -> None:
        """A token that is a mark."""
        self._items.append(Mark(text))

    def end(self) -> None:
        """Nothing follows."""
        self._ended = True

    # --- the reader's side ------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """All has been read, and nothing follows."""
        return self._ended and not self._items

    def note(self) -> None:
        """Remember from here on what is taken."""
        self._noted = []

    def noted(self) -> str:
        """What has been taken since, marks included."""
        text, self._noted = "".join(self._noted or ()), None
        return text

    def more(self) -> Looking[bool]:
        """Wait for something to read. False: nothing comes any more."""
        while not self._items and not self._ended:
            yield
        return bool(self._items)

    def ahead(self, *options: str) -> Looking[str]:
        """Which of these texts and marks comes next, the longest that does; empty if none does."""
        while (yield from self.more()):
            item = self._items[0]
            if isinstance(item, Mark):
                return item.text if item.text in options else ""
            texts = [option for option in options if option not in self.tokens]
            if not self._grows or not any(len(text) > len(item) and text.startswith(item) for text in texts):
                return max((text for text in texts if item.startswith(text)), key=len, default="")
            yield
        return ""

    def skip(self, text: str) -> None:
        """Take what ``ahead`` has found."""
        if not text:
            return
        item = self._items[0]
        if isinstance(item, Mark):
            self._items.popleft()
            self._note(item.text)
        else:
            self._take(item, len(text))

    def expect(self, *options: str) -> Looking[str]:
        """Take the one that comes next; empty if none does."""
        found = yield from self.ahead(*options)
        if found:
            self.skip(found)
        return found

    def before(self, *options: str) -> str:
        """Take what surely stands before any of these, as far as it is there; empty: nothing, or one of them is next.
        Other marks are text."""
        if not self._items:
            return ""
        item = self._items[0]
        if isinstance(item, Mark):
            if item.text in options:
                return ""
            self.skip(item.text)
            return item.text
        texts = tuple(option for option in options if option not in self.tokens)
        found = _any_of(texts).search(item)
        end = found.start() if found else len(item) - (_held(item, texts) if self._grows else 0)
        return self._take(item, end)

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take the text that matches here, as far as it is there; more of it may follow. Never a mark."""
        if not self._items or isinstance(item := self._items[0], Mark):
            return ""
        found = pattern.match(item)
        return self._take(item, found.end()) if found else ""

    def word(self, pattern: re.Pattern[str]) -> Looking[str]:
        """Take all of the text that matches here: ``pattern`` is of single characters, repeated."""
        parts: list[str] = []
        while (yield from self.more()):
            part = self.run(pattern)
            parts.append(part)
            if self._items or not part:
                break
        return "".join(parts)

    def characters(self, count: int) -> Looking[str]:
        """Take so many characters of text; fewer before a mark or the end."""
        parts = ""
        while len(parts) < count and (yield from self.more()):
            item = self._items[0]
            if isinstance(item, Mark):
                break
            parts += self._take(item, count - len(parts))
        return parts

    def one(self) -> str:
        """Take a character that is there, or a mark as text."""
        item = self._items[0]
        if isinstance(item, Mark):
            self.skip(item.text)
            return item.text
        return self._take(item, 1)

    def followed(self, found: str, following: tuple[str, ...]) -> Looking[bool]:
        """Take ``found``, which is next, if behind it, white space left out, one of ``following`` comes or nothing
        more. Otherwise it stays."""
        while (answer := self._follows(found, following)) is None:
            yield
        if answer:
            self.skip(found)
        return answer

    def _follows(self, found: str, following: tuple[str, ...]) -> bool | None:
        """None: that is not known yet."""
        first, *rest = self._items
        behind = rest if isinstance(first, Mark) else [first[len(found) :], *rest]
        text, mark = "", None
        for item in behind:
            if isinstance(item, Mark):
                mark = item
                break
            text += item
        text = text.lstrip()
        if not text:
            return mark.text in following if mark is not None else (True if self._ended else None)
        texts = [option for option in following if option not in self.tokens]
        if any(map(text.startswith, texts)):
            return True
        return None if mark is None and not self._ended and any(one.startswith(text) for one in texts) else False

    def peek(self) -> Looking[str | Mark]:
        """The next character, or mark; empty at the end."""
        if not (yield from self.more()):
            return ""
        item = self._items[0]
        return item if isinstance(item, Mark) else item[0]

    @property
    def _grows(self) -> bool:
        """More may follow directly behind the text that is next."""
        return len(self._items) == 1 and not self._ended

    def _take(self, item: str, count: int) -> str:
        if count < len(item):
            self._items[0] = item[count:]
        else:
            self._items.popleft()
        self._note(item[:count])
        return item[:count]

    def _note(self, text: str) -> None:
        self.taken += len(text)
        if self._noted is not None:
            self._noted.append(text)


def gathered(reading: Reading[T], taken: Callable[[Piece], None]) -> Looking[T]:
    """Read, and hand the pieces over instead of yielding them."""
    while True:
        try:
            piece = next(reading)
        except StopIteration as end:
            value: T = end.value
            return value
        if piece is None:
            yield
        else:
            taken(piece)


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _held(text: str, options: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which one of ``options`` begins."""
    longest = max(map(len, options), default=0)
    for count in range(min(len(text), longest - 1), 0, -1):
        if any(option.startswith(text[-count:]) for option in options):
            return count
    return 0
