"""What goes wrong inside the engine: sampling, memory, and how soon it lets go of what nobody wants any more."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from engine_driver import Driver, Outcome, request
from tiny_models import CONFIGS, VOCAB, save

from kvarn.engine.refusals import failure
from kvarn.model.load import LoadedModel, load
from kvarn.model.probe import Capabilities, probe
from kvarn.types import ErrorKind, Finish, Request
from kvarn.wire import Beat

OUT_OF_MEMORY = (
    MemoryError("std::bad_alloc"),
    RuntimeError("[metal::malloc] Unable to allocate 9663676416 bytes."),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
    RuntimeError("CUDA error: out of memory"),
)


@cache
def model(kind: str) -> LoadedModel:
    return load(save(kind, Path(mkdtemp())), 0, lambda fraction: None)


@cache
def capabilities(kind: str) -> Capabilities:
    return probe(model(kind))


def driver(kind: str = "llama", **options: int) -> Driver:
    return Driver(model(kind), capabilities=capabilities(kind), **options)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    chooser = random.Random(length * 1000 + seed)
    return [chooser.randrange(VOCAB) for _ in range(length)]


def alone(name: str, **params: object) -> Outcome:
    driven = driver()
    driven.submit(request(name, prompt(40 + int(name[1:])), 20, **params))
    driven.run()
    return driven.outcomes[name]


# --- sampling ---------------------------------------------------------------------------------------------------

UNSAMPLEABLE: dict[str, dict[str, object]] = {
    "a seed of 70 bits": {"seed": 1 << 70, "temperature": 1.0},
    "a temperature that is none": {"temperature": float("nan"), "seed": 1},
    "a bias of a token that is none": {"logit_bias": {VOCAB + 7: 1.0}},
    "more alternatives than there are tokens": {"logprobs": 100 * VOCAB},
    "a penalty that is none": {"repetition_penalty": 0.0},
}
"""Parameters that the front end refuses, as a request that got past it."""


@pytest.mark.parametrize("why", UNSAMPLEABLE)
@pytest.mark.parametrize("at", [0, 8])
def test_a_request_that_cannot_be_sampled_fails_alone(why: str, at: int) -> None:
    """(D6; L: engine exception in sampling) Its neighbours' tokens are those they would have had without it, seeds and
    penalties included; whether it comes first or in the middle."""
    driven = driver()
    variants: dict[str, dict[str, object]] = {
        "r0": {},
        "r1": {"temperature": 0.9, "seed": 7},
        "r2": {"repetition_penalty": 1.2, "logprobs": 2},
    }

    def arrive(turn: int) -> None:
        if turn == at:
            driven.submit(request("poison", prompt(30), 20, **UNSAMPLEABLE[why]))
        if turn == 0:
            for name, params in variants.items():
                driven.submit(request(name, prompt(40 + int(name[1:])), 20, **params))

    driven.run(arrive)
    for name, params in variants.items():
        assert driven.outcomes[name].finish is Finish.LENGTH
        assert driven.outcomes[name].tokens == alone(name, **params).tokens
    poison = driven.outcomes["poison"]
    if poison.failure is not None:
        assert poison.failure.kind is ErrorKind.ENGINE
    else:
        assert len(poison.tokens) == 20
    assert driven.scheduler.idle


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_no_memory_is_a_503_on_every_back_end(error: Exception) -> None:
    failed = failure("r", error)
    assert failed.kind is ErrorKind.UNAVAILABLE
    assert "memory" in failed.message
    assert "bytes" not in failed.message


def test_other_errors_stay_the_engines_fault() -> None:
    assert failure("r", RuntimeError("[matmul] shapes do not match")).kind is ErrorKind.ENGINE


class Starved:
    """A network that runs out of memory in a forward of its kind, while ``short`` says so."""

    def __init__(self, network: object, where: str) -> None:
        self._network, self._where, self.short = network, where, True

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: object) -> mx.array:
        if self.short and (self._where == "prefill") == (tokens.shape[1] > 1):
            raise RuntimeError("[malloc] Unable to allocate 123456789 bytes.")
        logits: mx.array = self._network(tokens, cache=cache)  # type: ignore[operator]
        return logits


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_running_out_of_memory_ends_requests_with_503_and_the_engine_goes_on(where: str) -> None:
    """(L: out of KV memory) Nothing stays behind, and once there is memory again everything works as before."""
    healthy = model("llama")
    starved = Starved(healthy.network, where)
    driven = Driver(
        dataclasses.replace(healthy, network=starved),
        capabilities=capabilities("llama"),
    )
    for index in range(4):
        driven.submit(request(f"r{index}", prompt(40 + index), 20))
    driven.run()
    for index in range(4):
        failed = driven.outcomes[f"r{index}"].failure
        assert failed is not None
        assert failed.kind is ErrorKind.UNAVAILABLE
    starved.short = False
    for index in range(4):
        driven.submit(request(f"r{index}", prompt(40 + index), 20))
    driven.run()
    for index in range(4):
        assert driven.outcomes[f"r{index}"].tokens == alone(f"r{index}").tokens


def test_an_engine_never_refuses_for_what_it_has_cached_or_held_before() -> None:
    """(D7) Several times the memory passes through; each request that fits alone is served, idle or not."""
    kv = sum(spec.token_bytes for spec in model("llama").specs)
    driven = driver(max_rows=4, limit_bytes=kv * 1300)
    driven.run(arrivals={3 * n: request(f"r{n}", prompt(100 + n), 10) for n in range(40)})
    assert all(outcome.finish is Finish.LENGTH for outcome in driven.outcomes.values())


# --- what is told -----------------------------------------------------------------------------------------------


def test_the_begin_of_a_prompt_is_told_once_and_before_its_first_token() -> None:
    """(B10) The queue's time-out ends there: one delta without tokens, however many chunks the prompt has."""
    driven = driver(max_rows=1, max_chunk=64)
    for name, length in (("long", 300), ("short", 30)):
        driven.submit(request(name, prompt(length), 5))
    silent_turns = 0

    def watch(_turn: int) -> None:
        nonlocal silent_turns
        long, short = driven.outcomes["long"], driven.outcomes["short"]
        for outcome in (long, short):
            assert not outcome.tokens or outcome.prefix is not None
        begun = [outcome for outcome in (long, short) if outcome.prefix is not None]
        assert len(begun) < 2 or begun[0].endings or begun[1].endings, "there is one place"
        silent_turns += long.prefix is not None and not long.tokens

    driven.run(watch)
    assert silent_turns >= 3, "the chunks of the long one come after its begin was told"


def test_work_is_reported_before_its_first_step() -> None:
    """(K2) Should that step hang, the beats must not go on saying that there is nothing to do."""
    healthy = model("llama")
    seen: list[Beat] = []

    class Watched(Starved):
        def __call__(self, tokens: mx.array, cache: object) -> mx.array:
            seen.append(driven.beat)
            return super().__call__(tokens, cache)

    watched = Watched(healthy.network, "prefill")
    watched.short = False
    driven = Driver(
        dataclasses.replace(healthy, network=watched),
        capabilities=capabilities("llama"),
    )
    driven.submit(request("a", prompt(100), 3))
    driven.run()
    assert seen[0].waiting + seen[0].running == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cancel_in_the_middle_of_a_long_prompt_ends_it_within_one_step(kind: str) -> None:
    """(B11, D3) No chunk is computed after it, its memory is given back in the same turn."""
    driven = driver(kind, max_chunk=64)
    driven.submit(request("gone", prompt(400), 20))
    for _ in range(3):
        driven.engine.turn()
    held, steps = driven.beat.kv_bytes, driven.beat.step
    assert held > 0
    assert driven.beat.waiting == 1
    driven.cancel("gone")
    driven.engine.turn()
    assert driven.outcomes["gone"].finish is Finish.CANCELLED
    assert driven.beat.step == steps
    assert driven.beat.waiting == 0
    assert driven.beat.kv_bytes < held or driven.beat.kv_bytes == 0
    driven.run()


# --- order ------------------------------------------------------------------------------------------------------


def test_priority_and_client_reach_the_scheduler() -> None:
    """A request of a higher priority goes first, and one of another client before the rest of a flood."""

    def asked(name: str, client: str, priority: int = 0) -> Request:
        plain = request(name, prompt(30), 6)
        return Request(id=name, tokens=plain.tokens, params=plain.params, client=client, priority=priority)

    driven = driver(max_rows=1)
    order: list[str] = []

    def watch(turn: int) -> None:
        if turn == 0:
            for index in range(6):
                driven.submit(asked(f"flood {index}", "a"))
        if turn == 4:
            driven.submit(asked("single", "b"))
            driven.submit(asked("urgent", "a", priority=1))
        order.extend(name for name, outcome in driven.outcomes.items() if outcome.endings and name not in order)

    driven.run(watch)
    order.extend(name for name in driven.outcomes if name not in order)
    assert order.index("urgent") == 1
    assert order.index("single") <= 3
