"""How long the chunks of prompts may be is measured where that depends on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from gpu_lane import as_on_a_gpu, in_half

from millpond.engine import chunk as chunks
from millpond.engine.chunk import ON_CPU, TRIED, shortest_that_is_fast
from millpond.engine.group import ALONE
from millpond.engine.prepare import Prepared, prepare
from millpond.model.load import LoadedModel
from millpond.settings import PrefixSettings
from millpond.wire import Start

CONTEXT = 4096


def device_with(fixed: float, each: float, from_tokens: int = 0) -> Callable[[int], float]:
    """Seconds of chunks: weights are read once, and products of fewer tokens take as long as of ``from_tokens``."""
    return lambda tokens: fixed + each * max(tokens, from_tokens)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (device_with(0.0, 1e-4), 256),
        (device_with(0.001, 1e-4), 512),
        (device_with(0.005, 1e-4), 1024),
        (device_with(0.05, 1e-4), 2048),
        (device_with(0.0, 1e-4, 512), 512),
        (device_with(0.0, 1e-4, 5000), 2048),
        (device_with(0.0, 0.003), 256),
        (device_with(0.2, 0.001, 1024), 256),
    ],
)
def test_the_shortest_that_is_fast(seconds: Callable[[int], float], best: int) -> None:
    asked: list[int] = []

    def asking(tokens: int) -> float:
        asked.append(tokens)
        return seconds(tokens)

    assert shortest_that_is_fast(asking) == best
    assert asked == list(TRIED[: len(asked)])
    assert all(2 * seconds(tokens) <= chunks.MOST_SECONDS for tokens in asked[:-1])


def test_no_longer_than_a_context() -> None:
    assert shortest_that_is_fast(device_with(1.0, 0.0), 1500) == 256
    assert shortest_that_is_fast(device_with(0.1, 0.0), 1500) == 1024
    assert shortest_that_is_fast(device_with(0.1, 0.0), 100) == 256


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {**tiny_models.config_of("llama"), "max_position_embeddings": CONTEXT}
    monkeypatch.setitem(tiny_models.CONFIGS, "llama", config)
    monkeypatch.setenv("MILLPOND_CACHE", str(tmp_path / "cache"))
    return in_half(tiny_models.save("llama", tmp_path))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was measured, on a device for which 1024 tokens are best; it really reads them."""
    found: list[int] = []
    read = chunks.reading_seconds

    def timed(model: LoadedModel, tokens: int) -> float:
        found.append(tokens)
        assert read(model, tokens) > 0
        return device_with(0.005, 1e-4)(tokens)

    monkeypatch.setattr(chunks, "reading_seconds", timed)
    return found


def started(folder: Path, **options: int) -> Prepared:
    start = Start(model_path=str(folder), max_batch=4, max_itl_ms=400.0, prefix=PrefixSettings(cache_ssd=0), **options)  # type: ignore[arg-type]
    return prepare(start, folder, lambda _stage, _done: None, lambda _event: None, ALONE)


@pytest.mark.slow
def test_measured_once(folder: Path, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    for _ in range(2):
        assert started(folder).budget.chunk == 1024
    assert tried == list(TRIED)


def test_who_asks_gets_what_is_asked_for(folder: Path, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    assert started(folder, prefill_chunk=192).budget.chunk == 192
    assert not tried


def test_what_fails_is_told_and_nobody_else_notices(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_on_a_gpu(monkeypatch)

    def failing(_model: LoadedModel, _tokens: int) -> float:
        raise RuntimeError("no memory for that")

    monkeypatch.setattr(chunks, "reading_seconds", failing)
    assert started(folder).budget.chunk == TRIED[-1]
    assert "not everything could be tried" in caplog.text


def test_nothing_is_measured_on_a_cpu(folder: Path, tried: list[int]) -> None:
    assert started(folder).budget.chunk == ON_CPU
    assert not tried
