"""What runs on a GPU, on the CPU device: weights as they are stored, MLX's own attention, nothing in C."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from engine_driver import their_math, upstream_math
from mlx.utils import tree_flatten, tree_map

from millpond.model import cuda_attention
from millpond.native import decode, device, recurrence

FORMATS: dict[str, dict[str, object] | None] = {
    "bf16": None,
    "q4": {"group_size": 32, "bits": 4, "mode": "affine"},
    "q8": {"group_size": 32, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
"""How weights are stored, and how nn.quantize makes them so."""
TIE = 0.02
"""Two logits this close, as a share of the row's spread, may swap: one in bfloat16 has a step of a 256th."""


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, metal: bool = False) -> None:
    """For models that are loaded from now on, until the test ends: NVIDIA's, or Apple's."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setattr(decode, "available", lambda: False)
    monkeypatch.setattr(recurrence, "available", lambda: False)
    for module, function, upstream in their_math():
        monkeypatch.setattr(module, function, upstream)  # as a CPU's models have left it, for the next ones


def rounding_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention that round in other ways for other numbers of rows, as kernels of a GPU do; attention also
    by how many keys there are. What they give differs by some of the last bits that bfloat16 has, or TF32."""

    def nudged(result: mx.array, rows: int) -> mx.array:
        last_bit = mx.arange(result.shape[-1]) % 64 == rows % 5
        step = 2**-11 if result.dtype == mx.float32 else 2**-7
        return result * mx.where(last_bit, 1 + step, 1.0).astype(result.dtype)

    for layer in (nn.Linear, nn.QuantizedLinear):
        product = layer.__call__

        def call(self: nn.Module, x: mx.array, product: Callable[..., mx.array] = product) -> mx.array:
            return nudged(product(self, x), x.size // x.shape[-1])

        monkeypatch.setattr(layer, "__call__", call)
    for place, name in ((mx.fast, "scaled_dot_product_attention"), (cuda_attention, "plain_attention")):
        attention = getattr(place, name)

        def attend(
            queries: mx.array,
            keys: mx.array,
            *rest: object,
            attention: Callable[..., mx.array] = attention,
            **named: object,
        ) -> mx.array:
            return nudged(attention(queries, keys, *rest, **named), queries.shape[0] + keys.shape[2])

        monkeypatch.setattr(place, name, attend)


def in_half(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """The same model with its weights in 16 bits."""
    weights = folder / "model.safetensors"
    loaded = mx.load(str(weights))
    assert isinstance(loaded, dict)
    halves = {name: array.astype(dtype) for name, array in loaded.items()}
    mx.eval(halves)
    mx.save_safetensors(str(weights), halves, metadata={"format": "mlx"})
    return folder


def save_as(kind: str, stored: str, folder: Path) -> Path:
    """A tiny model of ``kind`` with its weights in one of FORMATS, everything else in bfloat16."""
    network, config, how = tiny_models.build(kind), dict(tiny_models.config_of(kind)), FORMATS[stored]
    network.update(tree_map(lambda array: array.astype(mx.bfloat16), network.parameters()))
    if how is not None:
        nn.quantize(network, **how, class_predicate=_packable)  # type: ignore[arg-type]
        config["quantization"] = how
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _packable(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module["weight"].shape[-1] % 32 == 0


def assert_same_or_near(
    network: nn.Module, prompt: Sequence[int], ours: list[int], expected: list[int], tie: float = TIE
) -> None:
    """Token for token the same; where they part, in mlx-lm's own arithmetic the two are a tie, by bfloat16's steps."""
    assert len(ours) == len(expected)
    for index, (got, want) in enumerate(zip(ours, expected, strict=True)):
        if got != want:
            with upstream_math():
                logits = network(mx.array([[*prompt, *expected[:index]]]))[0, -1].astype(mx.float32)
            spread = (logits.max() - logits.min()).item()
            gap = (logits.max() - mx.minimum(logits[want], logits[got])).item()
            assert gap < tie * spread, f"token {index}: {got} instead of {want}, {gap} apart of {spread}"
            return
