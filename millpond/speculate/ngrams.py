"""A growing list of token ids that knows where each of its n-grams was last seen.

For each length n in LEVELS there is one table of positions. The last n ids pick the entry, and the newest n-gram takes
it, whichever had it before. No keys are stored: a look-up compares the tokens themselves, so a clash of two n-grams
can hide a match and never makes up a false one. Two entries of 4 bytes per token keep clashes few.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np

SEPARATOR = -1
"""An id that no match reaches across and that no continuation holds."""

LEVELS = (1, 2, 4, 8)
"""The lengths that are looked up, shortest first."""

LONGEST = 32
"""How far back the tokens before a match are compared."""

_WIDEST = LEVELS[-1]
_WORD = (1 << 64) - 1
_FACTORS = [pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, _WIDEST + 1)]
"""What the ids of an n-gram are multiplied with, the last id first; the upper bits of the sum pick the entry."""

_FEWEST_BITS = 6
_MANY = 24
"""From this many tokens on numpy enters them faster than a loop."""


class Occurrence(NamedTuple):
    """A place whose tokens agree with the end of some sequence."""

    at: int
    """Where the continuation begins: the position after the last token that agrees."""
    length: int
    """How many tokens before `at` agree, counted up to LONGEST."""


def _sums(tail: Sequence[int]) -> list[int]:
    """The sums that stand for the last 1, 2, 3 ... ids of a sequence, up to the widest n-gram."""
    return list(accumulate(map(mul, tail[: -1 - _WIDEST : -1], _FACTORS)))


class Ngrams:
    """Token ids in [-1, 2^31), where -1 separates, and the newest place of every n-gram that something follows.

    An n-gram counts from the moment the token after it is known, and only if that is no separator: so a look-up of the
    list's own end never finds that end.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = array("i")
        """All ids so far. To be read only: positions in it stay valid, because it only ever grows."""
        self._run = 0
        """Tokens since the last separator."""
        self._resize()
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the ids and the tables take."""
        return sum(map(sys.getsizeof, [self.tokens, *(table for _, table in self._tables)]))

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ids. Any way of cutting them into calls gives the same tables."""
        if len(tokens) < _MANY:
            for token in tokens:
                self._append(token)
            return
        start = len(self.tokens)
        self.tokens.extend(tokens)
        if len(self.tokens) > self._room:
            self._resize()
        else:
            self._enter(start)
        last = np.flatnonzero(np.frombuffer(self.tokens, np.int32)[start:] == SEPARATOR)[-1:]
        self._run = len(tokens) - 1 - int(last[0]) if len(last) else self._run + len(tokens)

    def find(self, tail: Sequence[int], least: int = LEVELS[0]) -> Occurrence | None:
        """The newest place of the longest n-gram that ends `tail`, if at least `least` tokens agree there.

        `tail` may be this list's own ids or any others. What is returned is always a true match. Unless two n-grams
        clashed, it is the newest place of the longest level that occurs at all.
        """
        sums = _sums(tail)
        for n, table in reversed(self._tables):
            if n > len(sums):
                continue
            at = table[(sums[n - 1] & _WORD) >> self._shift]
            length = self._agreeing(tail, at)
            # A place of fewer ids that agreed further would be a newer place of this n-gram too: no need to look.
            if length >= n:
                return Occurrence(at, length) if length >= least else None
        return None

    def _agreeing(self, tail: Sequence[int], at: int) -> int:
        """How many ids before `at` agree with the end of `tail`, up to LONGEST."""
        ids, most = self.tokens, min(at, len(tail), LONGEST)
        for back in range(1, most + 1):
            token = ids[at - back]
            if token != tail[-back] or token == SEPARATOR:
                return back - 1
        return most

    def _append(self, token: int) -> None:
        at = len(self.tokens)
        self.tokens.append(token)
        if at >= self._room:
            self._resize()
        elif token != SEPARATOR and self._run >= LEVELS[0]:
            sums = _sums(self.tokens[max(0, at - _WIDEST) : at])
            for n, table in self._tables:
                if self._run >= n:
                    table[(sums[n - 1] & _WORD) >> self._shift] = at
        self._run = 0 if token == SEPARATOR else self._run + 1

    def _resize(self) -> None:
        """New tables, with two entries for each token and room for more, filled from the start."""
        bits = max(_FEWEST_BITS, (2 * len(self.tokens) - 1).bit_length())
        self._room = 1 << bits - 1
        self._shift = 64 - bits
        # Nothing is continued at position 0, so 0 marks an entry that is free.
        self._tables = [(n, array("i", bytes(4 << bits))) for n in LEVELS]
        if self.tokens:
            self._enter(0)

    def _enter(self, start: int) -> None:
        """Enter the n-grams that end before each position from `start` on, all at once."""
        ids = np.frombuffer(self.tokens, np.int32)
        begin = max(0, start - _WIDEST)
        missing = _WIDEST - (start - begin)
        window = np.concatenate([np.full(missing, SEPARATOR, np.int32), ids[begin:]])
        places = np.arange(start, len(ids), dtype=np.int32)
        tables, shift = dict(self._tables), np.uint64(self._shift)
        wide, sums = window.astype(np.uint64), np.zeros(len(places), np.uint64)
        whole = window[_WIDEST:] != SEPARATOR
        for n, factor in enumerate(_FACTORS, start=1):
            part = slice(_WIDEST - n, _WIDEST - n + len(places))
            whole &= window[part] != SEPARATOR
            sums += wide[part] * np.uint64(factor)
            if n in tables:
                # The newest place is the highest number. Plain assignment leaves open which of several values stays.
                entries = (sums[whole] >> shift).astype(np.intp)
                np.maximum.at(np.frombuffer(tables[n], np.int32), entries, places[whole])
