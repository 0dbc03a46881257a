"""The probe finds models that break slots' assumptions, and the canary finds copies of the arena."""

from __future__ import annotations

import dataclasses
import itertools
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from engine_driver import Driver, assert_same_or_tied, reference, request
from gpu_lane import as_on_a_gpu, rounding_by_rows, save_as
from slot_faults import FAULTS, Fault
from tiny_models import CONFIGS, HYBRID_KINDS, SLOT_KINDS, SOLO_KINDS, VOCAB, config_of, save

from millpond.kv.format import AS_COMPUTED
from millpond.kv.slots import KvSlot
from millpond.model.canary import donates
from millpond.model.layers import Known
from millpond.model.load import LoadedModel, kept_as, load
from millpond.model.probe import differences, probe


@cache
def model(kind: str) -> LoadedModel:
    return load(save(kind, Path(mkdtemp())), 0, lambda fraction: None)


def build_half(kind: str, folder: Path) -> Path:
    """A model whose weights, and so its activations, are in half precision."""
    save(kind, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    half = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "mlx"})
    return folder


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


@pytest.mark.parametrize("kind", HYBRID_KINDS)
def test_recurrent_layers_use_slots_and_can_be_taken_back(kind: str) -> None:
    found = probe(model(kind))
    assert (found.slots, found.reason, found.forward_only) == (True, "", "")
    assert (found.pipelined, found.together, found.uncached) == (True, False, "")


def test_recurrent_layers_that_nobody_can_take_back_are_not_guessed_for() -> None:
    found = probe(model("mamba"))
    assert (found.slots, found.reason) == (True, "")
    assert found.forward_only == "its recurrent layers cannot go back: nobody knows how a state came about"


@pytest.mark.parametrize("kind", SOLO_KINDS)
def test_where_no_state_is_not_a_state_of_zeros_rows_run_solo(kind: str) -> None:
    found = probe(model(kind))
    assert not found.slots
    assert re.match(r"logits differ from the single-sequence ones \(column 0 of 1, a prompt of 0\)", found.reason)


@pytest.mark.parametrize("kind", ["plamo3", "longcat_flash"])
def test_odd_ones_use_slots(kind: str) -> None:
    """One asks for a window that is wider than what its caches hold, one keeps two caches in each layer."""
    found = probe(model(kind))
    assert (found.slots, found.reason, found.forward_only) == (True, "", "")


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("llama", "q4"), ("llama", "bf16"), ("deepseek_v2", "q8"), ("gemma3_text", "bf16"), ("lfm2", "bf16")],
)
def test_kernels_that_round_by_rows_part_nobody(
    kind: str, stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU: a row's last bits depend on how many there are, in models that make much of last bits."""
    folder = save_as(kind, stored, tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    rounding_by_rows(monkeypatch)
    found = probe(load(folder, 0, lambda _done: None))
    assert (found.reason, found.forward_only, found.uncached) == ("", "", "")
    assert found.together == (kind != "lfm2")


RECURRENT = ("state", "convolution", "recurrence")
TOUCHED: dict[str, tuple[str, ...]] = {
    "llama": ("kv",),
    "deepseek_v2": ("kv",),
    "gemma3_text": ("kv", "window", "mask"),
    "lfm2": ("kv", "state", "convolution"),
    "mamba2": RECURRENT,
    **dict.fromkeys(("qwen3_5", "nemotron_h", "falcon_h1", "kimi_linear"), ("kv", *RECURRENT)),
}
IN_C = ("llama", "gemma3_text")
"""Of these, the ones whose attention C computes where that can be had, and whole layers."""
WAYS = ("mlx", "attention", "layers")
"""What C computes."""


def faulty_cases() -> list[object]:
    """Where whole layers are C's, positions are the rows' lengths: one cannot be wrong without the other."""
    cases: list[object] = []
    for (kind, touched), fault in itertools.product(TOUCHED.items(), FAULTS):
        if fault.touches in touched:
            ways = WAYS if kind in IN_C and fault.touches != "mask" else WAYS[:1]
            if fault.name == "all are placed where the longest is":
                ways = ways[:2]
            cases += [pytest.param(kind, fault, way, id=f"{kind}-{way}-{fault.name.replace(' ', '_')}") for way in ways]
    return cases


@pytest.mark.often("gemma3_text", "mamba2", "falcon_h1")
@pytest.mark.parametrize(("kind", "fault", "way"), faulty_cases())
def test_every_fault_is_noticed(kind: str, fault: Fault, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = kept_as(model(kind), AS_COMPUTED) if way == "mlx" else model(kind)
    if way == "attention":
        monkeypatch.setattr(Known, "takes", lambda *_: False)
    fault.patch(monkeypatch)
    reason, in_part = differences(healthy)
    assert reason or in_part


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize("kind", ["gemma3_text", "plamo3"])
def test_windows_that_no_prompt_of_a_start_fills(
    kind: str, more: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are tried in a model of the same weights whose windows are narrow."""
    name = "sliding_window" if kind == "gemma3_text" else "window_size"
    folder = save(kind, tmp_path, config={**config_of(kind), name: 4000, "max_position_embeddings": 8000})
    wide = load(folder, 0, lambda _: None)
    assert differences(wide) == ("", "")
    fault = next(one for one in FAULTS if one.name == f"a window is one too {'wide' if more > 0 else 'narrow'}")
    fault.patch(monkeypatch)
    assert differences(wide)[0]


def test_half_precision_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost in rounding is found, for it is tried in float32, too."""
    for name in ("load._on_a_cpu", "packed_linear.install", "layers.install"):
        monkeypatch.setattr(f"millpond.model.{name}", lambda network, *_: network)
    weights = build_half("falcon_h1", tmp_path)
    half = load(weights, 0, lambda _: None)
    assert half.dtype == "bfloat16"
    assert differences(half) == ("", "")
    fault = next(one for one in FAULTS if one.name == "keys stay where they were")
    fault.patch(monkeypatch)
    assert differences(half)[0]


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
