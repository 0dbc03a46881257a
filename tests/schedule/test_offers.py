"""What the prefix cache offers, as the scheduler uses it: where prefills start, end, and who waits for whom."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.memory.budget import CacheSizes, MemoryBudget
from millpond.schedule.costs import CostModel
from millpond.schedule.scheduler import Limits, Scheduler
from millpond.types import GRID, StepPlan

PLENTY = MemoryBudget(CacheSizes(1), limit_bytes=1 << 40)


def make(max_chunk: int = 512, max_batch: int = 8, budget: MemoryBudget = PLENTY) -> Scheduler:
    costs = CostModel()
    for _ in range(4):
        for tokens in (64, 128, 512):
            costs.observe_prefill(0, tokens, float(tokens))
    return Scheduler(Limits(max_batch=max_batch, max_itl_ms=200.0, max_chunk=max_chunk), budget, costs)


def add(scheduler: Scheduler, name: str, prompt: int, priority: int = 0, now: float = 0.0) -> None:
    scheduler.add(name, prompt, 50, priority, "", now)


def cuts(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(chunk.id, chunk.start, chunk.end, chunk.last) for chunk in plan.prefill]


def step(scheduler: Scheduler) -> list[tuple[str, int, int, bool]]:
    plan = scheduler.plan(0.0)
    assert plan == scheduler.plan(0.0)
    scheduler.commit(plan)
    scheduler.check()
    return cuts(plan)


@pytest.mark.parametrize(
    ("cached", "chunks"),
    [
        (0, [(0, 512, False), (512, 576, False), (576, 599, True)]),
        (64, [(64, 576, False), (576, 599, True)]),
        (100, [(100, 576, False), (576, 599, True)]),
        (577, [(577, 599, True)]),
        (576, [(576, 599, True)]),
        (599, [(599, 599, True)]),
    ],
)
def test_chunks_begin_where_the_restore_ends(cached: int, chunks: list[tuple[int, int, bool]]) -> None:
    """They end on the grid whatever they begin with, but for the tail (E3, D4)."""
    scheduler = make()
    add(scheduler, "a", 600)
    scheduler.offer("a", cached, None)
    done = []
    while "a" not in scheduler.rows:
        done += [(start, end, last) for _, start, end, last in step(scheduler)]
        if "a" not in scheduler.rows:
            scheduler.offer("a", 0, None)
    assert done == chunks


def test_an_offer_is_within_the_prompt() -> None:
    scheduler = make()
    add(scheduler, "a", 100)
    for cached in (-1, 100):
        with pytest.raises(ValueError, match="can be restored"):
            scheduler.offer("a", cached, None)
    with pytest.raises(KeyError):
        scheduler.offer("b", 0, None)


def test_a_chunk_ends_where_it_is_told_to() -> None:
    """A snapshot is taken there (E7); before and behind it nothing changes."""
    scheduler = make()
    add(scheduler, "a", 1000)
    scheduler.offer("a", 0, None, stops=(192,))
    assert step(scheduler)[0] == ("a", 0, 192, False)
    scheduler.offer("a", 0, None, stops=(192,))
    assert scheduler.plan(0.0).prefill[0].start >= 192
    twice = make()
    add(twice, "a", 1000)
    twice.offer("a", 0, None, stops=(0, 128, 320, 2000))
    assert [(chunk.start, chunk.end) for chunk in twice.plan(0.0).prefill] == [(0, 128), (128, 320), (320, 512)]
    other = make()
    add(other, "b", 100)
    other.offer("b", 64, None, stops=(64,))
    assert step(other) == [("b", 64, 99, True)]


def test_whoever_is_held_does_not_start_and_stops_nobody() -> None:
    """It waits for the disk; those behind it go on (F5)."""
    scheduler = make()
    add(scheduler, "a", 100)
    add(scheduler, "b", 100)
    scheduler.offer("a", 0, None, held=True)
    scheduler.offer("b", 0, None)
    assert {cut[0] for cut in step(scheduler)} == {"b"}
    assert step(scheduler) == []
    scheduler.offer("a", 64, None)
    assert step(scheduler) == [("a", 64, 99, True)]


def test_of_several_that_want_a_block_one_computes_it() -> None:
    """The others wait, with what they have; somebody with another block to compute does not (E2)."""
    scheduler = make(max_chunk=64)
    for name, wants in (("a", b"x"), ("b", b"x"), ("c", b"x")):
        add(scheduler, name, 200)
        scheduler.offer(name, 0, wants)
    assert step(scheduler) == [("a", 0, 64, False)]
    for name in "abc":
        scheduler.offer(name, 0 if name == "a" else 64, b"y")
    assert {cut[0] for cut in step(scheduler)} == {"a"}
    add(scheduler, "d", 30)
    for name, cached, wants in (("a", 0, b"z"), ("b", 128, b"z"), ("c", 128, b"z"), ("d", 0, b"other")):
        scheduler.offer(name, cached, wants)
    assert "d" in {cut[0] for cut in step(scheduler)} | {cut[0] for cut in step(scheduler)}
    scheduler.remove("a")
    scheduler.offer("b", 128, b"z")
    scheduler.offer("c", 128, b"z")
    names = {cut[0] for cut in step(scheduler)}
    assert len(names & {"b", "c"}) == 1, "whoever computed it is gone: one other takes over"


def test_nobody_waits_for_a_lower_priority() -> None:
    """The lower one may never get on; a higher or equal one will (D3)."""
    scheduler = make(max_chunk=64)
    add(scheduler, "low", 400, priority=0)
    scheduler.offer("low", 0, b"x")
    step(scheduler)
    scheduler.offer("low", 0, b"x")
    add(scheduler, "high", 400, priority=1)
    scheduler.offer("high", 0, b"x")
    add(scheduler, "equal", 400, priority=0)
    scheduler.offer("equal", 0, b"x")
    assert {cut[0] for cut in step(scheduler)} == {"high"}
    assert "equal" not in {cut[0] for cut in step(scheduler)}


def test_work_left_counts_after_the_cache() -> None:
    """A long prompt of which most is cached goes before a shorter one of which nothing is."""
    scheduler = make(max_chunk=64)
    add(scheduler, "short", 400)
    add(scheduler, "long", 2000)
    scheduler.offer("short", 0, None)
    scheduler.offer("long", 1930, None)
    assert step(scheduler)[0][:2] == ("long", 1930)


def test_an_offer_does_not_outlive_a_preemption() -> None:
    scheduler = make()
    add(scheduler, "a", 200)
    scheduler.offer("a", 150, b"x", stops=(128,))
    step(scheduler)
    scheduler.requeue("a", 201, 1.0)
    assert cuts(scheduler.plan(1.0))[0][:2] == ("a", 0)


# --- all at random -----------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A prompt that shares its first ``shared`` tokens with all others of its family."""

    family: int
    shared: int
    prompt: int
    priority: int
    arrival: int
    held_until: int
    """Step up to which it waits for the disk."""
    answer: int


@dataclass
class Simulation:
    """An engine with a cache of whole blocks that loses some now and then; every block has a name."""

    jobs: list[Job]
    seed: int
    forgetful: bool
    budget: MemoryBudget
    max_chunk: int
    cached: set[tuple[object, ...]] = field(default_factory=set)
    progress: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    computed: int = 0

    def block(self, job: Job, number: int, index: int) -> tuple[object, ...]:
        own = (index + 1) * GRID > job.shared
        return (job.family, number if own else "shared", index)

    def restorable(self, name: str, partial: bool) -> int:
        job, number = self.jobs[int(name)], int(name)
        limit = self.tokens[name] - 1
        blocks = 0
        while (blocks + 1) * GRID <= limit and self.block(job, number, blocks) in self.cached:
            blocks += 1
        position = blocks * GRID
        if partial and blocks:  # in the middle of a block, as a tail of another prompt would allow
            position = min(limit, position + self.rng.randrange(GRID))
        return position

    def run(self) -> None:
        self.rng = random.Random(self.seed)
        self.scheduler = scheduler = make(self.max_chunk, 4, self.budget)
        answered: dict[str, int] = {}
        finished: set[str] = set()
        bound = 200 + sum(job.held_until + 4 * (job.prompt // GRID + job.answer + 4) for job in self.jobs)
        now = 0
        while len(finished) < len(self.jobs):
            assert now < bound, "somebody waits for ever"
            for number, job in enumerate(self.jobs):
                if job.arrival == now or (now == 0 and job.arrival <= 0):
                    scheduler.add(str(number), job.prompt, job.answer, job.priority, "", float(now))
                    self.tokens[str(number)] = job.prompt
            if self.forgetful and self.rng.random() < 0.2:
                self.cached = {block for block in self.cached if self.rng.random() < 0.5}
            offered: dict[str, tuple[int, bytes | None, bool, tuple[int, ...]]] = {}
            for name, done in scheduler.queue:
                position = done or self.restorable(name, self.rng.random() < 0.3)
                limit = self.tokens[name] - 1
                job = self.jobs[int(name)]
                wants = repr(self.block(job, int(name), position // GRID)).encode() if position < limit else None
                stops = self.rng.choice([(), (job.shared // GRID * GRID,), (GRID, job.shared // GRID * GRID)])
                offered[name] = (0 if done else position, wants, not done and now < job.held_until, stops)
                scheduler.offer(name, *offered[name])
            plan = scheduler.plan(float(now))
            assert plan == scheduler.plan(float(now)), "plan() is pure"
            free = [name for name, offer in offered.items() if not offer[2]]
            assert not plan.empty or not free, "somebody could go on and nobody does"
            self.execute(plan, offered)
            scheduler.commit(plan)
            scheduler.check()
            for name in plan.preempt:
                self.progress.pop(name, None)
            for name in scheduler.rows:
                self.progress.pop(name, None)
                self.tokens[name] += 1
                answered[name] = answered.get(name, 0) + 1
                if answered[name] == self.jobs[int(name)].answer:
                    scheduler.remove(name)
                    finished.add(name)
            now += 1

    def execute(self, plan: StepPlan, offered: dict[str, tuple[int, bytes | None, bool, tuple[int, ...]]]) -> None:
        going_on = [name for name in self.progress if name not in plan.preempt]
        starting = [(wants, self.jobs[int(name)].priority) for name in going_on if (wants := offered[name][1])]
        for c in plan.prefill:
            position, wants, held, stops = offered[c.id]
            limit = self.tokens[c.id] - 1
            begun = c.id in self.progress
            assert c.start == self.progress.get(c.id, position), "it starts where its restore ends"
            assert begun or not held, "held, and yet it started"
            assert c.last == (c.end == limit)
            assert c.end % GRID == 0 or (c.last and c.start >= limit // GRID * GRID), "off the grid"
            assert not any(c.start < stop < c.end for stop in stops), "it ran over the place where it was to stop"
            if not begun and wants is not None:
                priority = self.jobs[int(c.id)].priority
                assert all(other != wants or held_by < priority for other, held_by in starting), "computed twice"
                starting.append((wants, priority))
            self.progress[c.id] = c.end
            self.computed += c.end - c.start
            for index in range(c.start // GRID, c.end // GRID):
                self.cached.add(self.block(self.jobs[int(c.id)], int(c.id), index))


jobs = st.lists(
    st.builds(
        Job,
        family=st.integers(0, 2),
        shared=st.sampled_from([0, 64, 200, 512]),
        prompt=st.one_of(st.integers(1, 800), st.sampled_from([1, 64, 65, 513])),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        arrival=st.integers(0, 12),
        held_until=st.sampled_from([0, 0, 5, 40]),
        answer=st.integers(1, 12),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(jobs, st.integers(0, 1000), st.booleans(), st.sampled_from([1 << 40, 6000]), st.sampled_from([64, 256]))
def test_nobody_waits_for_ever(jobs: list[Job], seed: int, forgetful: bool, limit: int, chunk: int) -> None:
    """Whatever is offered, forgotten and held: all end, chunks are where they belong, no deadlock (D3, E2)."""
    budget = MemoryBudget(CacheSizes(1), limit_bytes=limit)
    Simulation(jobs, seed, forgetful, budget, chunk).run()


def test_a_common_beginning_is_computed_once() -> None:
    """Ten requests of one family that arrive at different times (E2)."""
    jobs = [Job(0, 512, 560 + number, 0, number // 3, 0, 5) for number in range(10)]
    simulation = Simulation(jobs, 0, False, PLENTY, 64)
    simulation.run()
    assert simulation.computed <= 512 + sum(job.prompt - 1 - 512 for job in jobs)
