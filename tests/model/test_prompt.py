"""A prompt that is being read: each position is packed once, and what it hands out equals the whole, packed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import VOCAB, build

from millpond.kv.arena import Arena
from millpond.kv.format import AS_COMPUTED, Arrays, KvFormat
from millpond.model.forwards import prefill
from millpond.model.leaves import leaf_specs, leaves_of, rounded
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.upstream import cache_bytes
from millpond.native.decode import available
from millpond.prefix.records import Kind
from millpond.types import KvPacking

KINDS = ["wide_llama", "wide_gemma3_text"]
WINDOW = 80
LENGTH = 300
CHUNKS = {
    "one chunk": [LENGTH],
    "equal chunks": [64, 64, 64, 64, 44],
    "ragged chunks": [3, 100, 1, 1, 90, 2, 81, 1, 21],
    "a window each": [WINDOW, WINDOW, WINDOW, 60],
    "token by token at the end": [280, *[1] * 20],
}


@dataclass(frozen=True)
class Counted(KvFormat):
    """Notes what it is given to pack."""

    given: list[tuple[mx.array, mx.array]] = field(default_factory=list, compare=False)

    def pack(self, keys: mx.array, values: mx.array) -> Arrays:
        self.given.append((keys, values))
        return super().pack(keys, values)


@cache
def network(kind: str) -> nn.Module:
    return build(kind)


def tokens_of(length: int) -> list[int]:
    found: list[int] = np.random.default_rng(0).integers(0, VOCAB, length).tolist()
    return found


def form_of(bits: int = 8, start: int = 0, *, native: bool | None = None) -> Counted:
    packing = KvPacking(bits=bits, group_size=32, start=start)
    return Counted(packing, native=available() if native is None else native)


def read(kind: str, form: KvFormat, chunks: list[int]) -> Prompt:
    prompt, tokens = new_prompt(network(kind), form), tokens_of(sum(chunks))
    for chunk in chunks:
        prefill(network(kind), prompt, tokens[prompt.length : prompt.length + chunk])
    assert prompt.length == sum(chunks)
    return prompt


def numbers(array: mx.array) -> npt.NDArray[np.generic]:
    found: npt.NDArray[np.generic] = np.array(array)
    return found


def assert_same(ours: Arrays, expected: Arrays) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(numbers(one), numbers(other))


@pytest.mark.parametrize("start", [0, 64])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_position_is_packed_once(kind: str, chunks: str, start: int) -> None:
    form = form_of(start=start)
    prompt = new_prompt(network(kind), form)
    tokens, packed = tokens_of(LENGTH), [0] * len(prompt.caches)
    for chunk in CHUNKS[chunks]:
        before = len(form.given)
        begin, end = prompt.length, prompt.length + chunk
        prefill(network(kind), prompt, tokens[begin:end])
        given = iter(form.given[before:])
        for layer, leaf in enumerate(prompt.leaves):
            window = leaf.window
            first = begin if window else max(begin, start)
            if first < end:
                for ours, expected in zip(next(given), leaf.span(first, end), strict=True):
                    assert np.array_equal(numbers(ours), numbers(expected))
                packed[layer] += end - first
        assert next(given, None) is None
    for layer, leaf in enumerate(prompt.leaves):
        assert packed[layer] == LENGTH - (0 if leaf.window else start)
    given_before = len(form.given)
    for begin in range(64, LENGTH - WINDOW, 50):
        prompt.spans(begin, begin + 50, Kind.KV)
    list(prompt.rows())
    assert len(form.given) == given_before, "asking for it packs nothing again"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_spans_equal_packing_the_whole(kind: str, chunks: str, bits: int, native: bool) -> None:
    if native and not available():
        pytest.skip("only where attention over slots is computed in C")
    form = form_of(bits, 64, native=native)
    prompt = read(kind, form, CHUNKS[chunks])
    for kept, ranges in (
        (Kind.KV, [(0, 64), (3, 40), (64, 128), (64, LENGTH), (100, 101), (126, 130), (190, 289), (299, 300)]),
        (Kind.WINDOW, [(220, 300), (221, 289), (255, 257), (299, 300)]),
    ):
        for start, end in ranges:
            for leaf, row in zip(prompt.leaves, prompt.spans(start, end, kept), strict=True):
                assert bool(row) == (leaf.kind is kept)
                if row:
                    exact = leaf.span(start, end)
                    assert_same(row, exact if end <= 64 and kept is Kind.KV else form.pack(*exact))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_what_has_left_the_window_is_dropped(chunks: str) -> None:
    """What tokens of the last chunk could see is there, and no more than the pieces in which it is."""
    form = form_of()
    prompt, tokens = new_prompt(network(KINDS[1]), form), tokens_of(LENGTH)
    for chunk in CHUNKS[chunks]:
        begin, end = prompt.length, prompt.length + chunk
        prefill(network(KINDS[1]), prompt, tokens[begin:end])
        seen, firsts = max(0, begin + 1 - WINDOW), set()
        for leaf, pieces in zip(prompt.leaves, prompt.pieces, strict=True):
            if leaf.window:
                assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
                assert pieces[0].start <= seen <= pieces[0].end
                assert pieces[-1].end == end
                assert all(piece.arrays[0].shape[2] == piece.end - piece.start for piece in pieces)
                firsts.add(pieces[0].start)
        for leaf, row in zip(prompt.leaves, prompt.spans(seen, end, Kind.WINDOW), strict=True):
            if row and end - begin > 1:  # the cache's own ring has moved on after a single token
                assert_same(row, form.pack(*leaf.span(seen, end)))
        (first,) = firsts
        if first:
            with pytest.raises(ValueError, match=f"position {first - 1} has left the window"):
                prompt.spans(first - 1, end, Kind.WINDOW)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("start", [0, 64, 1024])
@pytest.mark.parametrize("length", [1, 40, 64, 65, 130, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_adopts_what_packing_the_whole_would_give(kind: str, length: int, start: int, first: bool) -> None:
    form = form_of(start=start)
    prompt = read(kind, form, [length // 2, length - length // 2])
    leaves, arena = leaves_of(copy.deepcopy(prompt.caches)), Arena(leaf_specs(prompt.caches, form))
    if not first:
        arena.put("first", (), 0)
    row = arena.put("row", prompt.rows(), length)
    for leaf, slot in zip(leaves, arena.slots, strict=True):
        window = leaf.window
        border = max(0, length - window) if window else min(start, length)
        if border < length:
            assert_same(slot.span(row, border, length, length), form.pack(*leaf.span(border, length)))
        if border and not window:
            assert_same(slot.span(row, 0, border, length), leaf.span(0, border))


def test_rows_drop_each_layer_once_it_is_copied() -> None:
    prompt = read(KINDS[1], form_of(start=64), CHUNKS["equal chunks"])
    for layer, _ in enumerate(prompt.rows()):
        assert [bool(pieces) for pieces in prompt.pieces] == [place >= layer for place in range(len(prompt.pieces))]
        assert cache_bytes(prompt.caches[:layer]) == 0 < cache_bytes(prompt.caches[layer:])
    assert prompt.nbytes == 0


def test_its_bytes_are_those_of_both() -> None:
    prompt, plain = (read(KINDS[0], form, [100, 50]) for form in (form_of(), AS_COMPUTED))
    assert plain.nbytes == cache_bytes(plain.caches) > 0
    assert prompt.nbytes == plain.nbytes + 150 * sum(
        spec.token_bytes for spec in leaf_specs(prompt.caches, prompt.form)
    )


@pytest.mark.parametrize("start", [0, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_caches_hold_what_the_pieces_unpack_to(kind: str, start: int) -> None:
    """The reference that the probe compares slots with must be off by the same rounding."""
    form = form_of(start=start)
    prompt = read(kind, form, [90, 200])
    before = [leaf.span(0, min(start, 290)) if not leaf.window else () for leaf in prompt.leaves]
    exact = [tuple(numbers(array) for array in arrays) for arrays in before]
    packed = [prompt.spans(max(start, 210), 290, kept) for kept in (Kind.KV, Kind.WINDOW)]
    for leaf, own, *rows in zip(rounded(prompt.caches, form), exact, *packed, strict=True):
        (row,) = filter(None, rows)
        held = leaf._leaf.span(max(start, 210), 290)
        assert_same(held, form.unpack(row))
        for ours, expected in zip(leaf._leaf.span(0, start) if own else (), own, strict=True):
            assert np.array_equal(numbers(ours), expected)


def test_nothing_is_packed_that_need_not_be() -> None:
    prompt = read(KINDS[1], AS_COMPUTED, [100, 50])
    assert prompt.pieces == []
    for kept in (Kind.KV, Kind.WINDOW):
        for leaf, row in zip(prompt.leaves, prompt.spans(100, 150, kept), strict=True):
            if row:
                assert_same(row, leaf.span(100, 150))
