"""Deltas against decoding everything at once, on every kind of decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BACKENDS, CORPUS, id_of

from millpond.text.decoding import (
    ByteFallbackDecoding,
    ByteLevelDecoding,
    Decoding,
    PieceDecoding,
    WholeDecoding,
    decoding_of,
)
from millpond.text.detokenize import ByteLevelDetokenizer


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    made: Callable[[], tokenizers.Tokenizer] = BACKENDS[request.param]
    return made()


@pytest.fixture(scope="module")
def decoding(backend: tokenizers.Tokenizer) -> Decoding:
    return decoding_of(backend)


def any_ids(backend: tokenizers.Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids over the whole vocabulary and a bit beyond, mixed with the ids of real text and with runs of lone bytes."""
    size = backend.get_vocab_size()
    some_bytes = [i for i in range(size) if len(backend.id_to_token(i) or "") in (1, 6)] or [0]
    chunk = st.one_of(
        st.lists(st.integers(0, size + 3), max_size=8),
        st.lists(st.sampled_from(some_bytes), max_size=8),
        st.text(max_size=8).map(lambda text: backend.encode(text, add_special_tokens=False).ids),
        st.sampled_from(CORPUS).map(lambda text: backend.encode(text).ids),
    )
    return st.lists(chunk, max_size=6).map(lambda parts: [token for part in parts for token in part])


def check(decoding: Decoding, backend: tokenizers.Tokenizer, ids: list[int]) -> None:
    full = backend.decode(ids, skip_special_tokens=True)
    detokenizer = decoding.detokenizer()
    text, lengths = "", []
    for fed, token in enumerate(ids, start=1):
        text += detokenizer.add(token)
        lengths.append(len(text))
        assert full.startswith(text)
        assert len(detokenizer.ends) <= fed
    text += detokenizer.finish()
    ends = list(detokenizer.ends)
    assert text == full
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(full)
    if not isinstance(decoding, WholeDecoding):
        # A token's text may be certain only later, never earlier than it says.
        assert all(length <= end for length, end in zip(lengths, ends, strict=True))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_full_decoding(
    backend: tokenizers.Tokenizer, decoding: Decoding, data: st.DataObject
) -> None:
    check(decoding, backend, data.draw(any_ids(backend)))


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40))
def test_no_delta_ends_inside_a_character(backend: tokenizers.Tokenizer, decoding: Decoding, text: str) -> None:
    """Text without U+FFFD comes without it, at every point."""
    ids = backend.encode(text, add_special_tokens=False).ids
    full = backend.decode(ids)
    detokenizer = decoding.detokenizer()
    deltas = [detokenizer.add(token) for token in ids] + [detokenizer.finish()]
    assert "".join(deltas) == full
    assert ("\ufffd" in "".join(deltas)) == ("\ufffd" in full)


@settings(max_examples=60, deadline=None)
@given(text=st.text("aé世🙂 \n<", max_size=12))
def test_ends_tell_which_tokens_make_up_a_text(backend: tokenizers.Tokenizer, decoding: Decoding, text: str) -> None:
    """For valid text: the fewest tokens whose own decoding begins with it."""
    if isinstance(decoding, WholeDecoding):
        return
    ids = backend.encode(text, add_special_tokens=False).ids
    full = backend.decode(ids)
    detokenizer = decoding.detokenizer()
    for token in ids:
        detokenizer.add(token)
    detokenizer.finish()
    heads = [backend.decode(ids[:count]) for count in range(len(ids) + 1)]
    for length in range(1, len(full) + 1):
        fewest = next(count for count, head in enumerate(heads) if head.startswith(full[:length]))
        assert next(i for i, end in enumerate(detokenizer.ends, start=1) if end >= length) == fewest


def test_invalid_bytes_belong_to_the_token_that_brought_them(byte_level: tokenizers.Tokenizer) -> None:
    alphabet = {decoding_of(byte_level).token_bytes(i): i for i in range(byte_level.get_vocab_size())}
    detokenizer = decoding_of(byte_level).detokenizer()
    special = id_of(byte_level, "<|im_end|>")
    ids = [alphabet[b"\xf0"], alphabet[b"\x9f"], special, alphabet[b"a"], alphabet[b"\xe4"]]
    assert [detokenizer.add(token) for token in ids] == ["", "", "", "\ufffda", ""]
    assert detokenizer.ends == [0, 1, 1, 2]
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.ends == [0, 1, 1, 2, 3]


def test_byte_level_emits_each_character_when_it_is_complete(byte_level: tokenizers.Tokenizer) -> None:
    alphabet = {decoding_of(byte_level).token_bytes(i): i for i in range(byte_level.get_vocab_size())}
    detokenizer = decoding_of(byte_level).detokenizer()
    assert [detokenizer.add(alphabet[bytes([byte])]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    "pair", [b"\xed\xa0", b"\xf4\x90", b"\xc0\x80", b"\xe0\x80", b"\xf5\x80", b"\xef\xbf", b"\xe4\xb8"]
)
def test_replacement_of_broken_sequences_agrees_with_the_decoder(byte_level: tokenizers.Tokenizer, pair: bytes) -> None:
    alphabet = {decoding_of(byte_level).token_bytes(i): i for i in range(byte_level.get_vocab_size())}
    for third in range(256):
        check(decoding_of(byte_level), byte_level, [alphabet[bytes([byte])] for byte in (*pair, third, 0x41)])


def test_the_bytes_of_tokens_make_up_the_text(backend: tokenizers.Tokenizer, decoding: Decoding) -> None:
    if isinstance(decoding, WholeDecoding):
        return
    ids = backend.encode("the dog 世界", add_special_tokens=False).ids
    text = b"".join(decoding.token_bytes(token) for token in ids).decode()
    assert text.strip() == backend.decode(ids, skip_special_tokens=False).strip()


def test_bytes_of_special_and_unknown_tokens(byte_level: tokenizers.Tokenizer) -> None:
    decoding = decoding_of(byte_level)
    assert decoding.token_bytes(id_of(byte_level, "<|im_end|>")) == b"<|im_end|>"
    assert decoding.token_bytes(byte_level.get_vocab_size() + 5) == b""
    assert decoding.token_bytes(id_of(byte_level, "two words")) == b"two words"


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    return BACKENDS["byte level"]()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("byte level", ByteLevelDecoding),
        ("byte fallback", ByteFallbackDecoding),
        ("byte fallback, stripped", ByteFallbackDecoding),
        ("metaspace", PieceDecoding),
        ("word piece", PieceDecoding),
        ("no decoder", PieceDecoding),
        ("unfamiliar", WholeDecoding),
    ],
)
def test_each_decoder_is_recognised(name: str, kind: type[Decoding]) -> None:
    assert type(decoding_of(BACKENDS[name]())) is kind


def test_a_character_continued_by_several_bytes_ends_with_its_last_token() -> None:
    """Three tokens, each of which but the last opens a character that the next completes with one or two bytes."""
    pieces = [b"\xf0\x9f\x99\x82\xf0\x9f\x99", b"\x83\xf0\x9f", b"\x8e\x89"]
    detokenizer = ByteLevelDetokenizer(pieces.__getitem__)
    assert [detokenizer.add(token) for token in range(3)] == ["🙂", "🙃", "🎉"]
    assert list(detokenizer.ends) == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("rest", [b"", b"\x80", b"a", b"\xed\xa1"])
def test_half_a_surrogate_is_two_broken_characters(rest: bytes, cut: int) -> None:
    data = b"\xed\xa1" + rest
    pieces = [data[:cut], data[cut:]]
    detokenizer = ByteLevelDetokenizer(lambda token: pieces[token])
    text = detokenizer.add(0) + detokenizer.add(1) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace")
    assert detokenizer.ends[-1] == len(text)
