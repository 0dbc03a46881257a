"""Fair shares between clients, priorities, and the predicted wait: simulations with a clock and costs of their own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from millpond.memory.budget import CacheSizes, MemoryBudget
from millpond.schedule.costs import CostModel
from millpond.schedule.scheduler import Limits, Scheduler

QUICK = settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""Without shrinking, which would take minutes here."""
PLENTY = MemoryBudget(CacheSizes(1), limit_bytes=1 << 40)
LONGEST = 4000


@dataclass(frozen=True)
class Job:
    """A request whose answer ends after ``answer`` of at most ``most`` tokens."""

    client: str
    arrival: float
    prompt: int = 200
    answer: int = 30
    most: int = 0
    priority: int = 0


@dataclass
class World:
    """An engine that costs 10 + tokens ms for a chunk and 30 + 3 * rows ms for a decode."""

    rows: int = 8
    budget: MemoryBudget = PLENTY
    clock: float = 0.0
    jobs: dict[str, Job] = field(default_factory=dict)
    produced: dict[str, int] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    coming: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        costs = CostModel()
        for tokens, rows in ((64, 1), (256, 4), (512, 8), (128, 2), (64, 8), (512, 1), (256, 6)) * 4:
            costs.observe_prefill(0, tokens, 10.0 + tokens)
            costs.observe_decode(rows, 300 * rows, 30.0 + 3.0 * rows)
        self.scheduler = Scheduler(Limits(self.rows, 400.0, 512), self.budget, costs)

    def add(self, job: Job) -> str:
        name = str(len(self.jobs))
        self.jobs[name] = job
        self.coming.append((job.arrival, name))
        self.coming.sort(reverse=True)
        return name

    def arrive(self) -> None:
        while self.coming and self.coming[-1][0] <= self.clock:
            _, name = self.coming.pop()
            job = self.jobs[name]
            most = max(job.answer, job.most)
            self.scheduler.add(name, job.prompt, most, job.priority, job.client, job.arrival)
            self.produced[name] = 0

    def step(self) -> None:
        self.arrive()
        plan = self.scheduler.plan(self.clock)
        if plan.empty:
            assert self.coming, "an engine with work must not idle"
            self.clock = self.coming[-1][0]
            return
        for chunk in plan.prefill:
            self.begun.setdefault(chunk.id, self.clock)
            self.clock += (10.0 + chunk.end - chunk.start) / 1000.0
        self.scheduler.commit(plan)
        self.scheduler.check()
        rows = self.scheduler.rows
        self.clock += (30.0 + 3.0 * len(rows)) / 1000.0 if rows else 0.0
        for name in rows:
            self.produced[name] += 1
            if self.produced[name] == self.jobs[name].answer:
                self.scheduler.remove(name)
                self.ended[name] = self.clock

    def until(self, clock: float) -> None:
        while self.clock < clock and (self.coming or not self.scheduler.idle):
            self.step()

    def finish(self) -> None:
        while self.coming or not self.scheduler.idle:
            self.step()
        assert self.ended.keys() == self.jobs.keys()

    def begun_between(self, client: str, after: float, before: float) -> int:
        """How many of a client's requests were begun in this time."""
        return sum(after <= at < before for name, at in self.begun.items() if self.jobs[name].client == client)


# --- fair shares ------------------------------------------------------------------------------------------------


@QUICK
@given(
    rows=st.integers(1, 12),
    late=st.floats(0, 60),
    prompt=st.integers(1, LONGEST),
    flood=st.integers(50, 200),
    size=st.integers(10, 600),
)
def test_a_flood_delays_another_client_by_few_answers(
    rows: int, late: float, prompt: int, flood: int, size: int
) -> None:
    """(D3) Whenever it comes, however long the flood has waited: at most as many as there are rows, and one for two
    seconds that its own prompt takes, go before it."""
    world = World(rows)
    for _ in range(flood):
        world.add(Job("flood", 0.0, prompt=size))
    single = world.add(Job("single", late, prompt=prompt))
    world.finish()
    waited = world.begun_between("flood", late, world.begun[single])
    assert waited <= rows + 1 + LONGEST / 2000


def test_age_does_not_buy_a_flood_its_way_past_others() -> None:
    """The same at every age of the flood; with ages that count without end it gets worse with every minute."""
    delays = []
    for late in (1.0, 20.0, 60.0):
        world = World(rows=2)
        for _ in range(200):
            world.add(Job("flood", 0.0))
        single = world.add(Job("single", late))
        world.finish()
        assert max(world.begun.values()) > late + 5.0, "the flood is still there when the other comes"
        delays.append(world.begun_between("flood", late, world.begun[single]))
    assert max(delays) <= 1


def test_a_second_request_of_the_same_client_is_not_the_first_again() -> None:
    """Two floods share the rows; the one that came first has no more than a head start."""
    world = World(rows=4)
    for client, at in (("one", 0.0), ("two", 3.0)):
        for _ in range(60):
            world.add(Job(client, at))
    world.until(25.0)
    one, two = (world.begun_between(client, 5.0, 25.0) for client in ("one", "two"))
    assert one + two > 20
    assert abs(one - two) <= 4


@pytest.mark.parametrize("rows", [1, 4])
def test_a_flood_is_not_starved_by_many_single_requests(rows: int) -> None:
    """New clients all the time, each with one request, more than the engine can serve: the flood gets its share."""
    world = World(rows)
    for _ in range(200):
        world.add(Job("flood", 0.0))
    for number in range(600):
        world.add(Job(f"passer-by {number}", 0.05 * number))
    shares = []
    for second in range(10, 70, 10):
        world.until(second)
        shares.append(world.begun_between("flood", second - 10, second))
    assert min(shares) >= 1, shares


def test_the_oldest_of_a_client_is_not_passed_by_its_own_small_ones_for_ever() -> None:
    """A long prompt among short ones of its own client, while somebody else waits as well."""
    world = World(rows=4)
    long = world.add(Job("a", 0.0, prompt=8000))
    for number in range(300):
        world.add(Job("a", 0.1 * number, prompt=100))
        world.add(Job("b", 0.1 * number, prompt=100))
    world.until(60.0)
    assert long in world.begun
    world.finish()


@QUICK
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 3000), st.integers(1, 60)), min_size=2, max_size=40))
def test_with_one_client_the_rule_changes_nothing(jobs: list[tuple[float, int, int]]) -> None:
    """Whatever its name is: the order of one client's requests is that of a server that knows no clients; and so is
    that of clients with one request each, when nothing is running."""

    class Unaware(Scheduler):
        def _ahead(self, _waiting: object) -> dict[str, int]:
            return {}

    def begun(client: str, aware: bool) -> list[tuple[str, float]]:
        world = World(rows=3)
        if not aware:
            world.scheduler.__class__ = Unaware
        for arrival, prompt, answer in jobs:
            world.add(Job(client, arrival, prompt, answer))
        world.finish()
        return sorted(world.begun.items())

    plain = begun("", aware=False)
    assert begun("somebody", aware=True) == plain


@QUICK
@given(st.lists(st.tuples(st.floats(0, 90), st.integers(1, 3000)), min_size=2, max_size=30))
def test_among_clients_with_one_request_each_the_rule_changes_nothing(jobs: list[tuple[float, int]]) -> None:
    """Work against age decides, as without the rule, however old everybody is."""

    def order(clients: list[str]) -> list[str]:
        scheduler = World(rows=64).scheduler
        for number, (arrival, prompt) in enumerate(jobs):
            scheduler.add(str(number), prompt, 10, 0, clients[number], arrival)
        return [request.id for request in scheduler._ordered(list(scheduler._requests.values()), 100.0)]

    assert order([str(number) for number in range(len(jobs))]) == order([""] * len(jobs))


# --- priorities -------------------------------------------------------------------------------------------------


def test_priority_comes_before_fairness() -> None:
    """A flood of urgent requests goes first, and is shared fairly among the urgent."""
    world = World(rows=2)
    for _ in range(30):
        world.add(Job("urgent", 0.0, priority=5))
    other = world.add(Job("calm", 0.0))
    rival = world.add(Job("rival", 1.0, priority=5))
    world.finish()
    urgent = sorted(at for name, at in world.begun.items() if world.jobs[name].client == "urgent")
    assert world.begun[other] >= urgent[-1]
    assert world.begun[rival] < urgent[8]


# --- the predicted wait -----------------------------------------------------------------------------------------


def test_nobody_waits_for_an_idle_engine() -> None:
    world = World()
    assert world.scheduler.wait_seconds() == 0.0
    world.add(Job("", 0.0))
    world.finish()
    assert world.scheduler.wait_seconds() == 0.0


@QUICK
@given(
    jobs=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 2000)), min_size=1, max_size=60),
    steps=st.integers(0, 40),
    rows=st.integers(1, 8),
    memory=st.sampled_from([1 << 40, 40_000]),
)
def test_the_predicted_wait_grows_with_the_queue(
    jobs: list[tuple[int, int]], steps: int, rows: int, memory: int
) -> None:
    """Monotone: one more request in the queue never makes the wait look shorter."""
    world = World(rows, MemoryBudget(CacheSizes(1), limit_bytes=memory))
    for _ in range(rows):
        world.add(Job("", 0.0, prompt=100, answer=500))
    for _ in range(steps):
        world.step()
    world.arrive()
    before = world.scheduler.wait_seconds()
    for number, (prompt, answer) in enumerate(jobs):
        world.scheduler.add(f"more {number}", prompt, answer, 0, "", world.clock)
        after = world.scheduler.wait_seconds()
        assert after >= before * (1 - 1e-9)
        before = after


@pytest.mark.parametrize("queue", [4, 20, 100])
@pytest.mark.parametrize(
    ("answer", "most", "memory", "rows"),
    [(30, 30, 1 << 40, 4), (30, 8000, 1 << 40, 4), (200, 8000, 1 << 40, 4), (60, 60, 3000, 16)],
    ids=["as long as allowed", "much shorter than allowed", "long", "memory for few"],
)
def test_the_predicted_wait_is_about_right(queue: int, answer: int, most: int, memory: int, rows: int) -> None:
    """Within a factor of three in a steady load of which the engine has seen some, whatever max_tokens promise."""
    rng = random.Random(queue)
    world = World(rows, MemoryBudget(CacheSizes(1), limit_bytes=memory))

    def job(at: float) -> Job:
        return Job("", at, rng.randint(100, 300), rng.randint(answer // 2, answer * 3 // 2), most)

    for _ in range(40):
        world.add(job(0.0))
    while len(world.ended) < 30:
        world.step()
    for _ in range(queue):
        world.add(job(world.clock))
    world.arrive()
    asked, predicted = world.clock, world.scheduler.wait_seconds()
    last = world.add(job(world.clock + 1e-6))
    while last not in world.begun:
        world.step()
    waited = world.begun[last] - asked
    assert waited / 3 <= predicted <= waited * 3, (predicted, waited)
