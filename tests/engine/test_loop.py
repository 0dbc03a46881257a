"""The engine loop on tiny models of every cache kind: same tokens as alone, one ending each, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest
from engine_driver import Driver, Outcome, assert_same_or_tied, reference, request
from tiny_models import CONFIGS, VOCAB, capabilities, model, prompt

from millpond.kv.format import Arrays
from millpond.kv.slots import KvSlot
from millpond.types import ErrorKind, Finish


def driver(kind: str, **options: int) -> Driver:
    return Driver(model(kind), capabilities=capabilities(kind), **options)  # type: ignore[arg-type]


@pytest.mark.often("gemma3_text", "mamba", "deepseek_v2", "qwen3_next")
@pytest.mark.parametrize("kind", CONFIGS)
def test_batched_answers_equal_single_ones(kind: str) -> None:
    """Requests of 1 to 300 tokens join at different steps and leave at different lengths (D1, D4)."""
    driven = driver(kind, max_batch=5, max_chunk=128)
    lengths = [1, 2, 5, 17, 63, 64, 65, 66, 130, 300]
    prompts = {f"r{length}": prompt(length) for length in lengths}
    wanted = {name: 5 + 7 * (index % 4) for index, name in enumerate(prompts)}
    driven.run(arrivals={index * 4: request(name, prompts[name], wanted[name]) for index, name in enumerate(prompts)})
    for name, tokens in prompts.items():
        expected = reference(model(kind).network, tokens, wanted[name])
        assert driven.outcomes[name].finish is Finish.LENGTH
        assert_same_or_tied(model(kind).network, tokens, driven.outcomes[name].tokens, expected)


@pytest.mark.often("llama")
@pytest.mark.parametrize("kind", ["gemma3_text", "llama"])
def test_long_answers_past_the_window_and_the_capacity(kind: str) -> None:
    driven = driver(kind)
    for length in (20, 24, 250):
        driven.submit(request(f"r{length}", prompt(length), 120))
    driven.run()
    for length in (20, 24, 250):
        expected = reference(model(kind).network, prompt(length), 120)
        assert_same_or_tied(model(kind).network, prompt(length), driven.outcomes[f"r{length}"].tokens, expected)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_seeded_draws_do_not_depend_on_the_batch(kind: str) -> None:
    """The same seed gives the same tokens alone and among eight others (D5)."""

    def outcome(others: int) -> Outcome:
        driven = driver(kind, max_batch=16)
        for other in range(others):
            driven.submit(request(f"o{other}", prompt(10 + 9 * other), 12 + other, temperature=1.0, seed=other))
        driven.submit(request("x", prompt(40), 30, temperature=0.8, seed=1234))
        driven.run()
        return driven.outcomes["x"]

    alone, among = outcome(0), outcome(8)
    assert alone.tokens == among.tokens
    assert len(set(alone.tokens)) > 5


def test_everything_batches_together() -> None:
    """Seeds, temperatures, penalties, biases, logprobs and greedy rows share one batch (D2)."""
    driven = driver("llama")
    variants: list[dict[str, object]] = [
        {},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.0, "seed": 2, "top_p": 0.9, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0.5, "seed": 3},
        {"logit_bias": {7: 100.0}},
        {"logprobs": 3},
        {"min_p": 0.2, "temperature": 1.5, "seed": 4},
    ]
    for index, variant in enumerate(variants):
        driven.submit(request(f"v{index}", prompt(30), 10, **variant))
    most = 0

    def watch(turn: int) -> None:
        nonlocal most
        most = max(most, driven.scheduler.running)

    driven.run(watch)
    assert most == len(variants)
    for index, variant in enumerate(variants):
        single = driver("llama")
        single.submit(request("s", prompt(30), 10, **variant))
        single.run()
        assert single.outcomes["s"].tokens == driven.outcomes[f"v{index}"].tokens
    assert driven.outcomes["v5"].tokens == [7] * 10
    logprobs = driven.outcomes["v6"].logprobs
    assert [entry.token for entry in logprobs] == driven.outcomes["v6"].tokens
    assert all(len(entry.top) == 3 and entry.top[0] == (entry.token, entry.logprob) for entry in logprobs)


def test_stop_tokens_end_the_answer_and_are_not_part_of_it() -> None:
    expected = reference(model("llama").network, prompt(20), 30)
    stop = expected[10]
    driven = driver("llama")
    driven.submit(request("x", prompt(20), 30, stop_token_ids=[stop]))
    driven.run()
    assert driven.outcomes["x"].tokens == expected[: expected.index(stop)]
    assert driven.outcomes["x"].finish is Finish.STOP


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 6, 20])
def test_cancel_at_any_time_frees_everything(turns: int) -> None:
    """Waiting, in the middle of a long prefill, running: cancel ends it within one step and frees what it held (A4)."""
    driven = driver("llama", max_batch=2, max_chunk=64)
    for index, length in enumerate((300, 280, 30, 260)):
        driven.submit(request(f"r{index}", prompt(length), 60))
    for _ in range(turns):
        driven.engine.turn()
    for name in list(driven.outcomes):
        driven.cancel(name)
    driven.cancel("unknown")
    driven.engine.turn()
    assert not driven.open
    driven.run()
    assert all(outcome.finish is Finish.CANCELLED for outcome in driven.outcomes.values())


def test_survivors_of_a_cancel_are_not_disturbed() -> None:
    driven = driver("llama")
    for index in range(4):
        driven.submit(request(f"r{index}", prompt(20 + index), 40))
    driven.run(lambda turn: driven.cancel("r1") if turn == 12 else None)
    assert driven.outcomes["r1"].finish is Finish.CANCELLED
    for index in (0, 2, 3):
        expected = reference(model("llama").network, prompt(20 + index), 40)
        assert_same_or_tied(model("llama").network, prompt(20 + index), driven.outcomes[f"r{index}"].tokens, expected)


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "word"),
    [([], 5, "prompt token"), ([1], 0, "max_tokens"), ([1] * 500, 50, "context"), ([VOCAB], 5, "token id")],
)
def test_impossible_requests_are_refused(tokens: list[int], max_tokens: int, word: str) -> None:
    driven = driver("llama")
    driven.submit(request("bad", tokens, max_tokens))
    driven.submit(request("good", prompt(5), 3))
    driven.run()
    failure = driven.outcomes["bad"].failure
    assert failure is not None
    assert failure.kind is ErrorKind.INVALID
    assert word in failure.message
    assert driven.outcomes["good"].finish is Finish.LENGTH


class Poisoned:
    """A network that raises, or yields NaN, when a forward of its kind sees a certain token."""

    def __init__(self, network: object, token: int, where: str) -> None:
        self._network, self._token, self._where = network, token, where

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: object) -> mx.array:
        hit = (tokens == self._token).any(axis=1)
        logits: mx.array = self._network(tokens, cache=cache)  # type: ignore[operator]
        in_prefill = tokens.shape[1] > 1
        if self._where == "nan" and not in_prefill:
            return mx.where(hit[:, None, None], float("nan"), logits)
        if (self._where == "prefill") == in_prefill and bool(hit.any().item()):
            raise RuntimeError("this forward cannot be run")
        return logits


@pytest.mark.parametrize("where", ["prefill", "decode", "nan"])
def test_one_bad_request_never_kills_others(where: str) -> None:
    """A forward fails because of one request, in prefill, decode or by NaN: only that one gets an error (D6)."""
    import dataclasses

    bad = 200
    healthy = model("llama")
    broken = dataclasses.replace(healthy, network=Poisoned(healthy.network, bad, where))  # type: ignore[arg-type]
    driven = Driver(broken, capabilities=capabilities("llama"))
    prompts = {f"r{i}": [token for token in prompt(40 + i) if token != bad] for i in range(5)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, 20, logit_bias={bad: -100.0}))
    poison = [5, bad, 7, 8, 9] if where == "prefill" else [5, 6, 7, 8, bad]

    def watch(turn: int) -> None:
        if turn == 8:
            driven.submit(request("poison", poison, 20))
        # Once for all of them, once more for whoever is found out, and not for ever.
        assert driven.beat.counters.failed_steps <= 2 + len(prompts)

    driven.run(watch)
    failure = driven.outcomes["poison"].failure
    assert failure is not None
    assert failure.kind is ErrorKind.ENGINE
    for name, tokens in prompts.items():
        single = driver("llama")
        single.submit(request(name, tokens, 20, logit_bias={bad: -100.0}))
        single.run()
        assert driven.outcomes[name].tokens == single.outcomes[name].tokens


def test_memory_pressure_preempts_and_resumes_unseen() -> None:
    """Rows that outgrow the budget give way and come back; every answer is the one they would have had alone."""
    limit = 1500 * sum(spec.token_bytes for spec in model("llama").specs)
    driven = driver("llama", max_batch=4, limit_bytes=limit)
    most = 0

    def watch(turn: int) -> None:
        nonlocal most
        most = max(most, driven.beat.kv_bytes)

    for index in range(3):
        driven.submit(request(f"r{index}", prompt(60 + index), 300))
    driven.run(watch)
    assert driven.beat.counters.preemptions > 0
    assert most <= limit
    for index in range(3):
        expected = reference(model("llama").network, prompt(60 + index), 300)
        assert_same_or_tied(model("llama").network, prompt(60 + index), driven.outcomes[f"r{index}"].tokens, expected)


def test_the_next_wave_takes_the_rows_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come soon after the last ones find memory of the right size; a rest gives it back."""
    driven = driver("llama", max_batch=4)
    sizes: list[int] = []
    resize = KvSlot.resize

    def counted(slot: KvSlot, rows: int, capacity: int) -> None:
        sizes.append(rows)
        resize(slot, rows, capacity)

    monkeypatch.setattr(KvSlot, "resize", counted)
    for wave in range(3):
        for index in range(4):
            driven.submit(request(f"w{wave} r{index}", prompt(100 + index, wave), 5))
        while driven.open or not driven.scheduler.idle:
            driven.engine.turn()
        assert driven.beat.kv_bytes > 0
        assert wave == 0 or not sizes
        sizes.clear()
        for index in range(4):
            alone = reference(model("llama").network, prompt(100 + index, wave), 5)
            outcome = driven.outcomes[f"w{wave} r{index}"]
            assert_same_or_tied(model("llama").network, prompt(100 + index, wave), outcome.tokens, alone)
    driven.run()
    assert driven.beat.kv_bytes == 0


@pytest.mark.parametrize(("staying", "moved"), [((), 0), ((0,), 0), ((3,), 1), ((2, 3), 2), ((0, 3), 1)])
def test_those_who_leave_together_are_not_copied_over_each_other(
    staying: tuple[int, ...], moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rows of those who stay take places that are freed."""
    driven = driver("llama", max_batch=4)
    landed: list[int] = []
    then = 0
    land = KvSlot.land

    def counted(slot: KvSlot, row: int, lifted: Sequence[Arrays]) -> None:
        landed.append(row)
        land(slot, row, lifted)

    monkeypatch.setattr(KvSlot, "land", counted)

    def leave(turn: int) -> None:
        nonlocal then
        for index in set(range(4)) - set(staying) if turn == 16 else ():
            assert driven.outcomes[f"r{index}"].tokens
            driven.cancel(f"r{index}")
        then = len(landed) if turn <= 20 else then

    driven.run(leave, {4 * index: request(f"r{index}", prompt(30 + index), 40 + index) for index in range(4)})
    assert then == moved * len(model("llama").specs)
    for index in staying:
        expected = reference(model("llama").network, prompt(30 + index), 40 + index)
        assert_same_or_tied(model("llama").network, prompt(30 + index), driven.outcomes[f"r{index}"].tokens, expected)
