"""What the masks of bound answers add to the steps of the free ones beside them: milliseconds of a turn of the engine.

    python benchmarks/masks.py FOLDER [--bound 1] [--turns 120] [--rounds 5]

FOLDER is a model in MLX's format with its tokenizer. Of its weights the masks do not depend: they are filled for its
vocabulary, so a model with small layers (``tests/support/tiny_models.thin``) shows them best. Nothing is guessed ahead.
Two engines of eight answers, one whose answers are all free, take turns in one process; quartiles of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from millpond.model import blas

blas.prepare()
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from engine_driver import Driver  # noqa: E402 - the BLAS comes first
from grammars import SCHEMA  # noqa: E402

from millpond.grammar.lark import json_value  # noqa: E402
from millpond.grammar.lexicon import Lexicon  # noqa: E402
from millpond.model.opened import OpenModel, open_model  # noqa: E402
from millpond.text.tokenizer import Tokenizer  # noqa: E402
from millpond.types import Grammar, Request, SamplingParams  # noqa: E402

ROWS = 8
WARM = 12
"""Turns that are not measured: prompts are read in them."""


def engine_of(opened: OpenModel, lexicon: Lexicon, turns: int, bound: int) -> Driver:
    driver = Driver(opened.model, capabilities=opened.capabilities, vocabulary=lexicon)
    grammar = Grammar(text=f"start: {json_value(SCHEMA, strict=True)}\n")
    for number in range(ROWS):
        params = SamplingParams(max_tokens=turns + 2 * WARM, temperature=1.0, seed=number)
        asked = grammar if number < bound else None
        driver.submit(Request(id=str(number), tokens=[5, 6, 7, 8 + number], params=params, grammar=asked))
    for _ in range(WARM):
        driver.engine.turn()
    return driver


def main() -> None:
    parser = argparse.ArgumentParser(description="What masks add to a step.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bound", type=int, default=1)
    parser.add_argument("--turns", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    opened, tokenizer = open_model(given.folder), Tokenizer.load(given.folder)
    ends, tokens = tokenizer.eos_token_ids, tokenizer.vocab_size
    lexicon = Lexicon(tokenizer.to_json(), tokens, opened.model.vocab_size, ends, tokenizer.token_bytes)
    more = []
    for number in range(given.rounds):
        engines = [engine_of(opened, lexicon, given.turns, bound) for bound in (0, given.bound)]
        times: list[list[float]] = [[], []]
        for _ in range(given.turns):
            for place, driver in enumerate(engines):
                begun = time.perf_counter()
                driver.engine.turn()
                times[place].append(1000 * (time.perf_counter() - begun))
        free, bound = (statistics.quantiles(each, n=4) for each in times)
        more.append(bound[1] - free[1])
        told = (" ".join(f"{quartile:.2f}" for quartile in each) for each in (free, bound))
        print(f"round {number + 1}: free {next(told)}, beside bound ones {next(told)}", flush=True)
    rows = f"{given.bound} of {ROWS} rows bound, {opened.model.vocab_size} tokens"
    print(f"{rows}: {statistics.median(more):.2f} ms more at the median ({min(more):.2f} to {max(more):.2f})")


if __name__ == "__main__":
    main()
