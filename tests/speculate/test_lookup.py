"""What is proposed: always something that really followed, from the right place and of the right salt."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from millpond.speculate.lookup import MOST_SALTS, Lookup, PastOutputs, Proposal
from millpond.speculate.ngrams import LONGEST, SEPARATOR, Ngrams

NOTHING = Proposal([], 0)
words = st.lists(st.integers(0, 3), max_size=60)


def lookup(*pieces: list[int], reference: list[int] | None = None) -> Lookup:
    made = Lookup(reference or ())
    for piece in pieces:
        made.extend(piece)
    return made


def follows(ids: list[int], said: list[int], proposal: Proposal, *, cyclic: bool) -> bool:
    """True if somewhere in `ids` the end of `said` is followed by exactly what was proposed."""
    for at in range(proposal.match, len(ids)):
        if ids[at - proposal.match : at] == said[-proposal.match :]:
            rest = ids[at:]
            if cyclic and SEPARATOR not in rest:
                rest = rest * len(proposal.tokens)
            if rest[: len(proposal.tokens)] == proposal.tokens:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    reference=words,
    past=st.lists(words, max_size=3),
    pieces=st.lists(words.filter(bool), min_size=1, max_size=12),
    most=st.integers(1, 12),
)
def test_every_proposal_followed_the_same_tokens(
    reference: list[int], past: list[list[int]], pieces: list[list[int]], most: int
) -> None:
    outputs = PastOutputs()
    for answer in past:
        outputs.add("", answer)
    shared = outputs.of("")
    request, said = Lookup(reference), list[int]()
    for piece in pieces:
        request.extend(piece)
        said += piece
        tokens, match = proposal = request.propose(most, shared)
        assert len(request) == len(said)
        assert len(tokens) <= most
        if proposal == NOTHING:
            continue
        assert 1 <= match <= LONGEST
        assert tokens
        assert SEPARATOR not in tokens
        own = [*reference, SEPARATOR, *said] if reference else said
        assert follows(own, said, proposal, cyclic=True) or (
            shared is not None and follows(list(shared.tokens), said, proposal, cyclic=False)
        )


@settings(max_examples=200, deadline=None)
@given(
    before=words, passage=words, after=words, sizes=st.lists(st.integers(1, 5), min_size=60), in_reference=st.booleans()
)
def test_follows_a_passage_as_it_goes_on(
    before: list[int], passage: list[int], after: list[int], sizes: list[int], in_reference: bool
) -> None:
    """A copied passage is proposed to its end, though its few words stand all over the context, some of them newer."""
    marker = [100, 101]
    source = [*before, *marker, *passage, *after, 102]
    request = lookup(after, marker, reference=source) if in_reference else lookup(source, marker)
    rest = [*passage, *after, 102]
    # Before anything is followed a clash in the index may hide the marker.
    tokens, length = request.propose(8)
    assume(tokens[: len(rest)] == rest[:8])
    for size in sizes:
        drawn, rest = rest[:size], rest[size:]
        if not rest:
            break
        length = min(length + len(drawn), LONGEST)
        request.extend(drawn)
        tokens, match = request.propose(8)
        assert tokens[: len(rest)] == rest[:8]
        assert match == length


def test_the_newest_place_is_taken_until_one_is_followed() -> None:
    old, new = [1, 2, 3, 4, 5], [9, 3, 4, 6, 7]
    assert lookup(old, new, [3, 4]).propose(2) == Proposal([6, 7], 2)
    request = lookup(old, new, [1, 2])
    assert request.propose(3) == Proposal([3, 4, 5], 2)
    request.extend([3, 4])
    assert request.propose(1) == Proposal([5], 4)


def test_a_longer_match_takes_over() -> None:
    request = lookup([7, 1, 2, 3, 50, 9, 1, 2, 3, 60, 8], [7, 1, 2])
    assert request.propose(2) == Proposal([3, 60], 2)
    request.extend([3])
    assert request.propose(1) == Proposal([50], 4)


def test_is_in_step_again_one_token_after_an_edit() -> None:
    text = list(range(200, 260))
    request = lookup(text, text[:20])
    assert request.propose(4) == Proposal(text[20:24], 20)
    request.extend([*text[20:22], 7])
    assert request.propose(4) == NOTHING
    request.extend([text[23]])
    assert request.propose(4) == Proposal(text[24:28], 1)
    request.extend([text[24]])
    assert request.propose(4) == Proposal(text[25:29], 2)


@settings(max_examples=100, deadline=None)
@given(
    period=st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True),
    rounds=st.integers(3, 6),
    most=st.integers(1, 40),
    more=st.integers(0, 20),
)
def test_a_repetition_goes_on_for_ever(period: list[int], rounds: int, most: int, more: int) -> None:
    endless = period * 80
    said = len(period) * rounds
    request = lookup([99, 98], endless[:said])
    first = request.propose(most)
    # In so small an index clashes may hide what has not been followed yet.
    assume(first != NOTHING)
    assert first.tokens == endless[said : said + most]
    request.extend(endless[said : said + more])
    assert request.propose(most).tokens == endless[said + more : said + more + most]


def test_a_prediction_is_no_part_of_the_request() -> None:
    request = lookup([1, 2], reference=[1, 2, 3, 4])
    assert len(request) == 2
    assert request.propose(9) == Proposal([3, 4], 2)
    request.extend([3, 4])
    assert request.propose(9) == NOTHING
    # Its last token and the prompt's first one are no neighbours.
    assert lookup([5, 6, 4, 5], reference=[3, 4]).propose(2) == Proposal([6, 4], 1)


def test_past_answers_come_second_unless_they_match_longer() -> None:
    past = Ngrams([1, 2, 3, 70, SEPARATOR])
    assert lookup([9, 1, 2]).propose(5, past) == Proposal([3, 70], 2)
    assert lookup([9, 1, 2]).propose(5, Ngrams([1, 2, 3, 70])) == Proposal([3, 70], 2)
    assert lookup([2, 3, 80], [2, 3]).propose(1, past) == Proposal([80], 2)
    assert lookup([2, 3, 80], [1, 2, 3]).propose(1, past) == Proposal([70], 3)


def test_a_place_in_past_answers_is_left_with_them() -> None:
    past = Ngrams([1, 2, 3, 4, 5, SEPARATOR])
    for then, proposal in ((past, Proposal([4, 5], 3)), (None, NOTHING), (Ngrams(), NOTHING)):
        request = lookup([1, 2])
        request.propose(5, past)
        request.extend([3])
        assert request.propose(5, then) == proposal


def test_nothing_asked_nothing_proposed() -> None:
    assert lookup([1, 2, 3, 1, 2]).propose(0) == NOTHING
    assert Lookup().propose(5) == NOTHING
    assert lookup([1]).propose(5, Ngrams()) == NOTHING


@settings(max_examples=100, deadline=None)
@given(
    answers=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=40),
    limit=st.integers(0, 120),
)
def test_salts_are_apart_and_the_whole_is_bounded(answers: list[tuple[str, int]], limit: int) -> None:
    outputs = PastOutputs(limit)
    for number, (salt, length) in enumerate(answers):
        first = 10_000 * "abc".index(salt) + 100 * number
        outputs.add(salt, range(first, first + length))
        assert len(outputs) <= limit
        for other in "abc":
            index = outputs.of(other)
            assert index is None or {token // 10_000 for token in index.tokens if token >= 0} <= {"abc".index(other)}


def test_a_salt_is_never_offered_the_tokens_of_another() -> None:
    outputs = PastOutputs()
    outputs.add("a", [1, 2, 3, 4])
    outputs.add("", [1, 2, 5, 6])
    assert lookup([1, 2]).propose(9, outputs.of("a")) == Proposal([3, 4], 2)
    assert lookup([1, 2]).propose(9, outputs.of("")) == Proposal([5, 6], 2)
    assert outputs.of("b") is None


def test_one_answer_never_runs_into_the_next() -> None:
    outputs = PastOutputs()
    outputs.add("a", [1, 2, 3])
    outputs.add("a", [4, 5, 6])
    outputs.add("a", [])
    assert lookup([1, 2]).propose(9, outputs.of("a")) == Proposal([3], 2)
    assert lookup([3, 4]).propose(9, outputs.of("a")) == Proposal([5, 6], 1)


def test_the_oldest_answers_of_the_largest_salt_go_first() -> None:
    outputs = PastOutputs(limit_tokens=100)
    outputs.add("small", range(1000, 1020))
    for number in range(4):
        outputs.add("large", range(100 * number, 100 * number + 20))
    small, large = outputs.of("small"), outputs.of("large")
    assert small is not None
    assert large is not None
    assert len(small) == 21
    assert len(large) == 42
    assert lookup([0, 1]).propose(1, large) == NOTHING
    assert lookup([300, 301]).propose(1, large) == Proposal([302], 2)


def test_a_request_may_go_on_with_an_index_that_has_been_cut() -> None:
    outputs = PastOutputs(limit_tokens=100)
    outputs.add("a", range(60))
    index, request = outputs.of("a"), lookup([1, 2])
    request.propose(4, index)
    outputs.add("a", range(100, 160))
    request.extend([3])
    assert request.propose(4, index) == Proposal([4, 5, 6, 7], 3)
    assert request.propose(4, outputs.of("a")) == NOTHING


def test_of_many_salts_the_least_recently_used_goes() -> None:
    outputs = PastOutputs()
    for number in range(MOST_SALTS):
        outputs.add(str(number), [1, 2, 3])
    assert outputs.of("0") is not None
    outputs.add("one more", [1, 2, 3])
    assert outputs.of("0") is not None
    assert outputs.of("1") is None
    assert outputs.of("2") is not None
