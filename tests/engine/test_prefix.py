"""The prefix cache under the engine, on tiny models of every cache kind: a hit gives what a miss gives."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest
from engine_driver import Driver, Outcome, assert_same_or_tied, disk_cache, prefix_cache, reference, request, settle
from prefix_support import check_memory, check_tree
from tiny_models import CONFIGS, STATE_KINDS, capabilities, model, prompt

from millpond.engine import prefixes
from millpond.engine.link import Inbox
from millpond.engine.sequence import Sequence as Running
from millpond.model.blocks import BlockFormat, Stored
from millpond.model.load import LoadedModel
from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Opened
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.query import End
from millpond.prefix.records import BLOCK, Kind
from millpond.settings import SavePolicy
from millpond.types import Finish, PrefixReport, StepPlan

TOP = 20
ANSWER = 8
QUICK = [*((kind, 1) for kind in CONFIGS), ("qwen3", 3), ("mamba", 3), ("llama", 8), ("gemma3_text", 8), ("lfm2", 8)]
REST = [(kind, batch) for kind in CONFIGS for batch in (1, 3, 8) if (kind, batch) not in QUICK]
EXACT = ("gemma3_text", *STATE_KINDS)
"""Kinds that resume at the ends of blocks and answers only."""


@cache
def ungrouped(kind: str) -> LoadedModel:
    """A model whose layers are all of different shapes, as far as its blocks are concerned."""
    form = model(kind).blocks
    assert isinstance(form, BlockFormat)
    apart = {kept: [[leaf] for group in groups for leaf in group] for kept, groups in form.groups.items()}
    return dataclasses.replace(model(kind), blocks=dataclasses.replace(form, groups=apart))


def driver(kind: str, cached: PrefixCache | None, **options: object) -> Driver:
    return Driver(model(kind), capabilities=capabilities(kind), cache=cached, **options)  # type: ignore[arg-type]


@cache
def expected(kind: str, tokens: tuple[int, ...], max_tokens: int) -> list[int]:
    return reference(model(kind).network, tokens, max_tokens)


def right(kind: str, tokens: Sequence[int], outcome: Outcome) -> None:
    answer = outcome.tokens
    assert_same_or_tied(model(kind).network, tokens, answer, expected(kind, tuple(tokens), len(answer)))


def ask(
    kind: str, cached: PrefixCache | None, tokens: Sequence[int], most: int = ANSWER, beside: int = 0, **options: object
) -> Outcome:
    """One request, and unrelated ones beside it."""
    driven = driver(kind, cached, **options)
    for other in range(beside):
        driven.submit(request(f"o{other}", prompt(5 + 9 * other, seed=time.monotonic_ns()), ANSWER + other))
    driven.submit(request("x", tokens, most, logprobs=TOP))
    driven.run()
    found = driven.outcomes["x"]
    assert found.prefix is not None
    if cached is not None:
        check_tree(cached.tree)
        check_memory(cached)
    return found


def drop_tails(cached: PrefixCache) -> None:
    """Leave whole blocks only."""
    for node in list(cached.tree.nodes()):
        if not node.full:
            cached._memory.drop(node)
    cached._version += 1


class Watched:
    """A network that counts the prompt tokens it reads."""

    def __init__(self, network: object) -> None:
        self._network = network
        self.read = 0
        self.chunks: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: object) -> mx.array:
        if tokens.shape[1] > 1:
            self.read += tokens.size
            self.chunks += [tokens.shape[1]] * tokens.shape[0]
        return self._network(tokens, cache=cache)  # type: ignore[operator,no-any-return]


def watched(kind: str, cached: PrefixCache | None, **options: object) -> tuple[Driver, Watched]:
    counting = Watched(model(kind).network)
    broken = dataclasses.replace(model(kind), network=counting)  # type: ignore[arg-type]
    return Driver(broken, capabilities=capabilities(kind), cache=cached, **options), counting  # type: ignore[arg-type]


@dataclasses.dataclass
class Tiers:
    cache: PrefixCache
    ssd: SsdTier
    inbox: Inbox
    kind: str

    @property
    def options(self) -> dict[str, object]:
        return {"ssd": self.ssd, "inbox": self.inbox}

    def settle(self) -> None:
        """Until everything that should be on disk is."""
        settle(self.cache, self.inbox)

    def forget(self) -> None:
        """Memory is cleared; the disk keeps what it has."""
        self.settle()
        self.cache.fit(0)
        assert (self.cache.nbytes, self.cache.blocks) == (0, 0)
        self.cache.fit(1 << 28)


@contextmanager
def tiers(kind: str, folder: Path, policy: SavePolicy = SavePolicy.ALL, **limits: object) -> Iterator[Tiers]:
    cached, ssd, inbox = disk_cache(model(kind), folder, policy, **limits)  # type: ignore[arg-type]
    opened = inbox.get(timeout=30)
    assert isinstance(opened, Opened)
    cached.on_event(opened)
    try:
        yield Tiers(cached, ssd, inbox, kind)
    finally:
        ssd.close(30)


# --- hit equals miss ---------------------------------------------------------------------------------------------


@pytest.mark.often("gemma3_text-8", "llama-1", "mamba-3", "qwen3_next-1", "lfm2-1", "deepseek_v2")
@pytest.mark.parametrize(("kind", "batch"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)])
def test_hit_equals_miss(kind: str, batch: int, tmp_path: Path) -> None:
    """Computed, from RAM, from the SSD, after a restart; alone and among others (D4, E3, E7, F1)."""
    tokens = prompt(150 + batch)
    limit = len(tokens) - 1
    with tiers(kind, tmp_path) as both:
        miss = ask(kind, both.cache, tokens, beside=batch - 1, **both.options)
        assert miss.prefix is not None
        assert miss.prefix.cached == 0
        right(kind, tokens, miss)
        hit = ask(kind, both.cache, tokens, beside=batch - 1, **both.options)
        assert hit.prefix == PrefixReport(memory=limit, end="prompt", known=limit)
        right(kind, tokens, hit)
        both.forget()
        read = ask(kind, both.cache, tokens, beside=batch - 1, **both.options)
        assert read.prefix == PrefixReport(disk=limit, end="prompt", known=limit)
        right(kind, tokens, read)
        both.settle()
    with tiers(kind, tmp_path) as again:
        restarted = ask(kind, again.cache, tokens, beside=batch - 1, **again.options)
        assert restarted.prefix == PrefixReport(disk=limit, end="prompt", known=limit)
        right(kind, tokens, restarted)
    if batch == 1:
        # Nothing is computed but the last token, from copies of the very arrays: even here every bit is the same.
        assert miss.logprobs == hit.logprobs == read.logprobs == restarted.logprobs


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_equal_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks restored, the rest computed in the same chunks: the same bits, from either tier (D4).

    Snapshots of recurrent layers are taken at every chunk's end here, so that there are some to resume from.
    """
    monkeypatch.setattr(prefixes, "MOST_APART", BLOCK)
    tokens = prompt(230)
    with tiers(kind, tmp_path) as both:
        plain = ask(kind, None, tokens, max_chunk=64)
        miss = ask(kind, both.cache, tokens, max_chunk=64, **both.options)
        both.settle()
        drop_tails(both.cache)
        hit = ask(kind, both.cache, tokens, max_chunk=64, **both.options)
        assert hit.prefix is not None
        assert hit.prefix.memory >= 192
        both.forget()
        read = ask(kind, both.cache, tokens, max_chunk=64, **both.options)
        assert read.prefix is not None
        assert (read.prefix.memory, read.prefix.disk > 0) == (0, True)
    assert plain.logprobs == miss.logprobs
    assert miss.logprobs == hit.logprobs
    assert miss.logprobs == read.logprobs
    assert all(len(each.top) == TOP for each in miss.logprobs)


@pytest.mark.often("qwen3_next", "gemma3_text", "mamba")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_next_turn_finds_the_whole_history(kind: str) -> None:
    """Generated tokens are cached up to the last one that was processed (E2)."""
    cached = prefix_cache(model(kind))
    history, before = prompt(100), []
    for turn in range(3):
        outcome = ask(kind, cached, history, most=20)
        right(kind, history, outcome)
        assert outcome.prefix is not None
        if turn:
            assert outcome.prefix.memory == len(before) - 1
        before = history + outcome.tokens
        history = [*before, *prompt(20 + turn)]


@pytest.mark.often("gemma3_text", "64-")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v2"])
@pytest.mark.parametrize("shared", [1, 30, 64, 127, 150])
def test_a_resume_in_the_middle_of_a_block(kind: str, shared: int) -> None:
    """Where every layer allows it, two prompts share what they have in common, to the token (E3)."""
    cached = prefix_cache(model(kind))
    first = prompt(200)
    ask(kind, cached, first)
    second = [*first[:shared], *(255 - token for token in first[shared : shared + 60])]
    outcome = ask(kind, cached, second, max_chunk=64)
    right(kind, second, outcome)
    assert outcome.prefix is not None
    assert outcome.prefix.memory == (shared // BLOCK * BLOCK if kind in EXACT else shared)
    assert outcome.prefix.known == shared
    again = ask(kind, cached, second)
    assert again.prefix == PrefixReport(memory=len(second) - 1, end="prompt", known=len(second) - 1)
    right(kind, second, again)


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_recurrent_models_learn_where_prompts_branch(kind: str) -> None:
    """The second prompt that shares a beginning leaves a snapshot where it branches; the third resumes there (E7)."""
    cached = prefix_cache(model(kind))
    system = prompt(140)
    for number in range(4):
        tokens = system + prompt(40, seed=number)
        outcome = ask(kind, cached, tokens)
        assert outcome.prefix is not None
        if number != 1 or kind == "mamba":  # the others' snapshots are small enough to be taken at every chunk's end
            assert outcome.prefix.memory == (0 if number < 2 else 128)
        right(kind, tokens, outcome)


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_recurrent_models_are_told_where_prompts_branch(kind: str) -> None:
    """(M7) With a snapshot where the client has said so, the second prompt resumes there already."""
    cached = prefix_cache(model(kind))
    system = prompt(140)
    for number in range(3):
        tokens = system + prompt(40, seed=number)
        asked = msgspec.structs.replace(request("x", tokens, ANSWER, logprobs=TOP), shared=[70, 140, 179])
        driven = driver(kind, cached)
        driven.submit(asked)
        driven.run()
        outcome = driven.outcomes["x"]
        assert outcome.prefix is not None
        assert outcome.prefix.memory == (128 if number else 0)
        right(kind, tokens, outcome)


# --- what is computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mamba"])
def test_identical_prompts_are_read_once(kind: str) -> None:
    """However many arrive together (E2)."""
    driven, counting = watched(kind, prefix_cache(model(kind)), max_chunk=64)
    tokens = prompt(200)
    for number in range(5):
        driven.submit(request(f"r{number}", tokens, ANSWER))
    driven.run()
    assert counting.read == len(tokens) - 1
    reports = [outcome.prefix for outcome in driven.outcomes.values()]
    assert sorted(report.cached for report in reports if report) == [0] + [len(tokens) - 1] * 4
    for outcome in driven.outcomes.values():
        right(kind, tokens, outcome)


def test_a_shared_beginning_is_read_once() -> None:
    """Requests of one system prompt that arrive together; each reads its own end (E2)."""
    driven, counting = watched("llama", prefix_cache(model("llama")), max_chunk=64)
    system = prompt(256)
    prompts = {f"r{number}": system + prompt(30, seed=number) for number in range(4)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, ANSWER))
    driven.run()
    assert counting.read == 256 + 4 * 29
    for name, tokens in prompts.items():
        right("llama", tokens, driven.outcomes[name])


def test_what_is_reported_is_what_was_restored() -> None:
    """Tokens read and tokens restored make up each prompt, whatever was cached before (E3)."""
    cached = prefix_cache(model("llama"))
    chooser = random.Random(4)
    known = [prompt(180)]
    for number in range(12):
        tokens = chooser.choice(known)[: chooser.randrange(2, 180)] + prompt(chooser.randrange(3, 60), seed=number)
        driven, counting = watched("llama", cached, max_chunk=64)
        driven.submit(request("x", tokens, 3))
        driven.run()
        report = driven.outcomes["x"].prefix
        assert report is not None
        ones = len(tokens) - 1 - report.cached - counting.read
        assert 0 <= ones <= 2, "forwards of a single prompt token are not counted above"
        right("llama", tokens, driven.outcomes["x"])
        known.append(tokens)


def test_a_request_of_higher_priority_does_not_wait_for_a_lower_one() -> None:
    """The block it needs is being computed by one of lower priority: it computes it itself (D3)."""
    tokens = prompt(400)
    driven = driver("llama", prefix_cache(model("llama")), max_chunk=64)
    first_tokens: list[str] = []

    def watch(turn: int) -> None:
        if turn == 2:
            driven.submit(msgspec.structs.replace(request("high", tokens, 3), priority=5))
        first_tokens.extend(
            name for name, outcome in driven.outcomes.items() if outcome.tokens and name not in first_tokens
        )

    driven.submit(request("low", tokens, 60))
    driven.run(watch)
    assert first_tokens[0] == "high"
    for name in ("low", "high"):
        right("llama", tokens, driven.outcomes[name])


# --- room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("limit", [0, 30_000, 120_000])
def test_a_cache_smaller_than_a_prompt(kind: str, limit: int) -> None:
    """Whatever little fits is used, and the limit holds (E6)."""
    cached = prefix_cache(model(kind), limit_bytes=limit)
    tokens = prompt(300)
    for _ in range(2):
        outcome = ask(kind, cached, tokens, most=4, max_chunk=64)
        right(kind, tokens, outcome)
        assert cached.nbytes <= limit
    assert outcome.prefix is not None
    if limit < 1024:
        assert outcome.prefix.cached == 0
    elif limit == 120_000 and kind in ("llama", "qwen3"):
        assert outcome.prefix.memory > 0, "the beginning of a long prompt is worth having"


def test_rows_prompts_and_blocks_stay_below_one_limit() -> None:
    """At every turn; blocks go before requests are preempted, and nobody is refused (D7)."""
    kv = sum(spec.token_bytes for spec in model("llama").specs)
    limit = kv * 1700
    cached = prefix_cache(model("llama"), limit_bytes=limit // 2)
    driven = driver("llama", cached, max_batch=4, max_chunk=64, limit_bytes=limit)
    most = 0

    def watch(turn: int) -> None:
        nonlocal most
        most = max(most, driven.engine._executor.nbytes + cached.nbytes)
        check_memory(cached)

    arrivals = {turn * 25: request(f"r{turn}", prompt(150, seed=turn % 3), 60, temperature=0.5) for turn in range(14)}
    driven.run(watch, arrivals)
    assert limit // 4 < most <= limit
    assert cached.counters.evicted > 0
    assert cached.counters.hits > 0


@pytest.mark.often("llama")
@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_an_idle_engine_never_refuses(kind: str) -> None:
    """Distinct prompts of ten times the memory have gone through; the largest request that fits still runs (D7)."""
    probe_driver = driver(kind, None)
    budget = probe_driver.scheduler._budget
    limit = budget.alone_bytes(500)
    cached = prefix_cache(model(kind), limit_bytes=limit // 2)
    driven = driver(kind, cached, max_chunk=256, limit_bytes=limit)
    total = 0
    number = 0
    while total < 10 * limit // max(1, model(kind).sizes.token_bytes):
        total += 250
        number += 1
        driven.submit(request(f"r{number}", prompt(250, seed=number), 2))
        if number % 8 == 0:
            driven.run()
    driven.run()
    big = prompt(400)
    driven.submit(request("big", big, 99))
    driven.run()
    assert all(outcome.failure is None for outcome in driven.outcomes.values())
    right(kind, big, driven.outcomes["big"])
    assert cached.nbytes <= limit // 2


def test_a_large_request_leaves_the_cache_its_room_when_it_goes(tmp_path: Path) -> None:
    """What is read from disk right after it, while nothing else runs, is not thrown away again (D7, F8)."""
    budget = driver("llama", None).scheduler._budget
    limit = budget.alone_bytes(500)
    tokens = prompt(200)
    with tiers("llama", tmp_path, limit_bytes=limit // 2) as both:
        options = {**both.options, "limit_bytes": limit}
        ask("llama", both.cache, tokens, **options)
        both.settle()
        large = ask("llama", both.cache, prompt(430), most=60, **options)
        right("llama", prompt(430), large)
        both.settle()
        hit = ask("llama", both.cache, tokens, **options)
        right("llama", tokens, hit)
        assert hit.prefix is not None
        assert hit.prefix.cached == 199


def test_preempted_requests_resume_from_the_cache() -> None:
    """They come back with what they had, and the client is told once what its prompt cost (D7)."""
    kv = sum(spec.token_bytes for spec in model("llama").specs)
    cached = prefix_cache(model("llama"))
    driven, counting = watched("llama", cached, max_batch=4, max_chunk=64, limit_bytes=kv * 2000)
    preempted: list[str] = []
    commit = driven.scheduler.commit

    def watching(plan: StepPlan) -> None:
        preempted.extend(plan.preempt)
        commit(plan)

    driven.scheduler.commit = watching  # type: ignore[method-assign]
    prompts = {f"r{number}": prompt(150, seed=number) for number in range(4)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, 150))
    driven.run()
    assert preempted
    for name, tokens in prompts.items():
        right("llama", tokens, driven.outcomes[name])
        assert driven.outcomes[name].prefix == PrefixReport(end=driven.outcomes[name].prefix.end)  # type: ignore[union-attr]
    # Memory is too short for the blocks of all four; the one that comes back first finds all of its own.
    assert cached.counters.memory_tokens >= 2 * BLOCK
    assert counting.read < 4 * 149 + len(preempted) * 200


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_preempted_answers_of_recurrent_models_go_on_from_a_snapshot(kind: str) -> None:
    """One that loses its row in the middle of its answer is not read again from the end of its prompt (E7, D7)."""
    sizes, cached = model(kind).sizes, prefix_cache(model(kind))
    limit = sizes.token_bytes * 1400 + 8 * sizes.state_bytes
    driven = driver(kind, cached, max_batch=4, max_chunk=64, limit_bytes=limit)
    begin, begun = driven.prefixes.begin, list[int]()

    def watching(sequence: Running, position: int, alone: bool) -> Prompt:
        begun.append(position)
        return begin(sequence, position, alone)

    driven.prefixes.begin = watching  # type: ignore[method-assign]
    prompts = {f"r{number}": prompt(150, seed=number) for number in range(4)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, 150))
    driven.run()
    assert driven.beat.counters.preemptions > 0
    for name, tokens in prompts.items():
        assert driven.outcomes[name].tokens == expected(kind, tuple(tokens), 150)
    assert max(begun) > 150, begun


@pytest.mark.often("gemma3_text")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_layer_of_its_own_shape_is_copied_too(kind: str) -> None:
    """Its record is one array, not a stack: still a buffer of its own, and restored as such (E6, D4)."""
    before_limit = mx.set_cache_limit(0)
    try:
        answers = []
        ask(kind, None, prompt(500, seed=1), most=3)
        gc.collect()
        before = mx.get_active_memory()
        cached = prefix_cache(ungrouped(kind))
        for _ in range(2):
            driven = Driver(ungrouped(kind), capabilities=capabilities(kind), cache=cached)
            driven.submit(request("x", prompt(300), 70, logprobs=TOP))
            driven.run()
            answers.append(driven.outcomes["x"])
        del driven
        gc.collect()
        held = mx.get_active_memory() - before
    finally:
        mx.set_cache_limit(before_limit)
    right(kind, prompt(300), answers[0])
    assert answers[1].prefix == PrefixReport(memory=299, end="prompt", known=299)
    assert answers[1].logprobs == answers[0].logprobs
    arrays = sum(len(record.arrays) for node in cached.tree.nodes() for record in node.records.values())  # type: ignore[attr-defined]
    assert held <= cached.nbytes - 1024 * cached.blocks + 64 * arrays + 4096, "a block keeps a larger buffer alive"


@pytest.mark.often("qwen3_next", "gemma3_text")
@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_hold_no_more_memory_than_they_say(kind: str) -> None:
    """Prompt caches and rows are gone; what remains allocated is what the cache counts (E6).

    Without MLX's own store of freed buffers, which hands out ones that are up to two pages larger than asked for.
    """
    before_limit = mx.set_cache_limit(0)
    try:
        ask(kind, None, prompt(500, seed=1), most=3)
        mx.clear_cache()
        gc.collect()
        before = mx.get_active_memory()
        cached = prefix_cache(model(kind))
        for seed in range(3):
            ask(kind, cached, prompt(400, seed=seed), most=70)
        gc.collect()
        held = mx.get_active_memory() - before
    finally:
        mx.set_cache_limit(before_limit)
    arrays = [
        array
        for node in cached.tree.nodes()
        for record in node.records.values()
        if isinstance(record, Stored)
        for array in record.arrays
    ]
    counted = sum(array.nbytes for array in arrays)
    assert cached.nbytes == counted + 1024 * cached.blocks
    assert held <= counted + 64 * len(arrays) + 4096, "a block keeps a larger buffer alive"


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "qwen3_next"])
def test_a_hit_copies_the_row_and_nothing_else(kind: str) -> None:
    """Peak memory of restoring is the prompt's own cache: no copy of a block beside it (E8)."""
    cached = prefix_cache(model(kind))
    tokens = prompt(450)
    ask(kind, cached, tokens, most=3)
    driven = driver(kind, cached)
    query = cached.query(tokens, "")
    plan = cached.take(query, cached.offer(query, 0.0).position)
    assert plan.position == 449
    form = driven.model.blocks
    assert isinstance(form, BlockFormat)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    restored = form.restored(driven.prefixes._network, plan, 449)
    mx.eval(cache_arrays(restored.caches))
    row = restored.nbytes
    assert mx.get_peak_memory() - before <= 1.05 * row + 16_384


# --- trouble -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("trouble", ["cancel", "error"])
def test_what_was_read_before_the_trouble_is_kept(kind: str, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt ends in the middle, by cancel or by an exception: the next request goes on from there (E2, D6)."""
    monkeypatch.setattr(prefixes, "MOST_APART", BLOCK)
    cached = prefix_cache(model(kind))
    tokens = prompt(400)
    driven, counting = watched(kind, cached, max_chunk=64)
    driven.submit(request("x", tokens, 5))
    forward = Watched.__call__

    def failing(self: Watched, batch: mx.array, cache: object) -> mx.array:
        if self.read >= 128:
            raise RuntimeError("this forward cannot be run")
        return forward(self, batch, cache)

    if trouble == "error":
        with monkeypatch.context() as patch:
            patch.setattr(Watched, "__call__", failing)
            driven.run()
        assert driven.outcomes["x"].failure is not None
    else:
        driven.run(lambda turn: driven.cancel("x") if counting.read >= 128 else None)
        assert driven.outcomes["x"].finish is Finish.CANCELLED
    assert counting.read < 399
    again = ask(kind, cached, tokens, max_chunk=64)
    right(kind, tokens, again)
    assert again.prefix is not None
    assert again.prefix.memory >= 128


class NotFinite:
    """A network whose keys turn to NaN after a certain token."""

    def __init__(self, network: object, token: int) -> None:
        self._network, self._token = network, token

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: Sequence[object]) -> mx.array:
        logits: mx.array = self._network(tokens, cache=cache)  # type: ignore[operator]
        hit = (tokens == self._token).any(axis=1)
        if tokens.shape[1] > 1 and bool(hit.any().item()):
            for layer in cache:
                layer.keys = layer.keys * float("nan")  # type: ignore[attr-defined]
        return mx.where(hit[:, None, None], float("nan"), logits)


def test_numbers_that_are_not_finite_never_enter_the_cache() -> None:
    """The poisoned request fails or answers nonsense; its blocks are not handed to anybody (E4)."""
    bad = 200
    healthy = model("llama")
    broken = dataclasses.replace(healthy, network=NotFinite(healthy.network, bad))  # type: ignore[arg-type]
    cached = prefix_cache(healthy)
    driven = Driver(broken, capabilities=capabilities("llama"), cache=cached, max_chunk=64)
    clean = [token for token in prompt(250) if token != bad][:200]
    poisoned = [*clean[:100], bad, *clean[100:180]]
    driven.submit(request("poisoned", poisoned, 80, logit_bias={bad: -100.0}))
    driven.submit(request("drawn", clean, 70, logit_bias={bad: 100.0}))
    driven.run()
    for node in cached.tree.nodes():
        for record in node.records.values():
            assert isinstance(record, Stored)
            assert all(bool(mx.isfinite(array).all().item()) for array in record.arrays)
    again = ask("llama", cached, clean)
    right("llama", clean, again)
    assert again.prefix is not None
    assert again.prefix.memory >= 64


def spoil(cached: PrefixCache, start: int) -> None:
    """Change the numbers of the block at ``start``."""
    (node,) = (node for node in cached.tree.nodes() if node.start == start and node.full)
    record = node.records[Kind.KV]
    assert isinstance(record, Stored)
    wrong = Stored([array + 3.0 for array in record.arrays])
    mx.eval(wrong.arrays)
    cached._memory.put(node, Kind.KV, wrong)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v2", "qwen3_next"])
def test_a_self_check_finds_and_replaces_a_wrong_block(kind: str) -> None:
    """It is counted, the answer is right, and the next request gets the right block (E4)."""
    cached = prefix_cache(model(kind), selfcheck=1)
    tokens = prompt(200)
    ask(kind, cached, tokens)
    sound = ask(kind, cached, tokens)
    assert sound.prefix == PrefixReport(end="selfcheck", known=199)
    assert cached.counters.checked >= 3
    assert cached.counters.mismatches == 0
    spoil(cached, 64)
    checked = ask(kind, cached, tokens)
    assert cached.counters.mismatches == 1
    right(kind, tokens, checked)
    cached._selfcheck = 0
    after = ask(kind, cached, tokens)
    assert after.prefix is not None
    assert after.prefix.memory == 199
    right(kind, tokens, after)


def test_a_self_check_replaces_a_wrong_block_on_disk(tmp_path: Path) -> None:
    """A wrong block that was saved is found after a restart and does not survive the check (E4, F2)."""
    tokens = prompt(200)
    with tiers("llama", tmp_path) as both:
        unsaved, both.cache._saver.policy = both.cache._saver.policy, SavePolicy.OFF  # type: ignore[union-attr]
        ask("llama", both.cache, tokens, **both.options)
        spoil(both.cache, 64)
        both.cache._saver.policy = unsaved  # type: ignore[union-attr]
        both.cache.save_live()
        both.settle()
    with tiers("llama", tmp_path) as both:
        wrong = ask("llama", both.cache, tokens, **both.options)
        assert wrong.prefix is not None
        assert wrong.prefix.disk == 199
        both.cache._selfcheck = 1
        checked = ask("llama", both.cache, tokens, **both.options)
        right("llama", tokens, checked)
        assert both.cache.counters.mismatches == 1
        both.settle()
    with tiers("llama", tmp_path) as both:
        after = ask("llama", both.cache, tokens, **both.options)
        assert after.prefix is not None
        assert after.prefix.disk == 199
        right("llama", tokens, after)


def test_a_damaged_file_is_computed_afresh(tmp_path: Path) -> None:
    """The reason is told, the answer is right, and the block is stored again (F2)."""
    tokens = prompt(200)
    with tiers("llama", tmp_path) as both:
        ask("llama", both.cache, tokens, **both.options)
        both.settle()
    for path in tmp_path.glob("????????????????/??/*"):
        if path.stat().st_size > 60_000:
            path.write_bytes(path.read_bytes()[:-5] + b"wrong")
    with tiers("llama", tmp_path) as both:
        outcome = ask("llama", both.cache, tokens, **both.options)
        right("llama", tokens, outcome)
        assert outcome.prefix is not None
        assert (outcome.prefix.cached, outcome.prefix.end) == (0, End.DAMAGED)
        both.settle()
    with tiers("llama", tmp_path) as both:
        assert ask("llama", both.cache, tokens, **both.options).prefix == PrefixReport(
            disk=199, end="prompt", known=199
        )


def test_a_disk_that_is_slower_than_computing_is_not_read(tmp_path: Path) -> None:
    """Whether it is known before or found out while waiting (F8)."""
    tokens = prompt(200)
    with tiers("llama", tmp_path) as both:
        ask("llama", both.cache, tokens, **both.options)
        both.forget()
        both.cache.attach(both.ssd, SavePolicy.ALL, lambda start, count: 1e-6)
        asked: list[object] = []
        both.ssd.read = lambda expected, ticket: asked.append(expected)  # type: ignore[method-assign]
        predicted = ask("llama", both.cache, tokens, **both.options)
        assert not asked
        assert predicted.prefix == PrefixReport(end="slower", known=199)
        right("llama", tokens, predicted)
        both.forget()
        both.cache.attach(both.ssd, SavePolicy.ALL, lambda start, count: 0.2)
        both.ssd.read = lambda expected, ticket: None  # type: ignore[method-assign]
        began = time.monotonic()
        hanging = ask("llama", both.cache, tokens, **both.options)
        assert time.monotonic() - began < 20
        assert hanging.prefix == PrefixReport(end="slower", known=199)
        right("llama", tokens, hanging)


@pytest.mark.often("mamba", "llama", "gemma3_text")
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_memory_cannot_hold_is_restored_as_far_as_it_can(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt whose blocks on disk need more memory than cached blocks may take (F8)."""
    monkeypatch.setattr(prefixes, "MOST_APART", BLOCK)
    tokens = prompt(390)
    with tiers(kind, tmp_path) as both:
        ask(kind, both.cache, tokens, max_chunk=64, **both.options)
        both.settle()
        both.forget()
        needs = both.cache.plan(both.cache.query(tokens, ""), disk=True).needs
        all_of_it = sum(node.disk[kind] for node, kind in needs)
        found: list[int] = []
        for share in (1, 0.6, 0.25, 0.005):
            both.forget()
            both.cache.limit_bytes = int(2 * share * all_of_it)
            outcome = ask(kind, both.cache, tokens, max_chunk=64, **both.options)
            right(kind, tokens, outcome)
            assert outcome.prefix is not None
            assert outcome.prefix.memory == 0
            assert (outcome.prefix.end == "memory") == (share < 1)
            assert outcome.prefix.known == len(tokens) - 1
            found.append(outcome.prefix.disk)
    assert found == sorted(found, reverse=True)
    assert found[0] == len(tokens) - 1
    windows = model(kind).blocks.layout.window > 0  # kept of the end alone: nothing before it can be resumed
    assert found[1] == 0 if windows else 0 < found[1] < found[0]
    assert found[-1] == 0


def test_a_deadline_that_passes_between_two_looks_is_not_missed(tmp_path: Path) -> None:
    """Told to wait until a moment that is over when the engine asks how long it may sleep: not for ever (F5)."""
    tokens = prompt(200)
    with tiers("llama", tmp_path) as both:
        ask("llama", both.cache, tokens, **both.options)
        both.forget()
        both.ssd.read = lambda expected, ticket: None  # type: ignore[method-assign]
        driven = driver("llama", both.cache, **both.options)
        driven.submit(request("x", tokens, 2))
        driven.engine._receive()
        now = time.monotonic()
        driven.prefixes.offer(driven.scheduler, driven.engine._sequences, now)
        assert driven.scheduler.plan(now).empty
        waits = driven.prefixes.patience(now)
        assert waits is not None
        assert 0 < waits <= 2
        assert driven.prefixes.patience(now + 100) == 0
        driven.prefixes.offer(driven.scheduler, driven.engine._sequences, now + 100)
        assert not driven.scheduler.plan(now + 100).empty
        assert driven.prefixes.patience(now + 100) is None
        driven.run()


# --- explanations ------------------------------------------------------------------------------------------------


def test_every_end_is_explained() -> None:
    """Why no more was restored, of what only memory can decide; the disk's reasons have their tests above."""
    tokens = prompt(200)
    assert ask("llama", None, tokens).prefix == PrefixReport(end="off")
    cached = prefix_cache(model("llama"))
    explain = driver("llama", cached).prefixes.explain
    assert explain(tokens, "") == PrefixReport(end="empty")
    ask("llama", cached, tokens)
    assert explain(tokens, "") == PrefixReport(memory=199, end="prompt", known=199)
    assert explain([*tokens[:150], *tokens[:50]], "") == PrefixReport(memory=150, end="differs", known=150)
    assert explain(tokens[::-1], "") == PrefixReport(end="differs")
    assert explain(tokens, "another tenant") == PrefixReport(end="differs")
    assert explain([], "") == PrefixReport()
    cached.fit(0)
    assert explain(tokens, "") == PrefixReport(end="evicted")
    recurrent = prefix_cache(model("mamba"))
    ask("mamba", recurrent, tokens)
    ended = driver("mamba", recurrent).prefixes.explain([*tokens[:150], *tokens[:50]], "")
    assert ended == PrefixReport(end="not_restorable", known=150)


def test_salts_do_not_share() -> None:
    """The same prompt under another salt is computed (E1)."""
    cached = prefix_cache(model("llama"))
    tokens = prompt(150)
    for salt, hit in (("a", 0), ("b", 0), ("a", 149), ("", 0), ("b", 149)):
        driven = driver("llama", cached)
        driven.submit(msgspec.structs.replace(request("x", tokens, 4), cache_salt=salt))
        driven.run()
        report = driven.outcomes["x"].prefix
        assert report is not None
        assert report.memory == hit
        right("llama", tokens, driven.outcomes["x"])
