"""What one more row with penalties costs its batch's sampler: 16 rows, each of so many tokens.

    python benchmarks/row_joins.py [--rows 16] [--tokens 2000] [--vocab 49152]

A join builds the sampler anew around states that are there already; the row's own state is made once, when its request
arrives, and a step takes one token of every row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from millpond.sample.sampler import BatchSampler
from millpond.sample.state import SamplingState
from millpond.types import SamplingParams

REPEATS = 50


def shown(name: str, work: Callable[[], object]) -> None:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    print(f"{name:46} {statistics.median(times):8.3f} ms ({min(times):.3f} to {max(times):.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a join of a row with penalties costs.")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000, help="of each row's prompt, and of its answer")
    parser.add_argument("--vocab", type=int, default=49152)
    given = parser.parse_args()
    numbers = np.random.default_rng(0)
    params = SamplingParams(max_tokens=1, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1)

    def tokens() -> list[int]:
        return [int(token) for token in numbers.integers(0, given.vocab, given.tokens)]

    def arrived() -> SamplingState:
        return SamplingState(params, given.vocab, tokens())

    states = [arrived() for _ in range(given.rows)]
    for state in states:
        for token in tokens():
            state.take(token)
    prompt = tokens()
    shown("arrival: one row's state", lambda: SamplingState(params, given.vocab, prompt))
    shown("join: the sampler of all rows", lambda: BatchSampler(states, given.vocab))
    shown("step: one token of each row", lambda: [state.take(7) for state in states])


if __name__ == "__main__":
    main()
