"""The probe finds models that break slots' assumptions, and the canary finds copies of the arena."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from engine_driver import Driver, assert_same_or_tied, reference, request
from tiny_models import CONFIGS, SLOT_KINDS, SOLO_KINDS, VOCAB, save

from millpond.kv.format import AS_COMPUTED
from millpond.kv.slots import KvSlot
from millpond.model.load import LoadedModel, kept_as, load
from millpond.model.probe import donates, probe


@cache
def model(kind: str) -> LoadedModel:
    return load(save(kind, Path(mkdtemp())), 0, lambda fraction: None)


class Altered:
    """A network that does something of its own before or after each forward."""

    def __init__(self, network: object) -> None:
        self._network = network
        self.kept: list[mx.array] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: list[object]) -> mx.array:
        logits: mx.array = self._network(tokens, cache=cache)  # type: ignore[operator]
        return self.alter(logits, cache)

    def alter(self, logits: mx.array, cache: list[object]) -> mx.array:
        raise AssertionError("each case has its own")


class NeedsIntegerOffset(Altered):
    def alter(self, logits: mx.array, cache: list[object]) -> mx.array:
        if not isinstance(cache[0].offset, int):  # type: ignore[attr-defined]
            raise TypeError("offset must be an int")
        return logits


class DependsOnNeighbours(Altered):
    def alter(self, logits: mx.array, cache: list[object]) -> mx.array:
        return logits + 0.1 * mx.roll(logits, 1, axis=0) if logits.shape[0] > 1 else logits * 1.1


class KeepsReferences(Altered):
    def alter(self, logits: mx.array, cache: list[object]) -> mx.array:
        if isinstance(cache[0], KvSlot):
            self.kept += [layer.sides()[0][0][0] for layer in cache]  # type: ignore[attr-defined]
        return logits


@pytest.mark.parametrize("kind", SLOT_KINDS)
def test_plain_window_and_latent_caches_use_slots(kind: str) -> None:
    found = probe(model(kind))
    assert (found.slots, found.reason, found.pipelined) == (True, "", True)


@pytest.mark.parametrize("kind", SOLO_KINDS)
def test_recurrent_caches_use_the_solo_lane_and_say_why(kind: str) -> None:
    found = probe(model(kind))
    assert not found.slots
    assert re.match(r"layer \d+( and \d+ more)?: a recurrent state, which slots cannot hold", found.reason)


@pytest.mark.parametrize(("case", "word"), [(NeedsIntegerOffset, "offset must be"), (DependsOnNeighbours, "differ")])
def test_a_model_that_breaks_an_assumption_runs_solo_and_right(case: type[Altered], word: str) -> None:
    broken = dataclasses.replace(model("llama"), network=case(model("llama").network))  # type: ignore[arg-type]
    found = probe(broken)
    assert not found.slots
    assert word in found.reason
    driven = Driver(broken, capabilities=found)
    prompts = {f"r{index}": [(index * 7 + place) % VOCAB for place in range(20 + index)] for index in range(3)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, 12))
    driven.run()
    for name, tokens in prompts.items():
        expected = reference(broken.network, tokens, 12)
        assert_same_or_tied(broken.network, tokens, driven.outcomes[name].tokens, expected)


def test_the_canary_finds_a_kept_reference() -> None:
    plain = kept_as(model("llama"), AS_COMPUTED)
    keeping = dataclasses.replace(plain, network=KeepsReferences(plain.network))  # type: ignore[arg-type]
    found = probe(keeping)
    assert found.slots
    assert not found.pipelined


class CopiesHalfALayer(Altered):
    def alter(self, logits: mx.array, cache: list[object]) -> mx.array:
        if isinstance(cache[0], KvSlot):
            return logits + 0 * (cache[0].arrays[0] + 1).min()  # all keys of one layer: half of what that has
        return logits


def test_the_canary_finds_a_copy_of_half_a_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever copies a part of one layer in a step does so in all steps: they are not worth launching ahead."""
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "max_position_embeddings": 1 << 15})
    plain = kept_as(load(save("llama", tmp_path), 0, lambda _: None), AS_COMPUTED)
    copying = dataclasses.replace(plain, network=CopiesHalfALayer(plain.network))  # type: ignore[arg-type]
    assert donates(plain)
    assert not donates(copying)
