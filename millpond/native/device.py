"""What MLX computes on. Whatever depends on that asks here, so that a test can say otherwise. Engine thread only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's own memory, in bytes."""

    total: int
    """What programs may use of it, all together."""
    free: int | None
    """What of it nobody uses now; None where that is not told (Metal, whose memory is the machine's)."""


def on_cpu() -> bool:
    """Whether that is a CPU: weights are widened, attention over rows is ours, and a step in flight helps nobody."""
    return bool(mx.default_device() == mx.cpu)


def on_metal() -> bool:
    """Whether it is an Apple GPU."""
    return not on_cpu() and mx.metal.is_available()


def on_cuda() -> bool:
    """Whether it is an NVIDIA GPU."""
    return not on_cpu() and not on_metal()


def memory() -> DeviceMemory | None:
    """Of the GPU that MLX computes on; None on a CPU, and where MLX does not tell."""
    return None if on_cpu() else memory_told(mx.device_info())


def name() -> str:
    """What the maker of the GPU that MLX computes on calls it; empty on a CPU, and where MLX does not tell."""
    return "" if on_cpu() else str(mx.device_info().get("device_name", ""))


def wirable() -> int:
    """Bytes that can be kept from being swapped out; 0 where nothing is swapped, or not by us (a CPU, CUDA)."""
    size = 0 if on_cpu() else mx.device_info().get("max_recommended_working_set_size", 0)
    return size if isinstance(size, int) else 0


def memory_told(told: Mapping[str, str | int]) -> DeviceMemory | None:
    """The same, of what ``mx.device_info`` says: a recommendation with Metal, the card's memory with CUDA."""
    free = told.get("free_memory")
    for name in ("max_recommended_working_set_size", "total_memory"):
        total = told.get(name)
        if isinstance(total, int):
            return DeviceMemory(total, free if isinstance(free, int) else None)
    return None
