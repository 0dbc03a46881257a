"""What goes wrong inside the engine: sampling, memory, and how soon it lets go of what nobody wants any more."""

from __future__ import annotations

import dataclasses
from functools import cache

import mlx.core as mx
import msgspec
import pytest
from engine_driver import Driver, Outcome, prefix_cache, request
from tiny_models import CONFIGS, VOCAB, capabilities, model, prompt

from millpond.engine.requests import failure
from millpond.sample.edits import RowEdits
from millpond.sample.state import SamplingState
from millpond.types import ErrorKind, Finish, Request
from millpond.wire import Beat, Explain, Explained, Failed, FromEngine

OUT_OF_MEMORY = (
    MemoryError("std::bad_alloc"),
    RuntimeError("[metal::malloc] Unable to allocate 9663676416 bytes."),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
    RuntimeError("CUDA error: out of memory"),
)


def driver(kind: str = "llama", **options: int) -> Driver:
    return Driver(model(kind), capabilities=capabilities(kind), **options)  # type: ignore[arg-type]


def alone(name: str, **params: object) -> Outcome:
    driven = driver()
    driven.submit(request(name, prompt(40 + int(name[1:])), 20, **params))
    driven.run()
    return driven.outcomes[name]


# --- sampling ---------------------------------------------------------------------------------------------------

ODD: dict[str, dict[str, object]] = {
    "a seed of 70 bits": {"seed": 1 << 70, "temperature": 1.0},
    "a temperature that is none": {"temperature": float("nan"), "seed": 1},
    "a share that is none": {"min_p": float("nan"), "temperature": 1.0},
    "a nucleus that is none": {"top_p": float("inf"), "temperature": 1.0},
    "a rank of 70 bits": {"top_k": 1 << 70, "temperature": 1.0},
    "a bias of a token that is none": {"logit_bias": {VOCAB + 7: 1.0}},
    "biases of half of all tokens": {"logit_bias": {token: token % 7 - 3.0 for token in range(VOCAB // 2)}},
    "more alternatives than there are tokens": {"logprobs": 100 * VOCAB},
    "a penalty that is none": {"repetition_penalty": 0.0},
}
"""Parameters that the front end refuses, as a request that got past it, and such as are large."""
WRONG = ("is none", "more alternatives", "penalty")
NEIGHBOURS: dict[str, dict[str, object]] = {
    "r0": {},
    "r1": {"temperature": 0.9, "seed": 7},
    "r2": {"repetition_penalty": 1.2, "logprobs": 2},
    "r3": {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.7, "logit_bias": {3: 2.0}},
}


@cache
def neighbour_alone(name: str) -> list[int]:
    return alone(name, **NEIGHBOURS[name]).tokens


def beside_neighbours(driven: Driver, odd: Request, at: int) -> Outcome:
    """What becomes of a request that comes at the turn ``at``. For the others it is as if it were not there: their
    tokens are their own, no step fails, and nothing is read twice."""

    def arrive(turn: int) -> None:
        if turn == at:
            driven.submit(odd)
        if turn == 0:
            for name, params in NEIGHBOURS.items():
                driven.submit(request(name, prompt(40 + int(name[1:])), 20, **params))

    driven.run(arrive)
    for name in NEIGHBOURS:
        assert driven.outcomes[name].finish is Finish.LENGTH
        assert driven.outcomes[name].tokens == neighbour_alone(name)
    counters = driven.beat.counters
    assert counters.failed_steps == 0
    read_once = sum(40 + int(name[1:]) for name in NEIGHBOURS)
    assert counters.prefill_tokens in (read_once, read_once + len(odd.tokens))
    return driven.outcomes[odd.id]


@pytest.mark.parametrize("why", ODD)
@pytest.mark.parametrize("at", [0, 8])
def test_a_request_that_cannot_be_sampled_fails_alone(why: str, at: int) -> None:
    """(D6; L: engine exception in sampling) Whether it comes first or in the middle."""
    outcome = beside_neighbours(driver(), request("odd", prompt(30), 20, **ODD[why]), at)
    if any(word in why for word in WRONG) and "bias" not in why:
        assert outcome.failure is not None
        assert outcome.failure.kind is ErrorKind.ENGINE
    else:
        assert len(outcome.tokens) == 20


@pytest.mark.parametrize("at", [0, 8])
@pytest.mark.parametrize("where", ["ahead", "take"])
def test_what_sampling_knows_of_a_request_may_fail_at_any_step(
    where: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step is built, or when its token is taken: that request ends, the step goes on."""
    method, calls = getattr(SamplingState, where), 0

    def failing(state: SamplingState, *args: object) -> object:
        nonlocal calls
        calls += state.params.seed == 666
        if state.params.seed == 666 and calls == 4:
            raise RuntimeError("its own part cannot be made")
        return method(state, *args)

    monkeypatch.setattr(SamplingState, where, failing)
    outcome = beside_neighbours(driver(), request("odd", prompt(30), 20, seed=666, presence_penalty=0.1), at)
    assert outcome.failure is not None
    assert outcome.failure.kind is ErrorKind.ENGINE
    assert len(outcome.tokens) == 3
    assert calls == 4


def test_rows_that_come_and_go_replay_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What penalties depend on is kept with the request: every drawn token is taken in once, whoever joins or leaves,
    and also by those that lose their row and are computed again."""
    made, taken = 0, 0
    begin, take = RowEdits.__init__, RowEdits.take

    def counted_begin(edits: RowEdits, *args: object) -> None:
        nonlocal made
        made += 1
        begin(edits, *args)  # type: ignore[arg-type]

    def counted_take(edits: RowEdits, token: int) -> None:
        nonlocal taken
        taken += 1
        take(edits, token)

    monkeypatch.setattr(RowEdits, "__init__", counted_begin)
    monkeypatch.setattr(RowEdits, "take", counted_take)
    driven = driver(max_batch=4, limit_bytes=1500 * sum(spec.token_bytes for spec in model("llama").specs))
    penalised = {"repetition_penalty": 1.3, "presence_penalty": 0.2}
    lengths = [300, 300, 300, 9, 20]
    arrivals = {9 * n: request(f"r{n}", prompt(60 + n), most, **penalised) for n, most in enumerate(lengths)}
    driven.run(arrivals=arrivals)
    assert driven.beat.counters.preemptions > 0
    assert made == len(lengths)
    assert taken == sum(lengths)


def test_a_prompt_that_cannot_be_explained_ends_nothing() -> None:
    """Neither ids that are none of the model's nor what cannot be made a key."""
    model_ = model("llama")
    cached = Driver(model_, capabilities=capabilities("llama"), cache=prefix_cache(model_))
    answers: list[object] = []
    send = cached.send

    def heard(message: FromEngine) -> None:
        if isinstance(message, Explained) or (isinstance(message, Failed) and message.id.startswith("explain")):
            answers.append(message)
        else:
            send(message)

    cached.send = heard  # type: ignore[method-assign]
    cached.submit(request("r", prompt(40), 20))
    for number, (tokens, salt) in enumerate([([1, 1 << 40], ""), ([-1], ""), ([1, 2], "\ud800"), ([1, 2], "")]):
        cached.inbox.put(Explain(f"explain {number}", tokens, salt))
    cached.run()
    assert [type(answer) for answer in answers] == [Failed, Failed, Failed, Explained]
    assert [answer.kind for answer in answers if isinstance(answer, Failed)] == [
        ErrorKind.INVALID,
        ErrorKind.INVALID,
        ErrorKind.ENGINE,
    ]
    assert len(cached.outcomes["r"].tokens) == 20


def test_a_request_whose_prefixes_cannot_be_named_fails_alone() -> None:
    model_ = model("llama")
    cached = Driver(model_, capabilities=capabilities("llama"), cache=prefix_cache(model_))
    odd = msgspec.structs.replace(request("odd", prompt(30), 20), cache_salt="\ud800")
    outcome = beside_neighbours(cached, odd, 8)
    assert outcome.failure is not None


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
    driven = driver(max_batch=4, limit_bytes=kv * 1300)
    driven.run(arrivals={3 * n: request(f"r{n}", prompt(100 + n), 10) for n in range(40)})
    assert all(outcome.finish is Finish.LENGTH for outcome in driven.outcomes.values())


# --- what is told -----------------------------------------------------------------------------------------------


def test_the_begin_of_a_prompt_is_told_once_and_before_its_first_token() -> None:
    """(B10) The queue's time-out ends there: one delta without tokens, however many chunks the prompt has."""
    driven = driver(max_batch=1, max_chunk=64)
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

    driven = driver(max_batch=1)
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
