"""The n-gram index against a search of the whole list."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.speculate.ngrams import _WORD, LEVELS, LONGEST, SEPARATOR, Ngrams, Occurrence, _sums

IDS = [0, 1, 2, 2**31 - 1, SEPARATOR]
"""Few ids: most n-grams come again."""
few = st.lists(st.sampled_from(IDS), max_size=150)


def agreeing(ids: Sequence[int], at: int, tail: Sequence[int]) -> int:
    """How many ids before `at` are the end of `tail`."""
    length = 0
    while length < min(at, len(tail), LONGEST):
        token = ids[at - 1 - length]
        if token != tail[-1 - length] or token == SEPARATOR:
            break
        length += 1
    return length


def places(ids: Sequence[int], n: int) -> list[int]:
    """Where an n-gram ends that something follows, separators apart."""
    return [at for at in range(n, len(ids)) if SEPARATOR not in ids[at - n : at + 1]]


def entry(index: Ngrams, gram: Sequence[int]) -> int:
    return (_sums(gram)[-1] & _WORD) >> index._shift


def searched(index: Ngrams, tail: Sequence[int], *, lossy: bool) -> Occurrence | None:
    """The newest place of the longest level; with `lossy` not if a newer n-gram has taken its entry."""
    ids = list(index.tokens)
    for n in reversed(LEVELS):
        if n > len(tail):
            continue
        wanted = list(tail[-n:])
        newest = max((at for at in places(ids, n) if ids[at - n : at] == wanted), default=None)
        if newest is None:
            continue
        later = range(newest + 1, len(ids))
        if lossy and any(
            entry(index, ids[at - n : at]) == entry(index, wanted) for at in places(ids, n) if at in later
        ):
            continue
        return Occurrence(newest, agreeing(ids, newest, tail))
    return None


@settings(max_examples=300, deadline=None)
@given(ids=few, cut=st.integers(0, 150))
def test_finds_what_a_search_finds(ids: list[int], cut: int) -> None:
    index = Ngrams(ids[:cut])
    index.extend(ids[cut:])
    assert index.find(index.tokens) == searched(index, ids, lossy=True)


@settings(max_examples=200, deadline=None)
@given(ids=few, tail=few.filter(bool))
def test_finds_the_end_of_another_list(ids: list[int], tail: list[int]) -> None:
    assert Ngrams(ids).find(tail) == searched(Ngrams(ids), tail, lossy=True)


@settings(max_examples=300, deadline=None)
@given(ids=few, tail=few, least=st.integers(2, 12))
def test_a_match_is_true_and_reaches_over_no_separator(ids: list[int], tail: list[int], least: int) -> None:
    index = Ngrams(ids)
    for end in (tail, ids):
        found = index.find(end, least)
        if found is not None:
            assert least <= found.length <= LONGEST
            assert found.at < len(ids)
            assert ids[found.at] != SEPARATOR
            matched = ids[found.at - found.length : found.at]
            assert matched == end[-found.length :]
            assert SEPARATOR not in matched
            assert found.length == agreeing(ids, found.at, end)


@pytest.mark.parametrize("seed", range(30))
def test_any_way_of_extending_gives_the_same_index(seed: int) -> None:
    chance = random.Random(seed)
    ids = [chance.choice(IDS[:-1] if chance.random() < 0.9 else IDS) for _ in range(400)]
    single, pieces = Ngrams(), Ngrams()
    for token in ids:
        single.extend([token])
    rest = ids
    while rest:
        size = chance.choice([1, 1, 2, 7, 30, 100])
        pieces.extend(rest[:size])
        rest = rest[size:]
    assert single.tokens == pieces.tokens == Ngrams(ids).tokens
    assert single._tables == pieces._tables == Ngrams(ids)._tables


def test_hardly_anything_is_lost() -> None:
    chance = random.Random(7)
    ids = [int(chance.paretovariate(0.7)) for _ in range(1500)]
    index, found, there = Ngrams(), 0, 0
    for token in ids:
        index.extend([token])
        exact = searched(index, list(index.tokens[-LONGEST:]), lossy=False)
        if exact is not None:
            there += 1
            found += index.find(index.tokens) == exact
    assert there > 700
    assert found / there > 0.9


@pytest.mark.parametrize("bulk", [True, False])
def test_growth_keeps_every_n_gram(bulk: bool) -> None:
    chance = random.Random(8)
    ids = [chance.randrange(2**31) for _ in range(3000)]
    index = Ngrams()
    step = 500 if bulk else 1
    for start in range(0, len(ids), step):
        index.extend(ids[start : start + step])
    found = [index.find(ids[:at]) for at in range(LONGEST, len(ids))]
    assert {match for match in found if match} <= {Occurrence(at, LONGEST) for at in range(LONGEST, len(ids))}
    # Each of three levels loses about a fifth at this load; all three together a few per cent.
    assert sum(match is not None for match in found) > 0.95 * len(found)
    assert index.nbytes <= len(ids) * (6 + 16 * len(LEVELS)) + 1000


def test_the_newest_of_many_wins() -> None:
    passage = [5, 6, 7]
    ids = [token for i in range(40) for token in [*passage, 100 + i]]
    assert Ngrams([*ids, *passage]).find(passage) == Occurrence(len(ids) - 1, 3)


def test_the_longest_level_wins_over_a_newer_place() -> None:
    ids = [1, 2, 3, 4, 50, 9, 9, 3, 4, 60, 8, 8]
    assert Ngrams(ids).find([1, 2, 3, 4]) == Occurrence(4, 4)
    assert Ngrams(ids).find([7, 2, 3, 4]) == Occurrence(9, 2)
    assert Ngrams(ids).find([7, 2, 3, 4], least=3) is None


def test_an_end_is_found_only_once_something_follows() -> None:
    index = Ngrams([1, 2])
    assert index.find([1, 2]) is None
    index.extend([SEPARATOR])
    assert index.find([1, 2]) is None
    index.extend([1, 2, 3])
    assert index.find([1, 2]) == Occurrence(5, 2)


def test_ids_out_of_range_are_refused() -> None:
    for index in (Ngrams(), Ngrams(range(100))):
        with pytest.raises(OverflowError):
            index.extend([2**31])
