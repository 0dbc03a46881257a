"""What the engine counts of its own work, against what its clients got."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from engine_driver import Driver, request
from tiny_models import VOCAB, model

from millpond.engine.stats import EngineStats
from millpond.observe.histogram import SECONDS, Histogram
from millpond.types import PrefillChunk, SpecCounters


def prompt(length: int) -> list[int]:
    chooser = random.Random(length)
    return [chooser.randrange(VOCAB) for _ in range(length)]


def drawn(driven: Driver) -> int:
    return sum(len(outcome.tokens) for outcome in driven.outcomes.values())


def test_a_histogram_puts_values_up_to_a_bound_below_it() -> None:
    seen = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        seen.observe(value)
    before = seen.distribution()
    seen.observe(9.0)
    assert (before.bounds, before.counts, before.total) == ((1.0, 2.0), (2, 2, 1), 7.5)
    assert seen.distribution().counts == (2, 2, 2)
    assert list(SECONDS) == sorted(set(SECONDS))
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 600.0)


def test_prompt_tokens_belong_to_the_step_that_reads_them() -> None:
    stats = EngineStats()
    stats.chunk(PrefillChunk("a", 0, 64, last=False))
    stats.step(0.5, rows=0, drawn=0)
    stats.chunk(PrefillChunk("a", 64, 99, last=True))
    stats.step(0.25, rows=3, drawn=2)
    stats.step(0.25, rows=3, drawn=3)
    counted = stats.counters(SpecCounters())
    assert counted.prefill_tokens == 100
    assert counted.drawn_tokens == 5
    assert (counted.step_seconds.total, sum(counted.step_seconds.counts)) == (1.0, 3)
    assert (counted.step_rows.total, sum(counted.step_rows.counts)) == (6, 3)
    assert counted.step_tokens.total == 64 + (35 + 3) + 3


def test_every_token_and_step_is_counted_once() -> None:
    driven = Driver(model("llama"), max_batch=3, max_chunk=64)
    lengths = (500, 1, 2, 64, 65, 300)
    driven.run(arrivals={2 * turn: request(f"r{size}", prompt(size), 9) for turn, size in enumerate(lengths)})
    counted = driven.beat.counters
    assert counted.prefill_tokens == sum(lengths)
    assert counted.drawn_tokens == drawn(driven) == 9 * len(lengths)
    assert counted.preemptions == counted.failed_steps == 0
    assert sum(counted.step_seconds.counts) == sum(counted.step_rows.counts) == driven.beat.step
    assert counted.step_rows.counts[0] > 0, "no step that only reads a prompt"
    assert counted.step_rows.total == counted.drawn_tokens
    # A prompt's last token is read in the step that draws the first of its answer.
    assert counted.step_tokens.total == counted.drawn_tokens + counted.prefill_tokens - len(lengths)
    assert counted.step_seconds.total > 0


def test_a_token_that_ends_an_answer_is_drawn() -> None:
    first = Driver(model("llama"))
    first.submit(request("a", prompt(20), 8))
    first.run()
    end = first.outcomes["a"].tokens[3]
    driven = Driver(model("llama"))
    driven.submit(request("a", prompt(20), 8, stop_token_ids=[end]))
    driven.run()
    assert driven.beat.counters.drawn_tokens == drawn(driven) + 1


def test_preemptions_compute_prompts_again() -> None:
    """Three rows outgrow room for two of them as long: one gives way, and is computed again with its answer so far."""
    driven = Driver(model("llama"), max_batch=4, limit_bytes=model("llama").sizes.token_bytes * 1500)
    for number in range(3):
        driven.submit(request(f"r{number}", prompt(60), 300))
    driven.run()
    counted = driven.beat.counters
    assert counted.preemptions == 1
    again = counted.prefill_tokens - 3 * 60
    assert 60 < again < 360
    assert counted.drawn_tokens == drawn(driven) == 3 * 300


def test_a_failed_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driver(model("llama"))
    driven.submit(request("a", prompt(5), 6))
    working = mx.async_eval
    calls = 0

    def fails_once(*arrays: mx.array) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("this forward cannot be run")
        working(*arrays)

    monkeypatch.setattr(mx, "async_eval", fails_once)
    driven.run()
    assert driven.beat.counters.failed_steps == 1
    assert driven.outcomes["a"].failure is not None
