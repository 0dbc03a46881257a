"""ms of a decode step by rows and context, for every way of keeping keys and values: one table, interleaved.

    python benchmarks/decode_steps.py FOLDER [ROWS:CONTEXT ...]

FOLDER is a model in MLX's format. Steps are dispatched one ahead, as the engine does. Each figure is the fastest of
several, because other programs only ever make a step slower; the ratios are to the first column.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from millpond.model import blas

print(blas.prepare())

import mlx.core as mx  # noqa: E402 - the BLAS comes first

from millpond.kv.format import KvFormat  # noqa: E402
from millpond.model.forwards import decode  # noqa: E402
from millpond.model.lanes import SlotsLane  # noqa: E402
from millpond.model.load import LoadedModel, kept_as, load  # noqa: E402
from millpond.model.prompt import new_prompt  # noqa: E402
from millpond.types import KvPacking  # noqa: E402

FORMATS = {
    "MLX": KvFormat(),
    "C": KvFormat(native=True),
    "C int8": KvFormat(KvPacking(bits=8), native=True),
    "C int4": KvFormat(KvPacking(bits=4), native=True),
    "C int4 rotated": KvFormat(KvPacking(bits=4, start=64, rotated=True), native=True),
    "MLX int8": KvFormat(KvPacking(bits=8)),
}
CASES = ("1:100", "1:2000", "4:500", "8:100", "8:500", "16:300")
ROUNDS, STEPS = 3, 8


def lane_of(model: LoadedModel, rows: int, context: int) -> SlotsLane:
    """Rows that hold zeros: the time does not depend on the numbers."""
    lane = model.slots_lane()
    for row in range(rows):
        lane.adopt(str(row), new_prompt(model.network, model.form))
    lane.advance([context] * rows)
    return lane


def steps(model: LoadedModel, rows: int, context: int) -> float:
    """ms of the fastest step."""
    lane, tokens, times = lane_of(model, rows, context), mx.zeros((rows,), dtype=mx.int32), []
    flight = None
    for _ in range(STEPS):
        start = time.perf_counter()
        ahead = mx.argmax(decode(model.network, lane, tokens if flight is None else flight), axis=-1).astype(mx.int32)
        mx.async_eval(ahead, lane.arrays())
        if flight is not None:
            mx.eval(flight)
        flight = ahead
        times.append(time.perf_counter() - start)
    mx.eval(flight)
    return min(times[2:]) * 1000


def main() -> None:
    loaded = load(Path(sys.argv[1]), 0, lambda _: None)
    models = {name: kept_as(loaded, form) for name, form in FORMATS.items()}
    models = {name: model for name, model in models.items() if model.form == FORMATS[name]}
    print(f"{'rows:context':14s}" + "".join(f"{name:>18s}" for name in models))
    for case in sys.argv[2:] or CASES:
        rows, context = map(int, case.split(":"))
        best = {name: min(steps(model, rows, context) for _ in range(ROUNDS)) for name, model in models.items()}
        first = next(iter(best.values()))
        print(f"{case:14s}" + "".join(f"{ms:10.1f} ({first / ms:4.2f}x)" for ms in best.values()), flush=True)


if __name__ == "__main__":
    main()
