"""What looking for n-grams costs: building the index of a prompt, one step of a request, and memory.

    python benchmarks/ngram_index.py

The contexts are Zipf-distributed ids in which a third are passages that stood there before. Every step takes one token
and proposes 15, looking in the request itself and in as many tokens of past answers.
"""

from __future__ import annotations

import time

import numpy as np

from millpond.speculate.lookup import Lookup, PastOutputs

CONTEXTS = (1_000, 8_000, 32_000, 128_000)
VOCABULARY, STEPS, MOST, BUILDS = 49_152, 2_000, 15, 5


def tokens(count: int, chance: np.random.Generator, earlier: list[int]) -> list[int]:
    """`count` ids that repeat passages of themselves and of `earlier`."""
    ids = list(earlier)
    while len(ids) < len(earlier) + count:
        length = int(chance.integers(10, 100))
        if len(ids) > length and chance.random() < 1 / 3:
            start = int(chance.integers(0, len(ids) - length))
            ids += ids[start : start + length]
        else:
            ids += np.minimum(chance.zipf(1.2, length), VOCABULARY - 1).tolist()
    return ids[len(earlier) : len(earlier) + count]


def ms(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def measure(context: int) -> None:
    chance = np.random.default_rng(context)
    prompt = tokens(context, chance, [])
    answer = tokens(STEPS, chance, prompt)
    builds = []
    for _ in range(BUILDS):
        request, start = Lookup(), time.perf_counter()
        request.extend(prompt)
        builds.append(ms(start))
    nbytes, shared = request.nbytes, PastOutputs()
    shared.add("", tokens(context, chance, []))
    steps = []
    for token in answer:
        start = time.perf_counter()
        request.extend([token])
        request.propose(MOST, shared.of(""))
        steps.append(ms(start) * 1000)
    median, high, worst = np.percentile(steps, [50, 99, 100])
    row = f"{context:8,} {min(builds):10.2f} {median:11.1f} {high:11.1f} {worst:11.1f}"
    print(f"{row} {nbytes:13,} {nbytes / context:9.1f}", flush=True)


def main() -> None:
    print("  tokens  build, ms  median, us    99 %, us   worst, us         bytes   a token")
    for context in CONTEXTS:
        measure(context)


if __name__ == "__main__":
    main()
