"""Reads one answer: what is said, thought and called, while it comes."""

from __future__ import annotations

from collections.abc import Collection

from millpond.dialects import channels
from millpond.dialects.dialect import CallReader, Dialect
from millpond.dialects.json_calls import NoCall
from millpond.dialects.pieces import CallEnded, Piece
from millpond.dialects.speech import Speech
from millpond.dialects.tagged_calls import Tools
from millpond.dialects.tape import Reading, Tape


class AnswerReader:
    """What it tells does not depend on how the answer came in parts."""

    def __init__(
        self, dialect: Dialect, tokens: Collection[str], tools: Tools | None, *, thinking: bool = False
    ) -> None:
        """``tokens``: marks that are tokens of their own. ``tools``: those that may be called, None: no call is looked
        for. ``thinking``: the prompt ended within a thought."""
        self._tape = Tape(tokens)
        self._speech = Speech(thinking=thinking)
        self._reading = _answer(self._tape, dialect, tools, self._speech)
        self._done = False

    @property
    def thinking(self) -> bool:
        """Whether a thought is going on."""
        return self._speech.thinking

    def write(self, text: str) -> list[Piece]:
        """More text of the answer."""
        self._tape.write(text)
        return self._read()

    def mark(self, text: str) -> list[Piece]:
        """The next token is a mark."""
        self._tape.mark(text)
        return self._read()

    def finish(self) -> list[Piece]:
        """Nothing follows."""
        self._tape.end()
        return self._read()

    def _read(self) -> list[Piece]:
        pieces: list[Piece] = []
        while not self._done:
            try:
                piece = next(self._reading)
            except StopIteration:
                self._done = True
                break
            if piece is None:
                break
            pieces.append(piece)
        return pieces


def _answer(tape: Tape, dialect: Dialect, tools: Tools | None, speech: Speech) -> Reading[None]:
    if dialect.messages:
        yield from channels.answer(tape, tools, speech)
        return
    calls = dialect.calls if tools is not None else {}
    opened, closed = dialect.thoughts or ("", "")
    if speech.thinking:
        speech.drop_space()
    elif tools is not None and dialect.leading is not None:
        yield from _calls(tape, "", dialect.leading, tools, speech)
    while not tape.over:
        ends = (*calls, closed) if speech.thinking else (*calls, *((opened,) if opened else ()), *dialect.dropped)
        found = yield from speech.until(tape, *ends)
        if found in calls:
            if (yield from _calls(tape, found, calls[found], tools or {}, speech)):
                speech.thinking = False
        elif found:
            tape.skip(found)
            if found in (opened, closed):
                speech.thinking = found == opened
                yield from tape.expect(*((dialect.label,) if speech.thinking and dialect.label else ()))
            speech.drop_space()
    yield from speech.rest(tape.taken)


def _calls(tape: Tape, mark: str, read: CallReader, tools: Tools, speech: Speech) -> Reading[bool]:
    """The calls that are next, behind the mark with which they begin. False: they are none, but text."""
    tape.note()
    tape.skip(mark)
    told = False
    try:
        for piece in read(tape, tools):
            yield piece
            if isinstance(piece, CallEnded):
                told = True
                tape.note()
    except NoCall:
        speech.put_back(tape.noted())
    if told:
        speech.drop_space()
    return told
