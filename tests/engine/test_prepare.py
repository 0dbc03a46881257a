"""What a start finds out about memory, and what it does with that."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from gpu_lane import as_on_a_gpu, in_half

from millpond.engine import prepare as preparing
from millpond.engine.group import ALONE
from millpond.engine.prepare import Prepared, prepare
from millpond.memory.machine import total_memory
from millpond.model.load import ModelError
from millpond.native import device
from millpond.native.device import DeviceMemory
from millpond.settings import PrefixSettings
from millpond.wire import Start

GIB = 2**30


def started(folder: Path, **options: object) -> Prepared:
    fields: dict[str, object] = {"max_batch": 4, "max_itl_ms": 400.0, "prefix": PrefixSettings(cache_ssd=0), **options}
    start = Start(model_path=str(folder), **fields)  # type: ignore[arg-type]
    return prepare(start, folder, lambda _stage, _done: None, lambda _event: None, ALONE)


@pytest.mark.parametrize(
    ("memory", "most"),
    [(DeviceMemory(10 * GIB, None), 9 * GIB), (DeviceMemory(80 * GIB, 10 * GIB), 9 * GIB), (None, None)],
)
def test_keys_and_values_have_what_the_gpu_has(
    memory: DeviceMemory | None, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own memory, as far as nobody else has it, and not that of the machine it sits in."""
    folder = in_half(tiny_models.save("llama", tmp_path))
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(device, "memory", lambda: memory)
    ready = started(folder)
    allowed = int(total_memory() * 0.7) if most is None else most
    assert ready.budget.limit_bytes == allowed - ready.model.weight_bytes


@pytest.mark.parametrize(
    ("memory", "free", "asked", "most"),
    [
        (DeviceMemory(80 * GIB, 10 * GIB), 100 * GIB, 0, 5 * GIB),
        (DeviceMemory(80 * GIB, 50 * GIB), 10 * GIB, 0, 5 * GIB),
        (DeviceMemory(80 * GIB, None), None, 0, None),
        (DeviceMemory(80 * GIB, 10 * GIB), 100 * GIB, 30 * GIB, 15 * GIB),
    ],
)
def test_cached_blocks_have_what_nobody_else_uses(
    memory: DeviceMemory,
    free: int | None,
    asked: int,
    most: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless somebody has said how much memory there is to be had."""
    folder = in_half(tiny_models.save("llama", tmp_path))
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(device, "memory", lambda: memory)
    monkeypatch.setattr(preparing, "_device_room", lambda _: 80 * GIB)
    monkeypatch.setattr(preparing, "free_memory", lambda: free)
    ready = started(folder, kv_memory_bytes=asked)
    assert ready.prefixes.load().ram_limit == (ready.budget.limit_bytes // 2 if most is None else most)


def test_processes_that_load_together_do_not_count_each_others_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory", lambda: DeviceMemory(80 * GIB, 10 * GIB))
    assert preparing._device_room(1) == 10 * GIB
    assert preparing._device_room(2) == 80 * GIB


@pytest.mark.parametrize(
    ("asked", "most", "expected"),
    [(None, 4 * GIB, 0), (None, 0, 0), (GIB, 4 * GIB, GIB), (0, 4 * GIB, 0), (5 * GIB, 4 * GIB, None), (1, 0, None)],
)
def test_what_is_wired(
    asked: int | None, most: int, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for, if there is so much; by itself nothing for small weights."""
    wired = []
    monkeypatch.setattr(device, "wirable", lambda: most)
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    folder = tiny_models.save("llama", tmp_path)
    if expected is None:
        with pytest.raises(ModelError, match="wired_memory_mb: "):
            started(folder, wired_bytes=asked)
    else:
        started(folder, wired_bytes=asked)
    assert wired == ([expected] if expected else [])
