"""The text side of one answer: tokens in, text out, cut at the first stop string, tokens counted exactly.

Tokens and text are tied together by the detokenizer's ``ends``: the tokens that belong to a text are the fewest from
the first on that make it up whole. So a token whose text lies past a stop string is never counted, and one that is cut
by it is.

One answer belongs to one request and one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from millpond.dialects.pieces import Piece, Said
from millpond.text.detokenize import Detokenizer
from millpond.text.stops import StopMatcher, StopStrings


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What some tokens added to an answer."""

    pieces: tuple[Piece, ...]
    """What is certain, to be sent now; may be none."""
    stopped: bool
    """The answer has ended before its last token: by a stop string, or because nothing more is wanted of it."""
    tokens: int
    """How many more tokens now surely belong to the answer; tells whose log-probabilities may be sent."""

    @property
    def text(self) -> str:
        """What is said."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Said))


class AnswerText(Protocol):
    """One answer in the making, of whatever kind."""

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far."""

    @property
    def thought_tokens(self) -> int:
        """Those of them that are thoughts, with their marks."""

    @property
    def stopped_by(self) -> str:
        """The stop string that has ended it; empty where none has."""

    def add(self, tokens: Sequence[int]) -> AnswerDelta:
        """Take the next tokens. Those behind the end are ignored."""

    def finish(self) -> AnswerDelta:
        """No more tokens: give out what was held back. To be called once."""


class Answer:
    """One that is nothing but text."""

    thought_tokens = 0

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings | None = None) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops or StopStrings())
        self._fed = 0
        self._emitted = 0
        self._settled = 0

    @property
    def stopped(self) -> bool:
        """True once a stop string has ended the answer."""
        return self._matcher.stopped

    @property
    def stopped_by(self) -> str:
        return self._matcher.matched if self._matcher.stopped else ""

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer: all that were fed, or after a stop string those that make up the text before it."""
        return self._settled if self.stopped else self._fed

    def add(self, tokens: Sequence[int]) -> AnswerDelta:
        """Take the next tokens. Those after a stop string are ignored."""
        parts: list[str] = []
        for token in tokens:
            if self.stopped:
                break
            self._fed += 1
            parts.append(self._matcher.feed(self._detokenizer.add(token))[0])
        return self._delta("".join(parts))

    def finish(self) -> AnswerDelta:
        """No more tokens: give out what was held back. A stop string may still be found in it. To be called once."""
        if self.stopped:
            return AnswerDelta((), True, 0)
        text = self._matcher.feed(self._detokenizer.finish())[0]
        return self._delta(text + self._matcher.finish(), last=True)

    def _delta(self, text: str, last: bool = False) -> AnswerDelta:
        self._emitted += len(text)
        before = self._settled
        self._settled = self._fed if last and not self.stopped else self._covering()
        return AnswerDelta((Said(text),) if text else (), self.stopped, self._settled - before)

    def _covering(self) -> int:
        """The fewest tokens whose text reaches as far as what has been emitted."""
        return bisect_left(self._detokenizer.ends, self._emitted) + 1 if self._emitted else 0
