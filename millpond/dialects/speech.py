"""What an answer says and thinks between its marks."""

from __future__ import annotations

from millpond.dialects.pieces import Piece, Said, Thought
from millpond.dialects.tape import Reading, Tape


class Speech:
    """White space at the end of a text waits: before and behind marks it is nobody's."""

    def __init__(self, *, thinking: bool) -> None:
        self.thinking = thinking
        """It is a thought."""
        self._space = ""
        self._dropping = False
        self._back = ""

    def until(self, tape: Tape, *ends: str) -> Reading[str]:
        """Tell the text up to one of ``ends``; which one it is, or empty at the end of the answer."""
        while True:
            text = self._back + tape.before(*ends)
            self._back = ""
            if text:
                yield from self._told(text, tape.taken)
                continue
            found = yield from tape.ahead(*ends)
            if found or tape.over:
                return found

    def drop_space(self) -> None:
        """A mark has been read: leave out white space on both sides of it."""
        self._space, self._dropping = "", True

    def put_back(self, text: str) -> None:
        """What was taken for a call is text."""
        self._back += text

    def rest(self, end: int) -> Reading[None]:
        """At the end of the answer, or of a message: white space there belongs to it, unless it stands behind a
        mark."""
        if self._back:
            back, self._back = self._back, ""
            yield from self._told(back, end)
        if self._space and not self._dropping:
            yield self._piece(self._space, end)
        self._space = ""

    def _told(self, text: str, end: int) -> Reading[None]:
        if self._dropping:
            text = text.lstrip()
            self._dropping = not text
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            yield self._piece(kept, end - len(self._space))

    def _piece(self, text: str, end: int) -> Piece:
        return Thought(text) if self.thinking else Said(text, end)
