"""What a step hands to a GPU, counted beside mlx-lm's own batches: operations, waits, and Python around them."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from engine_driver import Driver, request, upstream_math
from gpu_lane import as_on_a_gpu, in_half
from mlx.utils import tree_flatten

from millpond.engine.inflight import Steps
from millpond.engine.sequence import Sequence as Answer
from millpond.model.forwards import prefill
from millpond.model.load import LoadedModel, load
from millpond.model.prompt import new_prompt
from millpond.native import device
from millpond.sample.state import SamplingState

LAYERS = 16
ROWS = 16
MOST = 1.1
"""Of mlx-lm's operations, what ours may be."""
NO_KERNEL = {
    *("Reshape", "Transpose", "Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Slice"),
    *("AsStrided", "StopGradient", "NumberOfElements", "View", "Split", "Depends", "Contiguous"),
}
"""What only looks at memory in another way."""


def lengths(rows: int) -> list[int]:
    """Of rows that have come a different way each."""
    return [40 + 7 * row for row in range(rows)]


@pytest.fixture(params=["metal", "cuda"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoadedModel:
    as_on_a_gpu(monkeypatch, metal=request.param == "metal")
    config = {**tiny_models.config_of("llama"), "num_hidden_layers": LAYERS, "max_position_embeddings": 4096}
    monkeypatch.setitem(tiny_models.CONFIGS, "llama", config)
    return load(in_half(tiny_models.save("llama", tmp_path)), 0, lambda _: None)


@contextmanager
def kernels_as_one() -> Iterator[None]:
    """What the GPU has a kernel for is one operation, as there; the numbers mean nothing."""

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, *, mask: object = None, **more: object
    ) -> mx.array:
        if isinstance(mask, mx.array) and device.on_cuda():
            return own["scaled_dot_product_attention"](queries, keys, values, mask=mask, **more)
        behind = [array for array in (keys, values, mask) if isinstance(array, mx.array)]
        return mx.depends(mx.exp(queries), behind)

    def rope(x: mx.array, *_: object, offset: int | mx.array, **__: object) -> mx.array:
        return mx.depends(mx.cos(x), [offset]) if isinstance(offset, mx.array) else mx.cos(x)

    own = {name: getattr(mx.fast, name) for name in ("scaled_dot_product_attention", "rope", "rms_norm")}
    made = {"scaled_dot_product_attention": attention, "rope": rope, "rms_norm": lambda x, *_, **__: mx.sin(x)}
    for name, replacement in made.items():
        setattr(mx.fast, name, replacement)
    try:
        yield
    finally:
        for name, original in own.items():
            setattr(mx.fast, name, original)


def operations(arrays: Sequence[mx.array], folder: Path) -> Counter[str]:
    """What is to be computed for these arrays, by name."""
    file = folder / "graph.dot"
    mx.export_to_dot(str(file), *arrays)
    names = re.findall(r'label ?= ?"([A-Z]\w+)"', file.read_text())
    return Counter(name for name in names if name not in NO_KERNEL)


def rows_of(model: LoadedModel, rows: int) -> tuple[Steps, object, list[Answer]]:
    """Ragged rows, ready for a step."""
    lane, answers = model.slots_lane(), []
    for row, length in enumerate(lengths(rows)):
        asked = request(str(row), tiny_models.prompt(length, row), 200)
        answers.append(Answer(asked, SamplingState(asked.params, model.vocab_size)))
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, asked.tokens[:-1])
        lane.adopt(asked.id, prompt)
    return Steps(model.network, model.vocab_size), lane, answers


def of_ours(model: LoadedModel, rows: int, folder: Path) -> Counter[str]:
    steps, lane, answers = rows_of(model, rows)
    with kernels_as_one():
        step = steps.plain(lane, answers, None, 0.0, lambda _: [])  # type: ignore[arg-type]
        return operations(step.waiting, folder)


def of_mlx_lm(model: LoadedModel, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    generate = import_module("mlx_lm.generate")
    with upstream_math(), monkeypatch.context() as patch:
        made = generate.BatchGenerator(
            model.network, stop_tokens=None, prefill_batch_size=rows, completion_batch_size=rows
        )
        made.insert([tiny_models.prompt(length, row) for row, length in enumerate(lengths(rows))], [200] * rows)
        while len(made._generation_batch) < rows:
            made.next()
        batch = made._generation_batch
        seen: list[Counter[str]] = []
        evaluate = mx.async_eval

        def counting(*arrays: object) -> None:
            caches = [array for _, array in tree_flatten([cache.state for cache in batch.prompt_cache])]
            handed = [array for _, array in tree_flatten(list(arrays)) if isinstance(array, mx.array)]
            seen.append(operations([*handed, *(array for array in caches if isinstance(array, mx.array))], folder))
            evaluate(*arrays)

        patch.setattr(mx, "async_eval", counting)
        with mx.stream(made._stream), kernels_as_one():
            batch.next()
        return seen[0]


@pytest.mark.often("metal-16", "cuda-1]")
@pytest.mark.parametrize("rows", [1, ROWS])
def test_operations_of_a_step(rows: int, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = of_ours(model, rows, tmp_path)
    theirs = of_mlx_lm(model, rows, tmp_path, monkeypatch)
    print(f"{rows} rows, {LAYERS} layers: {ours.total()} operations, mlx-lm {theirs.total()}\n{ours}\n{theirs}")
    assert ours.total() > LAYERS * 10, "the graph was counted"
    assert ours.total() <= MOST * theirs.total()


@pytest.mark.often("cuda")
def test_a_ragged_step_casts_no_indices(model: LoadedModel, tmp_path: Path) -> None:
    """Indices of another type than MLX's own would be cast in every layer."""
    aligned, ragged = (of_ours(model, rows, tmp_path)["AsType"] for rows in (1, ROWS))
    assert ragged < aligned + LAYERS // 2


def decoding(model: LoadedModel, most: int) -> Driver:
    """An engine whose rows all draw tokens, ragged ones, at most so many each."""
    driven = Driver(model, max_batch=ROWS)
    for row, length in enumerate(lengths(ROWS)):
        driven.submit(request(str(row), tiny_models.prompt(length, row), most))
    while not all(len(outcome.tokens) > 2 for outcome in driven.outcomes.values()):
        driven.engine.turn()
    return driven


@pytest.mark.often("cuda")
def test_waits_of_a_step(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for a step once, when it reads what was drawn."""
    driven = decoding(model, 40)
    waits = Counter[str]()
    for name in ("eval", "synchronize"):
        original = getattr(mx, name)

        def counting(*arrays: object, _name: str = name, _original: Callable[..., None] = original) -> None:
            waits[_name] += 1
            _original(*arrays)

        monkeypatch.setattr(mx, name, counting)
    turns = 20
    for _ in range(turns):
        driven.engine.turn()
    assert waits == {"eval": turns}
    monkeypatch.undo()
    driven.run()


def fixed_loop() -> float:
    """Seconds of some Python that is always the same."""
    began = time.perf_counter()
    found: dict[int, int] = {}
    for number in range(20_000):
        found[number % 97] = found.get(number % 89, 0) + number
    return time.perf_counter() - began


MOST_PYTHON = 0.5
"""Of the fixed loop, what Python may take around a step of 16 rows. The loop takes a millisecond or two."""


@pytest.mark.slow
def test_python_around_a_step(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is neither MLX's nor the building of the graph."""
    driven = decoding(model, 200)
    inside = 0.0

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal inside
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                inside += time.perf_counter() - began

        return call

    for owner, name in ((Steps, "plain"), (mx, "eval"), (mx, "async_eval")):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    shares = []
    for _ in range(60):
        inside, began = 0.0, time.perf_counter()
        driven.engine.turn()
        around = time.perf_counter() - began - inside
        shares.append(around / fixed_loop())
    print(f"{statistics.median(shares):.2f} of the fixed loop", file=sys.stderr)
    assert statistics.median(shares) < MOST_PYTHON
    monkeypatch.undo()
    driven.run()
