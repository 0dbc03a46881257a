"""Steps in flight write into the rows where they are: what MLX is handed decides whether the next step copies them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from engine_driver import request
from gpu_lane import as_on_a_gpu, in_half

from millpond.engine import inflight
from millpond.engine.inflight import InflightStep
from millpond.engine.sequence import Sequence
from millpond.model.load import LoadedModel, load
from millpond.model.prompt import new_prompt
from millpond.sample.state import SamplingState

PROMPT, STEPS = 8000, 16
MOST = 0.1
"""Of one layer of the rows: what steps in flight may take beyond what is there already."""


def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: object) -> mx.array:
    """Reads keys and values in one short operation, as a GPU's kernel does."""
    scores = queries[:, : keys.shape[1]] @ keys[:, :, :512].swapaxes(-1, -2)
    return mx.depends(mx.exp(queries), [scores, values])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], LoadedModel]:
    """A llama of so many layers in 16 bits as on a GPU, whose operations are as short as there; what it says means
    nothing."""
    as_on_a_gpu(monkeypatch)
    wide = {"head_dim": 64, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8}

    def make(layers: int) -> LoadedModel:
        config = {**tiny_models.config_of("llama"), **wide, "num_key_value_heads": 4, "num_hidden_layers": layers}
        monkeypatch.setitem(tiny_models.CONFIGS, "llama", {**config, "max_position_embeddings": 1 << 16})
        loaded = load(in_half(tiny_models.save("llama", tmp_path)), 0, lambda _: None)
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(mx.fast, "rope", lambda array, *_, **__: mx.cos(array))
        monkeypatch.setattr(mx.fast, "rms_norm", lambda array, *_: mx.sin(array))
        return loaded

    return make


def copied(model: LoadedModel) -> float:
    """The most that plain steps of two rows take beyond the rows, in layers of these."""
    lane = model.slots_lane()
    sequences = []
    for name in ("a", "b"):
        asked = request(name, [7], STEPS)
        sequences.append(Sequence(asked, SamplingState(asked.params, model.vocab_size)))
        lane.adopt(name, new_prompt(model.network, model.form))
    lane.advance([PROMPT, PROMPT])  # as if that had been read: what the rows hold is of no interest
    steps = inflight.Steps(model.network, model.vocab_size)
    ahead: InflightStep | None = None
    taken = 0
    for number in range(STEPS):
        if number == STEPS // 2:
            mx.synchronize()
            taken = mx.get_active_memory()
            mx.reset_peak_memory()
        step = steps.plain(lane, sequences, ahead, 0.0, lambda _: [])
        step.launch()
        if ahead is not None:
            for sequence, drawn in zip(sequences, ahead.drawn(), strict=True):
                sequence.tokens += drawn.tokens
        ahead = step
    mx.synchronize()
    return (mx.get_peak_memory() - taken) * len(model.kinds) / lane.nbytes


@pytest.mark.parametrize("layers", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_a_step_in_flight_copies_no_rows(model: Callable[[int], LoadedModel], layers: int) -> None:
    share = copied(model(layers))
    print(f"{share:.3f} layers of {layers}")
    assert share < MOST


@pytest.mark.slow
def test_rows_handed_over_are_copied(model: Callable[[int], LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure sees what it is there for."""
    loaded = model(8)
    plain = inflight.Steps.plain

    def handing(self: inflight.Steps, lane: object, *rest: object) -> InflightStep:
        step = plain(self, lane, *rest)  # type: ignore[arg-type]
        step.waiting += lane.arrays()  # type: ignore[attr-defined]
        return step

    monkeypatch.setattr(inflight.Steps, "plain", handing)
    assert copied(loaded) > 1
