"""What weights that stay packed, and layers computed in C, change on a CPU: one table, in turns.

    python benchmarks/float_weights.py FOLDER FLOAT32
    python benchmarks/packed_weights.py FOLDER FLOAT32

ms of steps by rows (100 tokens before each), of verifying columns of one row, and of prompts: with weights in
float32 and mlx-lm's layers, packed and mlx-lm's layers, and packed in layers of our own. Each figure is the best of
several; the ratio is to the first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from millpond.model import blas

print(blas.prepare())

import mlx.core as mx  # noqa: E402 - the BLAS comes first

from millpond.model.forwards import prefill  # noqa: E402
from millpond.model.lanes import SlotsLane  # noqa: E402
from millpond.model.layers import Known  # noqa: E402
from millpond.model.load import LoadedModel, load  # noqa: E402
from millpond.model.prompt import new_prompt  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32)
COLUMNS = (2, 4, 8)
PROMPTS = (500, 2000)
CONTEXT = 100
ROUNDS, STEPS = 3, 6


def prompt_of(model: LoadedModel, length: int, seed: int) -> list[int]:
    return [(7 * i + seed) % min(20000, model.vocab_size) for i in range(length)]


def lane_of(model: LoadedModel, rows: int) -> SlotsLane:
    lane = model.slots_lane()
    for row in range(rows):
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, prompt_of(model, CONTEXT, row))
        lane.adopt(str(row), prompt)
    return lane


def step(model: LoadedModel, rows: int, columns: int = 1) -> float:
    """ms of the fastest."""
    lane, times = lane_of(model, rows), []
    for _ in range(STEPS):
        start = time.perf_counter()
        mx.eval(mx.argmax(lane.forward(model.network, mx.zeros((rows, columns), dtype=mx.int32)), axis=-1))
        times.append(time.perf_counter() - start)
        lane.advance([1] * rows)
    return min(times) * 1000


def reading(model: LoadedModel, length: int) -> float:
    """ms of a prompt."""
    prompt = new_prompt(model.network, model.form)
    start = time.perf_counter()
    prefill(model.network, prompt, prompt_of(model, length, 0))
    mx.synchronize()
    return (time.perf_counter() - start) * 1000


@contextmanager
def layers(ours: bool) -> Iterator[None]:
    with mock.patch.object(Known, "takes", Known.takes if ours else lambda *_: False):
        yield


def main() -> None:
    packed, wide = (load(Path(folder), 0, lambda _: None) for folder in sys.argv[1:3])
    ways = {"float32": (wide, False), "packed": (packed, False), "layers": (packed, True)}
    print(f"weights: {wide.weight_bytes / 1e6:.0f} and {packed.weight_bytes / 1e6:.0f} MB")
    print(f"{'ms':24s}" + "".join(f"{name:>18s}" for name in ways))
    cases: dict[str, Callable[[LoadedModel], float]] = {
        **{f"{rows} rows": lambda model, rows=rows: step(model, rows) for rows in ROWS},
        **{f"1 row, {columns} columns": lambda model, columns=columns: step(model, 1, columns) for columns in COLUMNS},
        **{f"prompt of {length}": lambda model, length=length: reading(model, length) for length in PROMPTS},
    }
    for name, case in cases.items():
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for way, (model, ours) in ways.items():
                with layers(ours):
                    best[way] = min(best[way], case(model))
        print(f"{name:24s}" + "".join(f"{ms:10.1f} ({best['float32'] / ms:4.2f}x)" for ms in best.values()), flush=True)


if __name__ == "__main__":
    main()
