"""The record file: what is written is read, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_support import NAMESPACE, OTHER, chain, head, payload_of

from millpond.prefix.disk import block_file
from millpond.prefix.disk.block_file import (
    ALIGNMENT,
    Damage,
    DamagedRecord,
    decode,
    decode_head,
    encode,
    file_bytes,
    layout,
)
from millpond.prefix.keys import root_key
from millpond.prefix.records import Kind, RecordHead

RECORD = chain(2)[1]
FILE = b"".join(encode(RECORD, NAMESPACE, payload_of(RECORD)))


def refusal(file: bytes, namespace: str = NAMESPACE, expected: RecordHead = RECORD) -> Damage:
    with pytest.raises(DamagedRecord) as caught:
        decode(memoryview(file), namespace, expected)
    assert str(caught.value)
    return caught.value.damage


@given(
    kind=st.sampled_from(Kind),
    size=st.integers(0, 3 * ALIGNMENT),
    tokens=st.integers(1, 64),
    start=st.integers(0, 1 << 30),
)
def test_round_trip(kind: Kind, size: int, tokens: int, start: int) -> None:
    record = head(root_key(NAMESPACE), start, kind=kind, size=size, tokens=tokens)
    payload = payload_of(record)
    pieces = encode(record, NAMESPACE, payload)
    assert pieces[1] is payload
    file = b"".join(pieces)
    assert len(file) == file_bytes(record, NAMESPACE)
    assert layout(file).payload_start % ALIGNMENT == 0
    found, content = decode(memoryview(file), NAMESPACE, record)
    assert found == record
    assert bytes(content) == payload
    assert decode_head(file[: layout(file).header_end], len(file)) == (NAMESPACE, record)


def test_a_payload_that_does_not_fit_its_head_is_refused() -> None:
    with pytest.raises(ValueError, match="payload"):
        encode(RECORD, NAMESPACE, b"short")


@given(offset=st.integers(0, len(FILE) - 1), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_every_flipped_bit_is_found(offset: int, bit: int) -> None:
    file = bytearray(FILE)
    file[offset] ^= 1 << bit
    refusal(bytes(file))


@pytest.mark.parametrize("region", ["magic", "version", "lengths", "header", "padding", "payload", "checksum"])
def test_a_flipped_byte_in_each_region_is_found(region: str) -> None:
    parts = layout(FILE)
    offsets = {
        "magic": 3,
        "version": 8,
        "lengths": 16,
        "header": block_file.PREFIX_BYTES + 5,
        "padding": parts.header_end + 1,
        "payload": parts.payload_start + 100,
        "checksum": parts.payload_end + 4,
    }
    file = bytearray(FILE)
    file[offsets[region]] ^= 0xFF
    expected = {"magic": Damage.MAGIC, "version": Damage.VERSION, "lengths": Damage.LENGTH}
    assert refusal(bytes(file)) == expected.get(region, Damage.CHECKSUM)


@given(length=st.integers(0, len(FILE) - 1))
def test_a_file_cut_off_at_any_length_is_found(length: int) -> None:
    assert refusal(FILE[:length]) == Damage.LENGTH
    with pytest.raises(DamagedRecord):
        decode_head(FILE[:length], length)


@given(start=st.integers(0, len(FILE) - 1))
def test_zeros_from_anywhere_to_the_end_are_found(start: int) -> None:
    refusal(FILE[:start].ljust(len(FILE), b"\0"))


def test_a_longer_file_is_found() -> None:
    assert refusal(FILE + b"\0") == Damage.LENGTH


@given(noise=st.binary(max_size=200))
def test_noise_is_no_record(noise: bytes) -> None:
    refusal(noise)
    refusal(FILE[: block_file.PREFIX_BYTES] + noise)


def test_a_foreign_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_file, "VERSION", 2)
    file = b"".join(encode(RECORD, NAMESPACE, payload_of(RECORD)))
    monkeypatch.undo()
    assert refusal(file) == Damage.VERSION


def test_what_is_not_the_record_asked_for_is_refused() -> None:
    first, second = chain(2)
    assert refusal(FILE, namespace=OTHER) == Damage.NAMESPACE
    assert refusal(FILE, expected=first) == Damage.KEY
    window = head(first.key, 64, kind=Kind.WINDOW)
    assert refusal(FILE, expected=window) == Damage.KEY
    for change in ({"parent": b"x" * 32}, {"start": 65}, {"tokens": first.tokens}):
        fields = {name: getattr(second, name) for name in RecordHead.__struct_fields__} | change
        assert refusal(FILE, expected=RecordHead(**fields)) == Damage.BLOCK


def test_a_key_that_does_not_follow_from_its_block_is_refused() -> None:
    fields = {name: getattr(RECORD, name) for name in RecordHead.__struct_fields__} | {"key": b"k" * 32}
    wrong = RecordHead(**fields)
    assert refusal(b"".join(encode(wrong, NAMESPACE, payload_of(RECORD))), expected=wrong) == Damage.CHAIN
