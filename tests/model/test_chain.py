"""Layers whose step is one job, and what may come between them (R4)."""

from __future__ import annotations

import pytest

from millpond.native import layer, products

if not products.available():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import mlx.core as mx
import tiny_models
from layered_models import model

from millpond.model.forwards import decode, prefill
from millpond.model.lanes import SlotsLane
from millpond.model.layers import Known
from millpond.model.load import LoadedModel
from millpond.model.prompt import new_prompt

CLOSE = 2e-3
"""Of the spread of logits."""


def filled(found: LoadedModel) -> SlotsLane:
    lane = found.slots_lane()
    for row, length in enumerate((30, 5)):
        prompt = new_prompt(found.network, found.form)
        prefill(found.network, prompt, tiny_models.prompt(length, seed=row))
        lane.adopt(str(row), prompt)
    return lane


def stepped(found: LoadedModel, lane: SlotsLane, token: int = 7) -> mx.array:
    logits = decode(found.network, lane, mx.array([token, token + 1]))
    mx.eval(logits)
    return logits


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each job."""
    found: list[int] = []
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda told, x: found.append(len(told)) or run(told, x))
    return found


def test_what_a_forward_that_failed_has_left_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama", "4 bits")
    expected = stepped(found, filled(found))
    told = Known.told
    failing = found.network.layers[2]._known

    def fail(known: Known, *asked: object) -> bytes:
        if known is failing:
            raise MemoryError
        return told(known, *asked)  # type: ignore[arg-type]

    for after in ("a step", "a prompt"):
        with monkeypatch.context() as patch:
            patch.setattr(Known, "told", fail)
            with pytest.raises(MemoryError):
                stepped(found, filled(found))
        lane = filled(found) if after == "a prompt" else None
        assert mx.array_equal(stepped(found, lane or filled(found)), expected)


def test_what_does_not_fit_into_one_job_is_two(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama", "4 bits")
    expected = stepped(found, filled(found))
    monkeypatch.setattr(layer, "fits", lambda _hidden, parts, _nbytes: parts <= 3)
    ran.clear()
    assert mx.array_equal(stepped(found, filled(found)), expected)
    assert ran == [3, 1]


@pytest.mark.parametrize(("others", "jobs"), [((0,), [3]), ((1,), [1, 2]), ((3,), [3]), ((1, 2), [1, 1])])
def test_layers_that_mlx_computes_in_between(
    others: tuple[int, ...], jobs: list[int], ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = model("llama", "4 bits")
    takes, not_taken = Known.takes, [found.network.layers[place]._known for place in others]
    expected = stepped(found, filled(found))
    monkeypatch.setattr(Known, "takes", lambda known, *asked: known not in not_taken and takes(known, *asked))
    ran.clear()
    logits = stepped(found, filled(found))
    assert ran == jobs
    assert float(mx.abs(logits - expected).max().item()) < CLOSE * float((expected.max() - expected.min()).item())


def test_nothing_is_done_in_between() -> None:
    """A model that changes what a layer has made, or leaves one out, is not one of those that are known."""
    found = model("llama", "4 bits")
    first, second, third, _ = found.network.layers
    slots = filled(found).begin(1)
    x = mx.random.normal((2, 1, 128))
    assert first(x, None, slots[0]) is x, "it waits for the others"
    with pytest.raises(RuntimeError, match="layer 1 is not given what comes into layer 1"):
        second(x + 0, None, slots[1])
    first(x, None, slots[0])
    with pytest.raises(RuntimeError, match="layer 2 is not given what comes into layer 1"):
        third(x, None, slots[2])
