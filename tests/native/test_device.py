"""What is known of the device that MLX computes on."""

from __future__ import annotations

import mlx.core as mx
import pytest

from millpond.native import device
from millpond.native.device import DeviceMemory


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"max_recommended_working_set_size": 5, "memory_size": 9}, DeviceMemory(5, None)),
        ({"architecture": "sm_90", "total_memory": 9, "free_memory": 7}, DeviceMemory(9, 7)),
        ({"architecture": "x86_64"}, None),
    ],
)
def test_memory_by_what_mlx_tells(told: dict[str, str | int], found: DeviceMemory | None) -> None:
    """Metal recommends, CUDA knows the card: both are the GPU's, not the machine's."""
    assert device.memory_told(told) == found


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert mx.default_device() == mx.cpu, "these tests run on a CPU"
    assert device.on_cpu()
    assert device.memory() is None
    assert device.wirable() == 0
    assert device.name() == ""


def test_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 5, "device_name": "M9"})
    assert device.memory() == DeviceMemory(5, None)
    assert device.wirable() == 5
    assert device.name() == "M9"
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 9, "free_memory": 7})
    assert device.memory() == DeviceMemory(9, 7)
    assert device.wirable() == 0
