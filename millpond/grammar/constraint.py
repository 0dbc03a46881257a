"""One answer that has to follow a grammar, token by token: which tokens may come next, and when it is complete.

Thoughts are free, and so is all before the first trigger: there nothing is asked of llguidance, the tokens are only
watched. Draft tokens are walked through a copy, across those borders too. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from enum import Enum, auto

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from millpond.grammar.lexicon import Lexicon, first_line
from millpond.types import Grammar

Bits = npt.NDArray[np.uint32]
"""A bit for each token of the vocabulary, the lowest first: [words], of 32 each."""
WORD_BITS = 32
MOST_BLANKS = 2


class DeadEnd(Exception):  # noqa: N818 - reads as the fact it states
    """No token can follow, although the answer is not complete."""


class _Place(Enum):
    """Where in the answer the next token stands."""

    THOUGHT = auto()
    WATCHED = auto()
    """Before a trigger."""
    ENTRY = auto()
    """Before the first token that the grammar knows of."""
    WITHIN = auto()


class Constraint:
    """Of one answer, after the tokens it has so far."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher | None, vocabulary: Lexicon) -> None:
        """``matcher``: at the beginning of ``grammar.text``, where others may share it; None where that is empty."""
        self._grammar = grammar
        self._matcher = matcher
        """This answer's own only WITHIN."""
        self._vocabulary = vocabulary
        self._thinking = grammar.thinking
        self._thoughts = 0
        """Tokens of them."""
        self._thought = False
        """There has been one."""
        self._blanks = 0
        """Line ends behind it."""
        self._tail: tuple[int, ...] = ()
        """The last tokens that are watched, as many as a trigger's letters can reach over."""
        self.stuck = ""
        """Why no token fits; empty while one does."""
        begun = self._thinking is not None and self._thinking.begun
        self._place = _Place.THOUGHT if begun else self._outside

    @property
    def _outside(self) -> _Place:
        return _Place.WATCHED if self._grammar.triggers or self._matcher is None else _Place.ENTRY

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._place is _Place.WITHIN and not self.stuck and self._followed.is_stopped()

    @property
    def bound(self) -> bool:
        """The grammar says what may come next, the end included."""
        return self._place is _Place.ENTRY or self._place is _Place.WITHIN

    @property
    def endless(self) -> bool:
        """The answer must not end here: it is within a thought, and what it has to look like comes behind that."""
        return self._place is _Place.THOUGHT and self._outside is _Place.ENTRY

    @property
    def _followed(self) -> LLMatcher:
        assert self._matcher is not None
        return self._matcher

    # --- what may come ----------------------------------------------------------------------------------------

    def allowed(self) -> Bits | None:
        """The tokens that may come next, a new array; None: all. Where none may, all may, and ``stuck`` says so."""
        match self._place:
            case _Place.WATCHED:
                return None
            case _Place.THOUGHT:
                return self._bits([self._close]) if self._thought_enough else None
        found = self._filled()
        if self._place is _Place.ENTRY:
            _set(found, self._at_entry)
        if self.stuck or not found.any():
            self.stuck = self.stuck or "no token of the vocabulary can follow"
            return None
        return found

    def permits(self, token: int) -> bool:
        """Whether it may come next."""
        match self._place:
            case _Place.WATCHED:
                return True
            case _Place.THOUGHT:
                return not self._thought_enough or token == self._close
        free = self._place is _Place.ENTRY and token in self._at_entry
        return free or self._followed.validate_tokens([token]) == 1

    def admitted(self, draft: Sequence[int]) -> int:
        """How many of these may come, one behind the other."""
        if self._place is _Place.WITHIN:
            return self._followed.validate_tokens(list(draft))
        state = self.copy()
        for count, token in enumerate(draft):
            if not state.permits(token):
                return count
            state.take(token)
        return len(draft)

    def forced(self) -> list[int]:
        """Tokens that come next whatever is drawn, or nearly so: the grammar has no other letters."""
        if self._place is _Place.THOUGHT:
            return [self._close] if self._thought_enough else []
        alone = self._place is _Place.WITHIN or (self._place is _Place.ENTRY and not self._at_entry)
        return self._followed.compute_ff_tokens() if alone and not self.stuck else []

    # --- what has come ----------------------------------------------------------------------------------------

    def take(self, token: int) -> None:
        """The answer has one more token. Raises DeadEnd where it does not fit."""
        if self.stuck:
            raise DeadEnd(self.stuck)
        match self._place:
            case _Place.THOUGHT:
                self._thoughts += 1
                if token == self._close:
                    self._place, self._thought, self._blanks = self._outside, True, 0
            case _Place.WATCHED:
                self._watch(token)
            case _Place.ENTRY if token in self._at_entry and self._followed.validate_tokens([token]) != 1:
                self._blanks += 1
                if self._opens(token):
                    self._place = _Place.THOUGHT
            case _Place.ENTRY:
                self._matcher, self._place = self._followed.deep_copy(), _Place.WITHIN
                self._follow(token)
            case _Place.WITHIN:
                self._follow(token)

    def copy(self) -> Constraint:
        """One that goes its own way from here."""
        other = copy(self)
        if self._place is _Place.WITHIN:
            other._matcher = self._followed.deep_copy()
        return other

    def _watch(self, token: int) -> None:
        if self._opens(token):
            self._place = _Place.THOUGHT
            return
        if self._matcher is None:
            return
        named = {mark.token for mark in self._grammar.triggers if mark.token >= 0}
        if token in named:
            self._begin([token])
            return
        letters = [mark.text.encode() for mark in self._grammar.triggers if mark.token < 0]
        if not letters:
            return
        self._tail = (*self._tail, token)[-max(map(len, letters)) :]
        spelled = [self._vocabulary.bytes_of(one) for one in self._tail]
        text = b"".join(spelled)
        end = len(text) - len(spelled[-1])
        for trigger in letters:
            place = text.find(trigger, max(0, end - len(trigger) + 1))
            if place >= 0:
                starts = np.cumsum([0, *map(len, spelled)])
                self._begin(self._tail[int(np.searchsorted(starts, place, side="right")) - 1 :])
                return

    def _begin(self, tokens: Sequence[int]) -> None:
        """A trigger has come with these. Where the grammar does not know them, letters behind it in the last one do not
        fit: nobody was asked about that one, and the answer is left alone."""
        matcher = self._followed.deep_copy()
        if matcher.try_consume_tokens(list(tokens)) == len(tokens):
            self._matcher, self._place = matcher, _Place.WITHIN
        else:
            self._matcher = None

    def _follow(self, token: int) -> None:
        if not self._followed.consume_token(token):
            self.stuck = first_line(self._followed.get_error())
            raise DeadEnd(self.stuck)

    # --- thoughts ---------------------------------------------------------------------------------------------

    def _opens(self, token: int) -> bool:
        return self._thinking is not None and token == self._thinking.begins

    @property
    def _close(self) -> int:
        assert self._thinking is not None
        return self._thinking.ends

    @property
    def _thought_enough(self) -> bool:
        most = None if self._thinking is None else self._thinking.most
        return most is not None and self._thoughts >= most

    @property
    def _at_entry(self) -> list[int]:
        """Tokens that may come before what the grammar knows of: a thought may, once, and line ends behind it."""
        if self._thinking is None:
            return []
        if not self._thought:
            return [self._thinking.begins]
        return self._thinking.blanks if self._blanks < MOST_BLANKS else []

    # --- bits -------------------------------------------------------------------------------------------------

    def _filled(self) -> Bits:
        words = -(-self._vocabulary.size // WORD_BITS)
        found = np.frombuffer(self._followed.compute_bitmask(), dtype=np.uint32)[:words].copy()
        if self._followed.is_error():
            self.stuck = first_line(self._followed.get_error())
            found[:] = 0
        if spare := self._vocabulary.size % WORD_BITS:
            found[-1] &= (1 << spare) - 1
        return found

    def _bits(self, tokens: Sequence[int]) -> Bits:
        found = np.zeros(-(-self._vocabulary.size // WORD_BITS), dtype=np.uint32)
        _set(found, tokens)
        return found


def _set(bits: Bits, tokens: Sequence[int]) -> None:
    for token in tokens:
        bits[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)
