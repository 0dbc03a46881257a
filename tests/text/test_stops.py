"""Stop strings against a search of the whole text."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
from allocations import traced
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.text.stops import StopMatcher, StopStrings


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    starts = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(starts)], True) if starts else (text, False)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(StopStrings(stops))
    out = []
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        out.append(text)
        assert stopped == matcher.stopped
        if stopped:
            break
    out.append(matcher.finish())
    return "".join(out), matcher.stopped


@st.composite
def split_texts(draw: st.DrawFn, alphabet: str) -> list[str]:
    text = draw(st.text(alphabet, max_size=60))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


ALPHABETS = "ab", "abc", "aé🙂^]-\\"


@pytest.mark.parametrize("alphabet", ALPHABETS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_same_as_searching_the_whole_text(alphabet: str, data: st.DataObject) -> None:
    pieces = data.draw(split_texts(alphabet))
    stops = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=6), max_size=4))
    assert run(pieces, stops) == naive("".join(pieces), stops)


@settings(max_examples=200, deadline=None)
@given(pieces=split_texts("ab"), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_holds_back_less_than_the_longest_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    fed = emitted = 0
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        fed, emitted = fed + len(piece), emitted + len(text)
        if stopped:
            return
        assert fed - emitted < max(map(len, stops))


@given(text=st.text("xyz"))
def test_holds_back_nothing_that_cannot_match(text: str) -> None:
    matcher = StopMatcher(StopStrings(["ab", "b"]))
    assert [matcher.feed(char) for char in text] == [(char, False) for char in text]


def test_earliest_start_wins_over_list_order_and_over_an_earlier_end() -> None:
    assert run(["one two"], ["two", "one"]) == ("", True)
    assert run(list("xabcdy"), ["bc", "abcd"]) == ("x", True)
    assert run(list("xabcey"), ["bc", "abcd"]) == ("xa", True)


def test_a_match_in_the_balance_counts_at_the_end() -> None:
    assert run(list("xabc"), ["bc", "abcd"]) == ("xa", True)


def test_stops_at_the_shorter_of_two_that_start_together() -> None:
    matcher = StopMatcher(StopStrings(["ab", "abc"]))
    assert matcher.feed("xab") == ("x", True)


def test_ignores_everything_after_the_stop() -> None:
    matcher = StopMatcher(StopStrings(["."]))
    assert matcher.feed("a.b") == ("a", True)
    assert matcher.feed("c") == ("", True)
    assert matcher.finish() == ""


def test_no_stops_passes_all_through() -> None:
    matcher = StopMatcher(StopStrings([]))
    assert matcher.feed("abc") == ("abc", False)
    assert matcher.finish() == ""


def test_refuses_an_empty_stop() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\] is empty"):
        StopStrings(["a", ""])


def test_one_automaton_for_many_answers() -> None:
    """What one answer has seen is nothing to another."""
    stops = StopStrings(["abc", "xbd"])
    first, second = StopMatcher(stops), StopMatcher(stops)
    assert first.feed("ab") == ("", False)
    assert second.feed("bc") == ("bc", False)
    assert first.feed("c") == ("", True)
    assert not second.stopped


def test_a_stop_that_leaves_the_path_of_another_behind_a_third() -> None:
    stops = StopStrings(["ab", "cd", "abx"])
    assert [stops.string(state) for state in range(6)] == ["", "a", "ab", "c", "cd", "abx"]
    assert stops.step(4, "x") == 0
    assert stops.step(2, "x") == 5


class CountingStops(StopStrings):
    lookups = 0

    def _child(self, state: int, char: str) -> int | None:
        self.lookups += 1
        return super()._child(state, char)


def test_work_is_linear_in_the_text() -> None:
    """The worst text for the worst stop takes at most two automaton moves per character, however it is split."""
    stops = CountingStops(["a" * 200 + "b"])
    stops.lookups = 0
    matcher = StopMatcher(stops)
    text = ("a" * 199 + "c") * 20 + "a" * 1000
    for char in text:
        matcher.feed(char)
    assert stops.lookups <= 2 * len(text)


def test_memory_is_a_few_bytes_per_character() -> None:
    """The largest that a request may bring, of one letter and of branches."""
    for stops in (["a" * 1000 + str(n) for n in range(16)], [chr(0x4E00 + n) * 1000 for n in range(16)]):
        held, _ = traced(partial(nullcontext, partial(StopStrings, stops)))
        assert held < 64 * sum(map(len, stops)), held
