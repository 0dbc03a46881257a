"""Layers that C computes as a whole beside mlx-lm's own (R4)."""

from __future__ import annotations

import pytest

from millpond.native import layer, products

if not products.available():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import tiny_models
from layered_models import KINDS, WEIGHTS, model

from millpond.model import layers
from millpond.model.forwards import decode, prefill
from millpond.model.lanes import SlotsLane
from millpond.model.layers import Known, OwnBlock
from millpond.model.load import LoadedModel
from millpond.model.prompt import new_prompt
from millpond.model.rotary import share_angles
from millpond.types import UNPACKED, KvPacking

ROWS = (3, 40, 1, 70)
"""Tokens of each, before the first step; those of the windows are fewer than some."""
CLOSE, CLOSE_WHEN_PACKED = 2e-3, 2e-2
"""Of the spread of logits: sums in another order, and then keys and values that are rounded to another step."""


def filled(found: LoadedModel, rows: tuple[int, ...] = ROWS) -> SlotsLane:
    lane = found.slots_lane()
    for row, length in enumerate(rows):
        prompt = new_prompt(found.network, found.form)
        prefill(found.network, prompt, tiny_models.prompt(length, seed=row))
        lane.adopt(str(row), prompt)
    return lane


def story(found: LoadedModel, rows: tuple[int, ...] = ROWS) -> list[mx.array]:
    """Logits of steps of one column and of several, of which some are kept in part."""
    lane, seen = filled(found, rows), []
    for number, columns in enumerate([1, 1, 3, 1, 4, 1]):
        tokens = mx.array([tiny_models.prompt(columns, seed=10 * row + number) for row in range(len(rows))])
        logits = lane.forward(found.network, tokens)
        mx.eval(logits, lane.arrays())
        lane.advance([1 + (row + number) % columns for row in range(len(rows))])
        seen.append(logits)
    return seen


def blocks(found: LoadedModel) -> list[nn.Module]:
    return [module for module in found.network.modules() if isinstance(module, OwnBlock)]


@pytest.mark.parametrize("packing", [UNPACKED, KvPacking(bits=8), KvPacking(bits=4, rotated=True)], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_mlx_lms(kind: str, weights: str, packing: KvPacking, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model(kind, weights, packing)
    assert len(blocks(found)) == tiny_models.config_of(KINDS[kind][0])["num_hidden_layers"]
    ran: list[int] = []
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda told, x: ran.append(len(told)) or run(told, x))
    ours = story(found)
    assert ran == [len(blocks(found))] * 6, "else nothing was compared"
    monkeypatch.setattr(Known, "takes", lambda *_: False)
    for one, other in zip(ours, story(found), strict=True):
        close = CLOSE_WHEN_PACKED if packing.bits else CLOSE
        assert float(mx.abs(one - other).max().item()) < close * float((other.max() - other.min()).item())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_same_bits(kind: str, weights: str) -> None:
    found = model(kind, weights)
    assert found.form.native
    assert len(blocks(found)) == len(found.network.layers)
    together = step(found, filled(found), [5, 6, 7, 8])
    for row, length in enumerate(ROWS):
        lane = found.slots_lane()
        prompt = new_prompt(found.network, found.form)
        prefill(found.network, prompt, tiny_models.prompt(length, seed=row))
        lane.adopt("alone", prompt)
        assert mx.array_equal(step(found, lane, [5 + row])[0], together[row])


def step(found: LoadedModel, lane: SlotsLane, tokens: list[int]) -> mx.array:
    """Evaluated: C reads and writes the lane's slots when that is done."""
    logits = decode(found.network, lane, mx.array(tokens))
    mx.eval(logits)
    return logits


def test_rows_outgrow_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rotations, which are made anew then."""
    monkeypatch.setattr(layers, "LEAST_POSITIONS", 16)
    found = model("llama", "4 bits")
    ours = story(found, (9, 60))
    monkeypatch.setattr(Known, "takes", lambda *_: False)
    for one, other in zip(ours, story(found, (9, 60)), strict=True):
        assert float(mx.abs(one - other).max().item()) < CLOSE * float((other.max() - other.min()).item())


def test_many_rows_need_a_larger_matrix() -> None:
    """Their lengths have to fit in it."""
    found = model("llama", "4 bits")
    rows = tuple([2] * 400)
    many, few = (step(found, filled(found, some), [7] * len(some)) for some in (rows, rows[:3]))
    assert mx.array_equal(many[:3], few)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: setattr(block.self_attn, "q_proj", nn.Sequential(block.self_attn.q_proj)),
        lambda block: setattr(block.self_attn, "rope", nn.RoPE(64, traditional=True)),
        lambda block: setattr(block.mlp, "up_proj", nn.Identity()),
        lambda block: delattr(block, "input_layernorm"),
    ],
)
def test_what_is_not_quite_known_stays_mlx_lms(spoil: Callable[[nn.Module], None]) -> None:
    network = tiny_models.build("llama")
    share_angles(network)
    spoil(network.layers[1])
    layers.install(network)
    assert [isinstance(block, OwnBlock) for block in network.layers] == [True, False, True, True]


def test_weights_are_held_once() -> None:
    """Those of fused layers too, of which C is told parts; and after steps."""
    found = model("phi3", "4 bits")
    lane = filled(found)
    mx.eval(lane.arrays())
    before = mx.get_active_memory()
    step(found, lane, [5, 6, 7, 8])
    assert mx.get_active_memory() - before < 0.2 * found.weight_bytes + layers.LEAST_POSITIONS * 4 * 64
