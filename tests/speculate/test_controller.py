"""How much is guessed: it pays, or it is hardly done (H5)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.schedule.costs import CostModel
from millpond.speculate.controller import BESIDE_READING, BUDGET, Controller
from millpond.speculate.lookup import SOURCES, source_of
from millpond.speculate.pace import Curve, Pace, measured
from millpond.speculate.proposer import DraftOffer, Source
from millpond.types import SpecMode

CPU = Curve(((1, 50.0), (2, 52.0), (4, 60.0), (8, 76.0), (16, 108.0), (32, 160.0)))
GPU = Curve(((1, 10.0), (8, 11.0), (16, 16.0), (32, 30.0)))
MOST = 15
DRAFT_MODEL = Source(SpecMode.DRAFT, first_chance=0.6)


def steps(curve: Curve, rows: int) -> Callable[[int], float]:
    return lambda columns: curve.at(rows * columns) / curve.at(rows)


@dataclass
class World:
    """A machine with a clock in plain steps, and rows whose draft tokens are right with some chance."""

    curve: Curve
    rows: int = 1
    source: Source = SOURCES[0]
    draft_cost: float = 0.0
    noise: Callable[[], float] = lambda: 1.0
    seed: int = 0
    time: float = 0.0
    tokens: int = 0
    guessed_steps: int = 0
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        costs = CostModel()
        for _ in range(30):
            costs.observe_decode(self.rows, 100, 50.0)
        self.controller = Controller(costs, Pace(self.curve), shares={self.source.mode: self.draft_cost})
        self.chooser = random.Random(self.seed)
        self.true = steps(self.curve, self.rows)

    def step(self, chance: Callable[[str], float]) -> None:
        offers = [DraftOffer(f"r{row}", MOST, self.source) for row in range(self.rows)]
        depth = self.controller.choose(offers, self.rows)
        self.depths.append(depth)
        if not depth:
            self.time += 1
            self.tokens += self.rows
            self.controller.plain()
            return
        results, drawn = {}, 0
        for offer in offers:
            taken = next((n for n in range(depth) if self.chooser.random() >= chance(offer.name)), depth)
            results[offer._replace(most=depth)] = taken
            drawn += taken + 1
        forward, draft = self.true(depth + 1), self.draft_cost * depth
        self.controller.verified(
            results,
            drawn,
            self.rows,
            100 * self.rows,
            50.0 * forward * self.noise(),
            {self.source.mode: 50.0 * draft * self.noise()} if draft else {},
        )
        self.time += forward + draft
        self.tokens += drawn
        self.guessed_steps += 1

    def run(self, tokens: int, chance: float) -> float:
        """Tokens per row and plain step, over the next so many tokens per row."""
        time, before = self.time, self.tokens
        while self.tokens - before < tokens * self.rows:
            self.step(lambda _: chance)
        return (self.tokens - before) / self.rows / (self.time - time)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("source", [SOURCES[0], SOURCES[1], SOURCES[4], SOURCES[6], DRAFT_MODEL])
def test_useless_guesses_cost_next_to_nothing(rows: int, source: Source) -> None:
    world = World(CPU, rows, source, draft_cost=0.2 if source == DRAFT_MODEL else 0.0)
    assert world.run(64, 0.0) > 0.97
    assert (
        sum(depth > 0 for depth in world.depths[-32:]) <= 4
    )  # off by now, but for looking whether it still is useless
    assert world.run(1000, 0.0) > 0.985


@pytest.mark.parametrize("rows", [1, 4])
def test_good_guesses_are_used_to_the_full(rows: int) -> None:
    world = World(CPU, rows, source=SOURCES[5])
    world.run(64, 0.98)
    best = max((1 + sum(0.98**n for n in range(1, k + 1))) / steps(CPU, rows)(k + 1) for k in range(MOST + 1))
    assert world.run(2000, 0.98) > 0.9 * best


def test_beside_a_prompt_little_is_verified() -> None:
    """Its chunk has made the step long already."""
    world = World(CPU, 4, source=SOURCES[5])
    world.run(200, 0.98)
    offers = [DraftOffer(f"r{row}", MOST, world.source) for row in range(4)]
    pace = world.controller.pace
    freely, beside = world.controller.choose(offers, 4), world.controller.choose(offers, 4, reading=True)
    assert 0 < beside < freely
    assert pace.factor(4, beside + 1) <= BESIDE_READING < pace.factor(4, beside + 2)
    steep = World(Curve(((4, 50.0), (8, 110.0), (16, 120.0))), 4, source=SOURCES[5])
    steep.controller._budget = BUDGET
    assert steep.controller.choose(offers, 4)
    assert not steep.controller.choose(offers, 4, reading=True)


def test_what_has_become_good_is_found_out_again() -> None:
    world = World(CPU, 4)
    world.run(500, 0.0)
    world.run(300, 0.97)
    assert world.run(300, 0.97) > 1.3


def test_a_row_that_is_never_right_does_not_spoil_its_neighbours() -> None:
    world = World(GPU, 4, source=SOURCES[5])
    chances = {"r0": 0.0, "r1": 0.95, "r2": 0.95, "r3": 0.95}
    for _ in range(300):
        world.step(chances.__getitem__)
    assert world.tokens / 4 / world.time > 1.8


def test_a_machine_that_pauses_is_not_taken_for_bad_guesses() -> None:
    chooser = random.Random(3)
    world = World(CPU, 1, source=SOURCES[5], noise=lambda: chooser.choice([0.8, 1.0, 1.0, 1.2, 6.0]))
    world.run(64, 0.95)
    assert world.run(2000, 0.95) > 2.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])), min_size=1, max_size=30),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([CPU, GPU]),
    st.sampled_from([SOURCES[0], SOURCES[1], SOURCES[3], DRAFT_MODEL]),
    st.integers(0, 9),
)
def test_whatever_the_text_the_loss_is_bounded(
    parts: list[tuple[int, float]], rows: int, curve: Curve, source: Source, seed: int
) -> None:
    world = World(curve, rows, source, draft_cost=0.3 if source == DRAFT_MODEL else 0.0, seed=seed)
    for tokens, chance in parts:
        world.run(tokens, chance)
    plain = world.tokens / world.rows
    # A budget at most, what one step can overdraw it by, and the refill.
    assert world.time <= plain * 1.02 + 3.0 + 2.0 * steps(curve, rows)(MOST + 1)


def test_may_read_while_it_is_worth_it() -> None:
    world = World(CPU, 1, DRAFT_MODEL, draft_cost=0.1)
    assert world.controller.may_read(DRAFT_MODEL, MOST)
    world.run(200, 0.0)
    assert not world.controller.may_read(DRAFT_MODEL, MOST)
    for _ in range(600):
        world.controller.plain()
    assert world.controller.may_read(DRAFT_MODEL, MOST)  # to find out
    assert not world.controller.may_read(DRAFT_MODEL, MOST, read_ms=500.0)


def test_matches_are_sorted_by_length() -> None:
    kinds = [SOURCES.index(source_of(length)) for length in (1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 32)]
    assert kinds == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_nothing_to_choose_from() -> None:
    controller = Controller(CostModel(), Pace(Curve()))
    assert controller.choose([], 3) == 0
    controller.forget("unknown")
    controller.verified({}, 3, 3, 0, 50.0, {})


def test_the_curve_between_and_beyond_its_points() -> None:
    assert CPU.at(1) == 50
    assert CPU.at(3) == 56
    assert CPU.at(64) == pytest.approx(160 + 52 / 16 * 32)
    assert CPU.at(0) == 50


def test_a_curve_is_measured_and_never_falls() -> None:
    asked: list[int] = []

    def forward(tokens: int) -> float:
        asked.append(tokens)
        return {1: 0.05, 2: 0.04, 4: 0.06, 8: 0.08}[tokens]

    curve = measured(forward, 10)
    assert curve.points == ((1, 50.0), (2, 50.0), (4, 60.0), (8, 80.0))
    assert asked == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    slow = measured(lambda tokens: float(tokens), 32)
    assert [tokens for tokens, _ in slow.points] == [1, 2]  # two points, whatever they take, and then no more
    assert measured(lambda _: 1.0, 1) == Curve()


def test_corrections_follow_what_is_seen_again_and_again() -> None:
    pace = Pace(CPU)
    before = pace.factor(2, 4)
    for factor in (1.4, 60.0, 1.6, 60.0, 1.5, 1.5, 1.5):
        pace.observe(2, 4, before * factor)
    assert pace.factor(2, 4) == pytest.approx(before * 1.5)
    assert pace.factor(2, 2) == pytest.approx(CPU.at(4) / CPU.at(2))
    assert pace.factor(8, 4) == pytest.approx(CPU.at(32) / CPU.at(8))
    for _ in range(9):
        pace.observe(2, 4, before / 100)
    assert pace.factor(2, 4) == 1.0  # more columns never cost less: then it is the plain steps that are not known yet
    for _ in range(32 * 4):
        pace.plain()
    assert pace.factor(2, 4) == pytest.approx(before)


def test_plain_steps_that_were_never_seen_do_not_make_guesses_look_free() -> None:
    controller = Controller(CostModel(), Pace(CPU))
    for _ in range(100):
        offers = [DraftOffer(f"r{row}", MOST, SOURCES[0]) for row in range(32)]
        if not (depth := controller.choose(offers, 32)):
            break
        results = {offer._replace(most=depth): 0 for offer in offers}
        controller.verified(results, 32, 32, 3200, 5.0 * (1 + depth), {})  # costs tells 82 ms for a plain step
    assert not depth


def test_forced_guesses_are_not_the_budgets() -> None:
    world = World(CPU, 1, source=SOURCES[5])
    for _ in range(100):
        world.controller.verified({DraftOffer("r0", MOST, SOURCES[5]): 0}, 1, 1, 100, 110.0, {}, charged=False)
    assert world.controller.choose([DraftOffer("r1", MOST, SOURCES[5])], 1) > 0


@pytest.mark.parametrize("way", ["verified", "read", "waited"])
def test_no_debt_is_so_large_that_it_is_not_paid_back(way: str) -> None:
    """Whatever a stall or a run of bad luck has cost: some hundred plain steps later it is tried again."""
    controller = Controller(CostModel(), Pace(CPU))
    for _ in range(200):
        if way == "verified":
            controller.verified({DraftOffer("r0", MOST, SOURCES[0]): 0}, 1, 1, 100, 1e6, {})
        elif way == "read":
            controller.may_read(DRAFT_MODEL, 0, read_ms=1e6)
        else:
            controller.waited()
    assert controller.choose([DraftOffer("r1", MOST, SOURCES[0])], 1) == 0
    for _ in range(600):
        controller.plain()
    assert controller.choose([DraftOffer("r1", MOST, SOURCES[0])], 1) > 0


def test_waiting_in_vain_is_not_for_ever() -> None:
    world = World(CPU, 1, source=SOURCES[5])
    waits = 0
    while world.controller.choose([DraftOffer("r0", MOST, SOURCES[5])], 1, unread=1):
        world.controller.waited()
        waits += 1
    assert 5 < waits < 100
