"""Prompts that layers in C read, beside mlx-lm's own; and that nobody's arrays change under them (R4)."""

from __future__ import annotations

import pytest

from millpond.native import layer, products

if not products.available():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from layered_models import KINDS, WEIGHTS, model

from millpond.kv.format import KvFormat
from millpond.model.forwards import prefill, prefill_together
from millpond.model.layers import LEAST_POSITIONS, Known
from millpond.model.load import LoadedModel
from millpond.model.probe import probe
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.upstream import KVCache, cache_arrays, new_cache
from millpond.native.layer import GELU
from millpond.native.products import address

Floats = npt.NDArray[np.float32]
PLAIN = KvFormat(native=True)
CLOSE = 2e-3
"""Of the spread of numbers."""
TOKENS = tiny_models.prompt(200, seed=3)


def read(found: LoadedModel, pieces: Sequence[int], tokens: Sequence[int] = TOKENS) -> Prompt:
    prompt, start = new_prompt(found.network, PLAIN), 0
    for count in pieces:
        prefill(found.network, prompt, tokens[start : start + count])
        start += count
    return prompt


def held(prompt: Prompt) -> list[Floats]:
    """Keys and values of all positions."""
    length = prompt.length
    return [np.array(array) for leaf in prompt.leaves for array in leaf.span(leaf.oldest(length), length)]


def equal(some: Sequence[Floats | mx.array], others: Sequence[Floats]) -> bool:
    return all(np.array_equal(np.array(one), other) for one, other in zip(some, others, strict=True))


def same(one: Prompt, other: Prompt) -> bool:
    return equal(held(one), held(other))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each layer that C read was asked for."""
    found: list[int] = []
    reading = layer.read
    monkeypatch.setattr(layer, "read", lambda told, into, *rest: found.append(len(into)) or reading(told, into, *rest))
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_mlx_lms(kind: str, weights: str, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with windows are mlx-lm's anyway."""
    found = model(kind, weights)
    wide = sum(type(leaf.cache) is KVCache for leaf in new_prompt(found.network, PLAIN).leaves)
    ran.clear()
    ours = held(read(found, (64, 64, 30, 1, 2)))
    assert ran == [1] * (5 * wide)
    monkeypatch.setattr(Known, "reads", lambda *_: False)
    for one, other in zip(ours, held(read(found, (64, 64, 30, 1, 2))), strict=True):
        assert np.abs(one - other).max() < CLOSE * (other.max() - other.min())


def test_prompts_outgrow_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tokens = model("llama", "float32"), tiny_models.prompt(2 * LEAST_POSITIONS + 40, seed=3)
    pieces = (LEAST_POSITIONS - 20, LEAST_POSITIONS, 50)
    ours = held(read(found, pieces, tokens))
    monkeypatch.setattr(Known, "reads", lambda *_: False)
    for one, other in zip(ours, held(read(found, pieces, tokens)), strict=True):
        assert np.abs(one - other).max() < CLOSE * (other.max() - other.min())


@pytest.mark.parametrize("weights", WEIGHTS)
@given(pieces=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_chunks_do_not_matter(weights: str, pieces: list[int]) -> None:
    """Wherever they end: of nobody do sums depend on others."""
    found, tokens = model("llama", weights), tiny_models.prompt(sum(pieces), seed=3)
    assert same(read(found, pieces, tokens), read(found, (sum(pieces),), tokens))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_prompts_together_are_those_alone(weights: str, ran: list[int]) -> None:
    found = model("llama", weights)
    ran.clear()
    lengths, more = (70, 33, 5), (40, 2, 64)
    prompts = [new_prompt(found.network, PLAIN) for _ in lengths]
    tokens = [tiny_models.prompt(a + b, seed=a) for a, b in zip(lengths, more, strict=True)]
    prefill_together(found.network, prompts, [line[:length] for line, length in zip(tokens, lengths, strict=True)])
    prefill_together(found.network, prompts, [line[length:] for line, length in zip(tokens, lengths, strict=True)])
    assert set(ran) == {3}
    for prompt, line, length, count in zip(prompts, tokens, lengths, more, strict=True):
        assert same(prompt, read(found, (length, count), line))


def test_what_others_hold_does_not_change() -> None:
    """Copies of a cache, what was cut out of it, and what stood behind its end when it was cut short."""
    found = model("llama", "4 bits")
    first = read(found, (64, 10))
    before, cut = held(first), [leaf.span(20, 60) for leaf in first.leaves]
    second = Prompt([copy(cache) for cache in first.caches], PLAIN, first.length)
    prefill(found.network, first, TOKENS[74:120])
    ours, views = held(first), [leaf.span(74, 120) for leaf in first.leaves]
    mx.eval(views)
    prefill(found.network, second, TOKENS[100:130])
    mx.eval(cache_arrays(second.caches))
    assert equal(held(first), ours)
    for cache in first.caches:
        cache.trim(46)
    first.length = 74
    prefill(found.network, first, TOKENS[100:130])
    assert same(first, read(found, (64, 10, 30), [*TOKENS[:74], *TOKENS[100:130]]))
    assert equal([array for arrays in views for array in arrays], [one[:, :, 74:] for one in ours])
    assert equal([array for arrays in cut for array in arrays], [one[:, :, 20:60] for one in before])


def test_mlx_lm_may_go_on_with_a_cache_and_c_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where it once was, too."""
    found = model("llama", "4 bits")
    prompt = read(found, (100,))
    for cache in prompt.caches:
        cache.trim(10)
    prompt.length = 90
    with monkeypatch.context() as patch:
        patch.setattr(Known, "reads", lambda *_: False)
        prefill(found.network, prompt, TOKENS[150:160])
    theirs = held(prompt)
    prefill(found.network, prompt, TOKENS[160:170])
    assert equal([one[:, :, :100] for one in held(prompt)], theirs)


def test_what_mlx_lm_replaces_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama", "4 bits")
    prompt = read(found, (256,), tiny_models.prompt(256, seed=3))
    monkeypatch.setattr(Known, "reads", lambda *_: False)
    before = mx.get_active_memory()
    prefill(found.network, prompt, TOKENS[:10])
    assert mx.get_active_memory() - before < 0.75 * prompt.nbytes, "it has grown, and holds no more than that"


def test_what_the_probe_compares_with_is_mlx_lms(ran: list[int]) -> None:
    """Else both would be wrong together; and where it has found fault, prompts are mlx-lm's as well."""
    found = model("llama", "4 bits")
    ran.clear()
    for prompt in (Prompt(new_cache(found.network), PLAIN), new_prompt(found.network, KvFormat())):
        prefill(found.network, prompt, TOKENS[:20])
    assert not ran
    assert probe(found).native
    for block in found.network.layers:
        block._known._told_of = None
        block._known._parts = replace(block._known._parts, kind=GELU)
    told = probe(found)
    assert (told.native, told.slots) == (False, True)
    ran.clear()
    prefill(found.network, new_prompt(found.network, told.fitted(found).form), TOKENS[:20])
    assert not ran


def test_several_sequences_in_one_cache_are_mlx_lms(ran: list[int]) -> None:
    found = model("llama", "4 bits")
    ran.clear()
    caches = new_prompt(found.network, PLAIN).caches
    logits = found.network(mx.array([TOKENS[:18]] * 3), cache=caches)
    assert not ran
    assert mx.allclose(logits[0], logits[2], atol=1e-4)


def places(prompt: Prompt) -> list[int]:
    return [address(array) for leaf in prompt.leaves for array in (leaf.cache.keys, leaf.cache.values)]


def test_memory_is_taken_once() -> None:
    """For a prompt whose length is known, and behind a prefix that was put in with room for the rest."""
    found, tokens = model("llama", "4 bits"), tiny_models.prompt(300, seed=3)
    prompt = new_prompt(found.network, PLAIN, 300)
    prefill(found.network, prompt, tokens[:40])
    first = places(prompt)
    prefill(found.network, prompt, tokens[40:300])
    assert places(prompt) == first
    assert same(prompt, read(found, (300,), tokens))

    restored = new_prompt(found.network, PLAIN)
    for leaf, other in zip(restored.leaves, prompt.leaves, strict=True):
        leaf.put([mx.concatenate([side[:, :, :64], mx.zeros_like(side)], axis=2) for side in other.span(0, 100)], 64)
    restored.length = 64
    mx.eval(cache_arrays(restored.caches))
    first = places(restored)
    prefill(found.network, restored, tokens[64:150])
    assert places(restored) == first
    assert same(restored, read(found, (150,), tokens))


def test_nothing_need_be_waited_for() -> None:
    """Forwards may follow each other before the first has begun, and their caches go before the last has ended."""
    found, results = model("llama", "4 bits"), []
    expected = held(read(found, (64, 64, 10)))
    prompt = new_prompt(found.network, PLAIN)
    for start, end in ((0, 64), (64, 128), (128, 138)):
        results.append(found.network(mx.array([TOKENS[start:end]]), cache=prompt.caches))
    prompt.length = 138
    assert all(np.array_equal(one, other) for one, other in zip(held(prompt), expected, strict=True))
    others = []
    for _ in range(3):
        prompt = new_prompt(found.network, PLAIN, 4096)
        for start, end in ((0, 64), (64, 128), (128, 138)):
            logits = found.network(mx.array([TOKENS[start:end]]), cache=prompt.caches)
        others.append(logits)
    del prompt
    mx.async_eval(others)
    full = [mx.full((1, 1, 4096, 64), np.nan) for _ in range(20)]
    mx.eval(full)
    assert all(mx.array_equal(one, results[-1]) for one in others)


def test_what_mlx_lm_has_filled_is_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama", "4 bits")
    monkeypatch.setattr(Known, "reads", lambda *_: False)
    prompt = read(found, (100,))
    arrays = [array for leaf in prompt.leaves for array in (leaf.cache.keys, leaf.cache.values)]
    before = list(map(np.array, arrays))
    monkeypatch.undo()
    prefill(found.network, prompt, TOKENS[100:140])
    assert all(np.array_equal(np.array(one), other) for one, other in zip(arrays, before, strict=True))


def test_a_cleared_cache_holds_nothing() -> None:
    found = model("llama", "4 bits")
    prompt = read(found, (128,))
    before = mx.get_active_memory()
    bytes_of_it = sum(array.nbytes for array in held(prompt))
    for _ in prompt.rows():
        pass
    assert before - mx.get_active_memory() >= bytes_of_it
