"""Proposals by looking back: what followed the last time these tokens were seen.

A request looks in its own prompt and answer, in the prediction that its client sent along, and in past answers to
requests with the same salt. The longest match of all decides, so these are one proposer. All of it belongs to the
engine's thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from millpond.speculate.ngrams import LEVELS, LONGEST, SEPARATOR, Ngrams
from millpond.speculate.proposer import DraftOffer, Proposer, Source
from millpond.types import Request, SpecMode

MOST_SALTS = 64
PREDICTED = 4, 1024
"""Of a prediction so many times the longest answer is used, and so many tokens more: what is beyond cannot come."""
LENGTHS = (2, 3, 4, 6, 9, 17)
"""Matches are sorted by how many tokens agree before the draft: a long match is right more often than a short one."""
SOURCES = tuple(Source(SpecMode.NGRAM, chance) for chance in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9))


class Proposal(NamedTuple):
    """Tokens that may come next; nothing to propose is no tokens and a match of 0."""

    tokens: list[int]
    match: int
    """How many tokens before them agreed with the end of the request, counted up to LONGEST."""


class _Pointer(NamedTuple):
    """A place that agrees with the request's last `length` tokens. At `at` there always is a real token."""

    source: Ngrams
    at: int
    length: int


class Lookup:
    """Proposes the next tokens of one request."""

    def __init__(self, reference: Sequence[int] = ()) -> None:
        """`reference` holds the ids that the client predicts. They are searched, but are no part of the request."""
        self._own = Ngrams([*reference, SEPARATOR] if reference else ())
        self._start = len(self._own)
        self._pointer: _Pointer | None = None

    def __len__(self) -> int:
        """How many tokens of prompt and answer it has been given."""
        return len(self._own) - self._start

    @property
    def nbytes(self) -> int:
        return self._own.nbytes

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the prompt's or the answer's next tokens: each once, in their order."""
        self._own.extend(tokens)
        if self._pointer is not None:
            self._pointer = _moved(self._pointer, tokens)

    def propose(self, most: int, shared: Ngrams | None = None) -> Proposal:
        """Up to `most` tokens that followed the longest match.

        The place of the last proposal stays in use while the request agrees with it and no longer match is found.
        Otherwise the request's own tokens come before `shared`, which must match longer. At the end of its own tokens
        a proposal starts over from its first one, because a model that repeats itself goes on doing so.
        """
        if most <= 0:
            return Proposal([], 0)
        best = self._pointer
        if best is not None and best.source is not self._own and best.source is not shared:
            best = None
        for source in (self._own, shared):
            longer = LEVELS[0] if best is None else best.length + 1
            if source is not None and longer <= LONGEST and (found := source.find(self._own.tokens, longer)):
                best = _Pointer(source, *found)
        self._pointer = best
        return Proposal([], 0) if best is None else Proposal(self._continuation(best, most), best.length)

    def _continuation(self, place: _Pointer, most: int) -> list[int]:
        tokens = place.source.tokens[place.at : place.at + most].tolist()
        if SEPARATOR in tokens:
            return tokens[: tokens.index(SEPARATOR)]
        if place.source is self._own:
            return (tokens * (most // len(tokens) + 1))[:most]
        return tokens


def _moved(place: _Pointer, tokens: Sequence[int]) -> _Pointer | None:
    """The place after these tokens of the request; None if it disagrees with one of them or holds no more."""
    source, at, length = place
    ids = source.tokens
    for token in tokens:
        if ids[at] != token:
            return None
        at += 1
        if at == len(ids) or ids[at] == SEPARATOR:
            return None
    return _Pointer(source, at, min(length + len(tokens), LONGEST))


class PastOutputs:
    """Answers given before, one index for each cache salt: no salt ever sees the tokens of another.

    All of them together hold at most `limit_tokens`, separators included. Beyond that the salt with the most tokens
    loses the older half of them; of more than MOST_SALTS salts the one least recently used goes.
    """

    def __init__(self, limit_tokens: int = 1 << 18) -> None:
        self._limit = limit_tokens
        self._indices: dict[str, Ngrams] = {}
        """The least recently used first."""

    def __len__(self) -> int:
        return sum(map(len, self._indices.values()))

    @property
    def nbytes(self) -> int:
        return sum(index.nbytes for index in self._indices.values())

    def add(self, salt: str, tokens: Sequence[int]) -> None:
        """Remember a finished answer."""
        if not tokens:
            return
        index = self.of(salt) or self._indices.setdefault(salt, Ngrams())
        index.extend([*tokens, SEPARATOR])
        if len(self._indices) > MOST_SALTS:
            del self._indices[next(iter(self._indices))]
        while len(self) > self._limit:
            self._halve(max(self._indices, key=lambda each: len(self._indices[each])))

    def of(self, salt: str) -> Ngrams | None:
        """The index of a salt, which is then the one most recently used; None if nothing is known of it."""
        index = self._indices.pop(salt, None)
        if index is not None:
            self._indices[salt] = index
        return index

    def _halve(self, salt: str) -> None:
        # A new index instead of a changed one: requests may still point into the old one.
        tokens = self._indices[salt].tokens
        kept = tokens[(len(tokens) + 1) // 2 :]
        if kept:
            self._indices[salt] = Ngrams(kept)
        else:
            del self._indices[salt]


def source_of(match: int) -> Source:
    """The kind of draft tokens that a match of so many tokens gives."""
    return SOURCES[bisect_right(LENGTHS, match)]


class NgramProposer(Proposer):
    """What followed the last tokens before, for each request."""

    def __init__(self, vocab_size: int, *, shared: bool) -> None:
        """``vocab_size``: ids from there on are never proposed. ``shared``: past answers are looked in, too."""
        self._vocab_size = vocab_size
        self._past = PastOutputs() if shared else None
        self._requests: dict[str, Request] = {}
        self._lookups: dict[str, Lookup] = {}
        """Each made when it is first asked: a long text takes milliseconds."""

    def begin(self, request: Request) -> None:
        self._requests[request.id] = request

    def end(self, name: str) -> None:
        self._requests.pop(name, None)
        self._lookups.pop(name, None)

    def answered(self, salt: str, answer: Sequence[int]) -> None:
        if self._past is not None:
            self._past.add(salt, answer)

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:
        request = self._requests[name]
        lookup = self._lookups.get(name)
        if lookup is None:
            lookup = self._lookups[name] = self._lookup(request)
        lookup.extend(tokens[len(lookup) :])
        shared = self._past.of(request.cache_salt) if self._past is not None else None
        found, match = lookup.propose(most + unread, shared)
        coming = found[unread:]
        return DraftOffer(name, len(coming), source_of(match), coming) if coming else None

    def _lookup(self, request: Request) -> Lookup:
        times, more = PREDICTED
        prediction = request.prediction[: times * request.params.max_tokens + more]
        # A tokenizer may know ids that the model has no embedding for.
        return Lookup([token if 0 <= token < self._vocab_size else SEPARATOR for token in prediction])
