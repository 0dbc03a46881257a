"""What runs on a GPU, on the CPU device: weights as they are stored, MLX's own attention, nothing in C."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from millpond.model import load as loading
from millpond.native import decode


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models that are loaded from now on, until the test ends."""
    monkeypatch.setattr(loading, "computes_on_cpu", lambda: False)
    monkeypatch.setattr(decode, "available", lambda: False)


def in_half(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """The same model with its weights in 16 bits."""
    weights = folder / "model.safetensors"
    loaded = mx.load(str(weights))
    assert isinstance(loaded, dict)
    halves = {name: array.astype(dtype) for name, array in loaded.items()}
    mx.eval(halves)
    mx.save_safetensors(str(weights), halves, metadata={"format": "mlx"})
    return folder
