"""Detokenizer and stop strings together: text and token count against doing it all at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BACKENDS, CORPUS, id_of

from millpond.text.answer import Answer
from millpond.text.decoding import Decoding, decoding_of
from millpond.text.stops import StopStrings

KINDS = ["byte level", "byte fallback", "byte fallback, stripped", "metaspace"]


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    made: Callable[[], tokenizers.Tokenizer] = BACKENDS[request.param]
    return made()


@pytest.fixture(scope="module")
def decoding(backend: tokenizers.Tokenizer) -> Decoding:
    return decoding_of(backend)


def naive(backend: tokenizers.Tokenizer, ids: list[int], stops: list[str]) -> tuple[str, bool, int]:
    text = backend.decode(ids)
    starts = [text.find(stop) for stop in stops if stop in text]
    if not starts:
        return text, False, len(ids)
    kept = text[: min(starts)]
    return kept, True, next(n for n in range(len(ids) + 1) if backend.decode(ids[:n]).startswith(kept))


def run(decoding: Decoding, parts: list[list[int]], stops: list[str]) -> tuple[str, bool, int]:
    answer = Answer(decoding.detokenizer(), StopStrings(stops))
    text, tokens = "", 0
    for part in parts:
        delta = answer.add(part)
        text, tokens = text + delta.text, tokens + delta.tokens
        assert tokens <= answer.completion_tokens
        if delta.stopped:
            break
    delta = answer.finish()
    text, tokens = text + delta.text, tokens + delta.tokens
    assert delta.stopped == answer.stopped
    assert tokens == answer.completion_tokens
    return text, answer.stopped, answer.completion_tokens


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    cuts = sorted(cut % (len(ids) + 1) for cut in cuts)
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


CUTS = st.lists(st.integers(0, 200), max_size=12)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), text=st.one_of(st.sampled_from(CORPUS), st.text("abhet é世🙂<\n.", max_size=25)), cuts=CUTS)
def test_text_stop_and_count_of_real_text(
    backend: tokenizers.Tokenizer, decoding: Decoding, data: st.DataObject, text: str, cuts: list[int]
) -> None:
    ids = backend.encode(text).ids
    full = backend.decode(ids)
    spans = st.tuples(st.integers(0, len(full)), st.integers(1, 8)).map(lambda span: full[span[0] : sum(span)])
    stops = data.draw(st.lists(st.one_of(spans, st.text("the é世🙂", max_size=3)).filter(bool), max_size=3))
    assert run(decoding, split(ids, cuts), stops) == naive(backend, ids, stops)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=CUTS)
def test_text_and_stop_of_random_tokens(
    backend: tokenizers.Tokenizer, decoding: Decoding, data: st.DataObject, cuts: list[int]
) -> None:
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 2), max_size=30))
    full = backend.decode(ids)
    stops = data.draw(st.lists(st.sampled_from([full[i : i + 3] for i in range(len(full))] or ["x"]), max_size=2))
    assert run(decoding, split(ids, cuts), stops)[:2] == naive(backend, ids, stops)[:2]
    one_by_one = run(decoding, [[token] for token in ids], stops)
    assert run(decoding, split(ids, cuts), stops) == one_by_one


@pytest.fixture(scope="module")
def gemma_like() -> tokenizers.Tokenizer:
    return BACKENDS["byte fallback"]()


def test_tokens_past_the_stop_are_not_counted(gemma_like: tokenizers.Tokenizer) -> None:
    ids = gemma_like.encode("a 🙂.b", add_special_tokens=False).ids
    pieces = [gemma_like.id_to_token(token) for token in ids]
    assert pieces == ["a", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", ".", "b"]
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings([".b"]))
    deltas = [answer.add([token]) for token in ids]
    assert [delta.text for delta in deltas] == ["a", " ", "", "", "", "", "🙂", ""]
    assert [delta.tokens for delta in deltas] == [1, 1, 0, 0, 0, 0, 4, 0]
    assert deltas[-1].stopped
    assert answer.completion_tokens == 6
    assert answer.finish().text == ""


def test_a_token_cut_by_the_stop_counts(gemma_like: tokenizers.Tokenizer) -> None:
    ids = gemma_like.encode("a the", add_special_tokens=False).ids
    assert [gemma_like.id_to_token(token) for token in ids] == ["a", "▁the"]
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings(["he"]))
    assert answer.add(ids).text == "a t"
    assert answer.completion_tokens == 2


def test_special_tokens_before_the_stop_are_not_counted_as_text(gemma_like: tokenizers.Tokenizer) -> None:
    a, dot, special = (id_of(gemma_like, piece) for piece in ("a", ".", "<start_of_turn>"))
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings(["."]))
    assert answer.add([special, a, special, dot, a]).text == "a"
    assert (answer.stopped, answer.completion_tokens) == (True, 2)


def test_without_a_stop_every_token_counts(gemma_like: tokenizers.Tokenizer) -> None:
    a, special = id_of(gemma_like, "a"), id_of(gemma_like, "<start_of_turn>")
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings([]))
    assert answer.add([a, special, a, special]).tokens == 3
    assert answer.finish().tokens == 1
    assert answer.completion_tokens == 4


def test_a_stop_inside_text_held_to_the_end_still_stops(gemma_like: tokenizers.Tokenizer) -> None:
    byte_a, byte_dot = (id_of(gemma_like, piece) for piece in ("<0x41>", "<0x2E>"))
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings(["."]))
    assert answer.add([byte_a, byte_dot, byte_a]).text == ""
    last = answer.finish()
    assert (last.text, last.stopped, last.tokens, answer.completion_tokens) == ("A", True, 1, 1)


def test_a_stop_at_the_very_beginning_leaves_nothing(gemma_like: tokenizers.Tokenizer) -> None:
    answer = Answer(decoding_of(gemma_like).detokenizer(), StopStrings(["the"]))
    assert answer.add(gemma_like.encode("the", add_special_tokens=False).ids).stopped
    assert answer.completion_tokens == 0


def test_refuses_an_empty_stop(gemma_like: tokenizers.Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty"):
        Answer(decoding_of(gemma_like).detokenizer(), StopStrings([""]))
