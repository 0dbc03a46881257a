"""The text side of an answer in which there may be thoughts and calls of tools: tokens in, pieces out.

Stop strings are looked for in what is said to the user, nowhere else. One answer belongs to one request and one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from millpond.dialects.pieces import CallEnded, Piece, Said
from millpond.dialects.reader import AnswerReader
from millpond.text.answer import AnswerDelta
from millpond.text.detokenize import Detokenizer
from millpond.text.stops import StopMatcher, StopStrings


class ReadAnswer:
    """One answer in the making."""

    def __init__(
        self,
        detokenizer: Callable[[], Detokenizer],
        reader: AnswerReader,
        marks: Mapping[int, str],
        stops: StopStrings,
        *,
        one_call: bool = False,
    ) -> None:
        """``marks``: those that are tokens, by id; between them text is decoded by fresh detokenizers. ``one_call``:
        the first call ends the answer."""
        self._new_detokenizer = detokenizer
        self._detokenizer = detokenizer()
        self._reader = reader
        self._marks = marks
        self._matcher = StopMatcher(stops)
        self._looks = bool(stops.stops)
        """There are stop strings, so that what has come may not belong to the answer."""
        self._one_call = one_call
        self._stopped = False
        self._ended = False
        self._fed = 0
        self._settled = 0
        self.thought_tokens = 0
        self._held = 0
        """Characters that have been said and not told: they may be of a stop string."""
        self._told_to = 0
        """Characters of the answer up to the end of what has been told."""
        self._written = 0
        """Characters of the answer."""
        self._begun = 0
        """Characters before the text that is being decoded."""
        self._ends: list[int] = []
        """Characters up to the end of each token before that."""

    @property
    def stopped_by(self) -> str:
        return self._matcher.matched if self._matcher.stopped else ""

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer: all that were fed, or after a stop string the fewest that say what is before it."""
        return self._settled if self._stopped else self._fed

    def add(self, tokens: Sequence[int]) -> AnswerDelta:
        """Take the next tokens. Those behind the end are ignored."""
        told: list[Piece] = []
        for token in tokens:
            if self._stopped:
                break
            self._fed += 1
            thinking = self._reader.thinking
            mark = self._marks.get(token)
            if mark is None:
                self._write(self._detokenizer.add(token), told)
            else:
                self._close(told)
                self._written += len(mark)
                self._begun = self._written
                self._ends.append(self._written)
                self._take(self._reader.mark(mark), told)
            self.thought_tokens += thinking or self._reader.thinking
        return self._delta(told)

    def finish(self) -> AnswerDelta:
        """No more tokens: give out what was held back. To be called once."""
        told: list[Piece] = []
        if not self._stopped:
            self._write(self._detokenizer.finish(), told)
            self._take(self._reader.finish(), told)
        if not self._stopped:
            self._release(told)
        self._ended = True
        return self._delta(told)

    def _close(self, told: list[Piece]) -> None:
        """A mark ends the text that is being decoded."""
        self._write(self._detokenizer.finish(), told)
        self._ends += [self._begun + end for end in self._detokenizer.ends]
        self._ends += [self._written] * (self._fed - 1 - len(self._ends))
        self._detokenizer = self._new_detokenizer()

    def _write(self, text: str, told: list[Piece]) -> None:
        self._written += len(text)
        self._take(self._reader.write(text), told)

    def _take(self, pieces: Sequence[Piece], told: list[Piece]) -> None:
        for piece in pieces:
            if self._stopped:
                return
            if isinstance(piece, Said):
                self._held += len(piece.text)
                text, self._stopped = self._matcher.feed(piece.text)
                self._tell(text, told)
                self._told_to = piece.end - self._held
                continue
            self._release(told)
            if not self._stopped:
                told.append(piece)
                self._told_to = self._written
                self._stopped = self._one_call and isinstance(piece, CallEnded)

    def _release(self, told: list[Piece]) -> None:
        """What might have been a stop string is none, or one after all: something else follows."""
        text = self._matcher.finish()
        self._tell(text, told)
        self._told_to += len(text)
        self._stopped = self._matcher.stopped
        self._held = self._held if self._stopped else 0

    def _tell(self, text: str, told: list[Piece]) -> None:
        self._held -= len(text)
        if text:
            told.append(Said(text))

    def _delta(self, told: Sequence[Piece]) -> AnswerDelta:
        before = self._settled
        looking = self._looks and not self._ended
        self._settled = max(before, self._covering()) if looking or self._matcher.stopped else self._fed
        return AnswerDelta(tuple(told), self._stopped, self._settled - before)

    def _covering(self) -> int:
        """The fewest tokens that make up what has been told."""
        if not self._told_to:
            return 0
        if self._told_to <= self._begun:
            return bisect_left(self._ends, self._told_to) + 1
        within = bisect_left(self._detokenizer.ends, self._told_to - self._begun)
        return min(self._fed, len(self._ends) + within + 1)
