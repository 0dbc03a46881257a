"""Rows of models with recurrent layers: in the batch and one by one, with draft tokens kept in part, and their memory.

    python benchmarks/recurrent.py [qwen3_5 lfm2 nemotron_h] [--steps 10]

Models of random weights. Lanes take turns step by step, and of each the least time counts: what else the machine does
only adds. Milliseconds of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from millpond.model import blas

blas.prepare()

import mlx.core as mx  # noqa: E402 - what a CPU multiplies with is chosen before MLX is loaded
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402

from millpond.model.forwards import decode, prefill  # noqa: E402
from millpond.model.lanes import Lane, SlotsLane, SoloLane  # noqa: E402
from millpond.model.load import LoadedModel  # noqa: E402
from millpond.model.opened import open_model  # noqa: E402
from millpond.model.prompt import new_prompt  # noqa: E402

COMMON = {"vocab_size": 16384, "max_position_embeddings": 4096, "num_key_value_heads": 2, "num_attention_heads": 8}
CONFIGS: dict[str, dict[str, object]] = {
    "qwen3_5": {
        **COMMON,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "head_dim": 128,
        "full_attention_interval": 4,
        "linear_num_value_heads": 16,
        "linear_num_key_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
    },
    "lfm2": {
        **COMMON,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 1024,
        "block_ff_dim": 2816,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [2, 5, 8, 11],
        "rope_theta": 10000.0,
    },
    "nemotron_h": {
        **COMMON,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "head_dim": 128,
        "attention_bias": False,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "n_groups": 8,
        "time_step_limit": [0.001, 10.0],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": list("M-M-M*-M-M*-"),
    },
}
CONTEXT = 24
"""Tokens of the shortest row; each further one has three more."""


@dataclass(frozen=True)
class Case:
    """Steps of so many columns of which a row keeps so many."""

    columns: int
    kept: int


def opened(kind: str, folder: Path) -> LoadedModel:
    config = {"model_type": kind, **CONFIGS[kind]}
    model_class, arguments = _get_classes(config)
    network: nn.Module = model_class(arguments.from_dict(config))
    mx.random.seed(0)
    network.update(
        tree_map(
            lambda a: mx.random.normal(a.shape) * (2.0 / a.shape[-1] ** 0.5) if a.ndim > 1 else a, network.parameters()
        )
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    found = open_model(folder)
    print(
        f"{kind}: {found.model.weight_bytes / 1e6:.0f} MB, {found.model.sizes.state_bytes / 1e6:.2f} MB of states a row"
    )
    print(f"   slots: {found.capabilities.slots} {found.capabilities.reason} {found.capabilities.forward_only}")
    return found.model


def filled(lane: Lane, model: LoadedModel, rows: int) -> Lane:
    for row in range(rows):
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, [(7 * place + row) % model.vocab_size for place in range(CONTEXT + 3 * row)])
        lane.adopt(str(row), prompt)
    mx.eval(lane.arrays())
    return lane


def stepping(lane: Lane, model: LoadedModel, case: Case) -> Callable[[], float]:
    rows = len(lane.batch)

    def once() -> float:
        begun = time.perf_counter()
        if case.columns == 1:
            picks = mx.argmax(decode(model.network, lane, mx.zeros((rows,), dtype=mx.int32)), axis=-1)
        else:
            picks = mx.argmax(lane.forward(model.network, mx.zeros((rows, case.columns), dtype=mx.int32)), axis=-1)
            mx.eval(picks, lane.arrays())
            lane.advance([case.kept] * rows)
            if isinstance(lane, SlotsLane):
                lane.settle()
        mx.eval(picks, lane.arrays())
        return 1000 * (time.perf_counter() - begun)

    return once


def least(steppers: Sequence[Callable[[], float]], steps: int) -> list[float]:
    times = [[once() for once in steppers] for _ in range(steps + 2)][2:]
    return [min(column) for column in zip(*times, strict=True)]


def coming_and_going(model: LoadedModel, rows: int) -> tuple[float, float]:
    """Milliseconds in which the last row joins, and the first one leaves."""
    lane, found = filled(model.slots_lane(), model, rows - 1), ([], [])
    for number in range(5):
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, [5] * CONTEXT)
        begun = time.perf_counter()
        lane.adopt(f"new{number}", prompt)
        found[0].append(1000 * (time.perf_counter() - begun))
        stepping(lane, model, Case(1, 1))()
        begun = time.perf_counter()
        lane.release(lane.batch.names[0])
        mx.eval(lane.arrays())
        found[1].append(1000 * (time.perf_counter() - begun))
        stepping(lane, model, Case(1, 1))()
    return min(found[0]), min(found[1])


def bare_copy(megabytes: float) -> float:
    """Milliseconds in which so much memory is copied to fresh places."""
    source = mx.random.normal((int(megabytes * 1e6 / 4),))
    mx.eval(source)
    view, times = np.asarray(source), []
    for _ in range(5):
        begun = time.perf_counter()
        view.copy()
        times.append(1000 * (time.perf_counter() - begun))
    return min(times)


def peaks(model: LoadedModel, rows: int) -> tuple[float, float]:
    """MB beyond what is held, of three plain steps in flight and of steps that keep a part of four columns."""
    lane, found = filled(model.slots_lane(), model, rows), []
    tokens = mx.zeros((rows,), dtype=mx.int32)
    for columns in (1, 4):
        worst = 0
        for _ in range(3):
            mx.eval(tokens, lane.arrays())
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            if columns == 1:
                for _ in range(3):
                    tokens = mx.argmax(decode(model.network, lane, tokens), axis=-1).astype(mx.int32)
                    mx.async_eval(tokens)
                mx.eval(tokens)
            else:
                stepping(lane, model, Case(columns, 2))()
            worst = max(worst, mx.get_peak_memory() - before)
        found.append(worst / 1e6)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of models with recurrent layers.")
    parser.add_argument("kinds", nargs="*", default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    for kind in given.kinds:
        with TemporaryDirectory() as folder:
            model = opened(kind, Path(folder))
        for rows in (1, 4, 8):
            lanes = [filled(lane, model, rows) for lane in (SoloLane(), model.slots_lane())]
            solo, slots = least([stepping(lane, model, Case(1, 1)) for lane in lanes], given.steps)
            print(f"   {rows} rows: solo {solo:.1f}, slots {slots:.1f}: {solo / slots:.2f} times", flush=True)
        for rows in (1, 4):
            cases = [Case(1, 1), Case(4, 4), Case(4, 2), Case(4, 0)]
            lanes = [filled(model.slots_lane(), model, rows) for _ in cases]
            found = least([stepping(*both) for both in zip(lanes, [model] * 4, cases, strict=True)], given.steps)
            told = ", ".join(
                f"{case.columns} columns, {case.kept} kept {ms:.1f}" for case, ms in zip(cases, found, strict=True)
            )
            print(f"   {rows} rows: {told}", flush=True)
        joined, left = coming_and_going(model, 8)
        plain, verifying = peaks(model, 8)
        held = 8 * model.sizes.state_bytes / 1e6
        print(f"   the 8th row joins in {joined:.1f} ms, one leaves in {left:.1f} ms")
        print(f"   a bare copy of 7 rows takes {bare_copy(7 / 8 * held):.1f} ms")
        print(f"   8 rows hold {held:.1f} MB of states; beyond it, plain {plain:.1f}, verifying {verifying:.1f}")


if __name__ == "__main__":
    main()
