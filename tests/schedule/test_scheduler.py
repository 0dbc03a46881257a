"""Single rules of the scheduler, one small situation each."""

from __future__ import annotations

import pytest

from millpond.memory.budget import CacheSizes, MemoryBudget
from millpond.schedule.costs import CostModel
from millpond.schedule.scheduler import Limits, NeverFits, Scheduler
from millpond.types import PrefillChunk, StepPlan

PLENTY = MemoryBudget(CacheSizes(1), limit_bytes=1 << 40)
LIMITS = Limits(max_batch=8, max_itl_ms=200.0, max_chunk=512)


def learnt() -> CostModel:
    """1 ms per prompt token, 10 ms per decode and 1 ms per row in it."""
    costs = CostModel()
    for _ in range(4):
        for tokens in (64, 128, 512):
            costs.observe_prefill(0, tokens, float(tokens))
        for rows in (1, 4, 8):
            costs.observe_decode(rows, 100 * rows, 10.0 + rows)
    return costs


def make(limits: Limits = LIMITS, budget: MemoryBudget = PLENTY) -> Scheduler:
    return Scheduler(limits, budget, learnt())


def add(
    scheduler: Scheduler, name: str, prompt: int, *, answer: int = 100, priority: int = 0, now: float = 0.0
) -> None:
    scheduler.add(name, prompt, answer, priority, "client", now)


def step(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now)
    assert plan == scheduler.plan(now)
    scheduler.commit(plan)
    scheduler.check()
    return plan


def running(scheduler: Scheduler, *ids: str, prompt: int = 1, answer: int = 100) -> None:
    """Bring requests into rows, in this order."""
    for name in ids:
        add(scheduler, name, prompt, answer=answer)
        while name not in scheduler.rows:
            step(scheduler)


def cuts(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(chunk.id, chunk.start, chunk.end, chunk.last) for chunk in plan.prefill]


def test_idle() -> None:
    scheduler = make()
    assert scheduler.idle
    assert scheduler.plan(0.0).empty
    add(scheduler, "a", 10)
    assert (scheduler.waiting, scheduler.running, scheduler.plan(0.0).empty) == (1, 0, False)
    step(scheduler)
    assert (scheduler.waiting, scheduler.running, scheduler.plan(0.0).empty) == (0, 1, False)
    scheduler.remove("a")
    scheduler.remove("a")
    assert scheduler.idle


def test_one_token_prompt_is_only_adopted() -> None:
    scheduler = make()
    add(scheduler, "a", 1)
    assert step(scheduler).prefill == (PrefillChunk(id="a", start=0, end=0, last=True),)
    assert scheduler.rows == ("a",)
    assert step(scheduler) == StepPlan(step=1, rows=("a",))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (2, [(0, 1, True)]),
        (64, [(0, 63, True)]),
        (65, [(0, 64, True)]),
        (66, [(0, 64, False), (64, 65, True)]),
        (301, [(0, 256, False), (256, 300, True)]),
    ],
)
def test_all_but_the_last_token_in_grid_chunks_and_a_tail(prompt: int, expected: list[tuple[int, int, bool]]) -> None:
    scheduler = make()
    add(scheduler, "a", prompt)
    assert cuts(step(scheduler)) == [("a", *cut) for cut in expected]
    assert scheduler.rows == ("a",)


def test_nobody_decoding_takes_full_chunks() -> None:
    scheduler = make()
    add(scheduler, "a", 1 + 512 + 512 + 20)
    assert cuts(step(scheduler)) == [("a", 0, 512, False)]
    assert cuts(step(scheduler)) == [("a", 512, 1024, False)]
    assert cuts(step(scheduler)) == [("a", 1024, 1044, True)]


def test_rows_decoding_leave_only_their_spare_time() -> None:
    scheduler = make()
    running(scheduler, "r")
    add(scheduler, "a", 1001)
    assert cuts(step(scheduler)) == [("a", 0, 128, False)]  # 200 - 11 ms hold 189 tokens, two blocks
    assert scheduler.plan(0.0).rows == ("r",)


def test_slow_decoding_still_lets_one_block_through() -> None:
    scheduler = make(Limits(max_batch=8, max_itl_ms=5.0, max_chunk=512))
    running(scheduler, "r")
    add(scheduler, "a", 64 + 10 + 1)
    assert cuts(step(scheduler)) == [("a", 0, 64, False)]
    assert cuts(step(scheduler)) == [("a", 64, 74, True)]
    add(scheduler, "b", 1)
    add(scheduler, "c", 1)
    assert cuts(step(scheduler)) == [("b", 0, 0, True)]


def test_the_decode_of_the_adopted_row_counts_too() -> None:
    scheduler = make(Limits(max_batch=8, max_itl_ms=203.5, max_chunk=512))
    running(scheduler, "r")
    add(scheduler, "a", 193)
    assert cuts(step(scheduler)) == [("a", 0, 128, False)]  # 192 + 11 ms would do, 192 + 12 would not
    assert cuts(step(scheduler)) == [("a", 128, 192, True)]


def test_several_requests_share_a_step() -> None:
    scheduler = make()
    running(scheduler, "r")
    for name in ("a", "b", "c", "d"):
        add(scheduler, name, 61)
    assert cuts(step(scheduler)) == [("a", 0, 60, True), ("b", 0, 60, True), ("c", 0, 60, True)]
    assert scheduler.rows == ("r", "a", "b", "c")


def test_a_first_row_does_not_wait_for_every_other_prompt() -> None:
    scheduler = make()
    for index in range(8):
        add(scheduler, f"p{index}", 61)
    assert [chunk.id for chunk in step(scheduler).prefill] == ["p0", "p1", "p2"]  # what one target's time holds


def test_short_prompts_first_but_age_wins() -> None:
    scheduler = make()
    running(scheduler, "r")
    add(scheduler, "long", 5001, now=0.0)
    add(scheduler, "short", 101, now=1.0)
    assert scheduler.plan(1.0).prefill[0].id == "short"
    scheduler.remove("short")
    add(scheduler, "late", 101, now=20.0)
    assert scheduler.plan(20.0).prefill[0].id == "long"


def test_a_started_prefill_is_overtaken_by_clearly_shorter_work_only() -> None:
    scheduler = make()
    running(scheduler, "r")
    add(scheduler, "a", 2001)
    step(scheduler)
    add(scheduler, "similar", 1601)
    assert scheduler.plan(0.0).prefill[0].id == "a"
    add(scheduler, "short", 401)
    assert scheduler.plan(0.0).prefill[0].id == "short"


def test_priority_goes_first() -> None:
    scheduler = make()
    running(scheduler, "r")
    add(scheduler, "old", 20, now=0.0)
    add(scheduler, "urgent", 3001, priority=1, now=100.0)
    assert scheduler.plan(100.0).prefill[0].id == "urgent"


def test_rows_and_started_prefills_stay_within_max_rows() -> None:
    scheduler = make(Limits(max_batch=2, max_itl_ms=200.0, max_chunk=512))
    running(scheduler, "r")
    add(scheduler, "a", 2001)
    step(scheduler)
    add(scheduler, "b", 11)
    assert [chunk.id for chunk in scheduler.plan(0.0).prefill] == ["a"]
    scheduler.remove("r")
    assert [chunk.id for chunk in scheduler.plan(0.0).prefill] == ["b", "a"]


def test_never_fits_says_the_numbers() -> None:
    scheduler = make(budget=MemoryBudget(CacheSizes(10), limit_bytes=50_000))
    with pytest.raises(NeverFits, match=r"prompt \(2000 tokens\) and max_tokens \(500\) need \d+ bytes.*50000 bytes"):
        add(scheduler, "a", 2000, answer=500)
    assert scheduler.idle


@pytest.mark.parametrize(("prompt", "answer"), [(0, 1), (1, 0), (-3, 5)])
def test_impossible_sizes_are_refused(prompt: int, answer: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        add(make(), "a", prompt, answer=answer)


@pytest.mark.parametrize("field", ["max_batch", "grid", "max_chunk"])
def test_impossible_limits_are_refused(field: str) -> None:
    sizes = {"max_batch": 1, "grid": 64, "max_chunk": 64} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} is 0"):
        Limits(max_itl_ms=100.0, **sizes)


# --- memory -----------------------------------------------------------------------------------------------------


def tight(limit: int) -> MemoryBudget:
    """One byte per token and nothing else."""
    return MemoryBudget(CacheSizes(1), limit_bytes=limit)


def test_nobody_starts_that_would_not_fit_and_nobody_passes_the_first_that_waits() -> None:
    scheduler = make(budget=tight(2300))
    running(scheduler, "r", prompt=200)  # one row of 256
    add(scheduler, "big", 900)  # two rows of 1024 and a prefill cache
    assert scheduler.plan(0.0).prefill == ()
    add(scheduler, "small", 20, now=1000.0)
    assert scheduler.plan(1000.0).prefill == ()
    scheduler.remove("r")
    assert scheduler.plan(1000.0).prefill[0].id == "big"


def test_growth_preempts_the_youngest_row() -> None:
    scheduler = make(budget=tight(1535))
    for number, name in enumerate(("old", "young", "urgent")):
        add(scheduler, name, 150, answer=300, now=float(number), priority=int(name == "urgent"))
    while len(scheduler.rows) < 3:
        step(scheduler, 3.0)
    while not (plan := scheduler.plan(3.0)).preempt:
        step(scheduler, 3.0)
    assert plan.preempt == ("young",)  # three rows of 512 would need 1536
    assert set(plan.rows) == {"old", "urgent"}
    assert plan.prefill == ()
    step(scheduler, 3.0)
    assert (scheduler.waiting, scheduler.running) == (1, 2)
    scheduler.requeue("young", 257, 4.0)
    scheduler.check()
    assert scheduler.plan(4.0).prefill == ()
    scheduler.remove("old")
    assert sum(chunk.end - chunk.start for chunk in step(scheduler, 4.0).prefill) > 0


def test_who_joins_needs_room_to_grow_and_more_after_a_preemption() -> None:
    scheduler = make(budget=tight(1300))
    running(scheduler, "a", "b", prompt=100, answer=300)
    add(scheduler, "c", 20, answer=300)
    assert step(scheduler).prefill[0].id == "c"
    for _ in range(100):
        step(scheduler)
    scheduler.remove("c")
    add(scheduler, "c", 20, answer=300)
    assert scheduler.plan(0.0).prefill == ()  # four rows of 256 would do, for some 50 steps


def test_who_was_preempted_returns_only_with_more_room_around_it() -> None:
    scheduler = make(budget=tight(1300))
    running(scheduler, "a", "b", prompt=100, answer=300)
    running(scheduler, "c", prompt=20, answer=300)
    while not (plan := step(scheduler)).preempt:
        pass
    assert plan.preempt == ("c",)
    scheduler.remove("a")
    scheduler.remove("b")
    add(scheduler, "d", 100, answer=300)
    while scheduler.rows != ("c",):
        step(scheduler)
    assert scheduler.plan(0.0).prefill == ()  # without a preemption, "d" would join: two rows of 256


def test_preempted_requests_may_be_requeued_before_the_commit() -> None:
    scheduler = make(budget=tight(1535))
    running(scheduler, "a", "b", "c", prompt=150, answer=300)
    while not (plan := scheduler.plan(0.0)).preempt:
        step(scheduler)
    for name in plan.preempt:
        scheduler.requeue(name, 257, 0.0)
    scheduler.commit(plan)
    scheduler.check()
    assert scheduler.rows == plan.rows


def test_the_only_row_stays_and_a_started_prefill_gives_way_to_its_growth() -> None:
    scheduler = make(Limits(max_batch=8, max_itl_ms=1.0, max_chunk=512), tight(25_700))
    running(scheduler, "row", prompt=8110, answer=800)
    add(scheduler, "next", 6001, now=-10.0)
    while not (plan := scheduler.plan(0.0)).preempt:
        assert step(scheduler).prefill
        assert scheduler.rows == ("row",)
    assert plan == StepPlan(step=plan.step, preempt=("next",), rows=("row",))
    step(scheduler)
    assert step(scheduler).prefill == ()  # two rows of 16384 cannot be
    scheduler.remove("row")
    assert scheduler.plan(0.0).prefill[0] == PrefillChunk(id="next", start=0, end=512, last=False)


def test_a_distinct_prompt_is_never_refused_for_good() -> None:
    """The memory of finished requests is free again, however many there were."""
    scheduler = make(budget=tight(3000))
    for number in range(300):
        add(scheduler, f"{number}", 700, answer=100, now=float(number))
        while f"{number}" not in scheduler.rows:
            assert step(scheduler, float(number)).prefill
        scheduler.remove(f"{number}")
    assert scheduler.idle


# --- commit -----------------------------------------------------------------------------------------------------


def test_a_request_without_a_row_may_go_between_plan_and_commit() -> None:
    scheduler = make()
    running(scheduler, "r")
    add(scheduler, "a", 21)
    add(scheduler, "b", 31)
    plan = scheduler.plan(0.0)
    scheduler.remove("a")
    scheduler.commit(plan)
    scheduler.check()
    assert scheduler.rows == ("r", "b")


def test_commit_refuses_a_plan_that_is_not_current() -> None:
    scheduler = make()
    running(scheduler, "a", "b")
    plan = scheduler.plan(0.0)
    scheduler.commit(plan)
    with pytest.raises(ValueError, match="no longer matches"):
        scheduler.commit(plan)
    plan = scheduler.plan(0.0)
    scheduler.remove("a")
    with pytest.raises(ValueError, match="no longer matches"):
        scheduler.commit(plan)
    scheduler.check()


def test_names_and_sizes_are_checked() -> None:
    scheduler = make()
    add(scheduler, "a", 10, answer=5)
    with pytest.raises(ValueError, match="already"):
        add(scheduler, "a", 5)
    with pytest.raises(KeyError):
        scheduler.requeue("b", 5, 0.0)
    with pytest.raises(ValueError, match="16 tokens, allowed are 1 to 15"):
        scheduler.requeue("a", 16, 0.0)


def test_requeue_recomputes_from_the_start_and_keeps_the_arrival() -> None:
    scheduler = make()
    running(scheduler, "a", prompt=100)
    scheduler.requeue("a", 130, 50.0)
    add(scheduler, "b", 11, now=40.0)
    assert cuts(scheduler.plan(50.0))[:2] == [("a", 0, 128, False), ("a", 128, 129, True)]


# --- probation --------------------------------------------------------------------------------------------------


def test_one_suspect_at_a_time() -> None:
    scheduler = make()
    running(scheduler, "a", "b", "c")
    for name in ("a", "b", "c"):
        scheduler.requeue(name, 3, 1.0, probation=True)
    add(scheduler, "new", 5)
    for suspect in ("a", "b", "c"):
        step(scheduler)
        assert scheduler.suspects == (suspect,)
        assert "new" in scheduler.rows
        assert scheduler.plan(0.0).prefill == ()
        scheduler.proven(suspect)
    assert scheduler.suspects == ()
    assert scheduler.waiting == 0
    scheduler.proven("unknown")


def test_a_suspect_in_prefill_holds_back_the_others_and_frees_them_when_removed() -> None:
    scheduler = make()
    running(scheduler, "r")
    for name in ("a", "b"):
        add(scheduler, name, 1001)
        scheduler.requeue(name, 1001, 0.0, probation=True)
    step(scheduler)
    assert {chunk.id for chunk in scheduler.plan(0.0).prefill} == {"a"}
    scheduler.remove("a")
    assert {chunk.id for chunk in scheduler.plan(0.0).prefill} == {"b"}


def test_chunks_get_shorter_where_attention_keeps_scores() -> None:
    """As the context grows, so that they fit the plan; never less than a block, and all is read."""
    budget = MemoryBudget(CacheSizes(1), 1 << 40, score_bytes=1, scores_limit=512 * 512)
    scheduler = make(budget=budget)
    add(scheduler, "a", 6000)
    chunks = []
    while "a" not in scheduler.rows:
        chunks += step(scheduler).prefill
    assert [chunk.start for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    assert (chunks[0].end, chunks[-1].end) == (512, 5999)
    sizes = [chunk.end - chunk.start for chunk in chunks]
    assert all(size == 64 or size * chunk.end <= 512 * 512 for size, chunk in zip(sizes[:-1], chunks, strict=False))
    assert max(sizes[5:]) < max(sizes[:2]), "the further, the shorter"


def gpu_costs() -> CostModel:
    """10 ms for a forward, and little for what is in it."""
    costs = CostModel()
    for tokens in (16, 64, 128, 256) * 3:
        costs.observe_prefill(0, tokens, 10.0 + tokens / 1000)
    return costs


def together(*prompts: int, max_chunk: int = 512) -> Scheduler:
    limits = Limits(max_batch=32, max_itl_ms=200.0, max_chunk=max_chunk, together=True)
    scheduler = Scheduler(limits, PLENTY, gpu_costs())
    for number, tokens in enumerate(prompts):
        add(scheduler, f"p{number}", tokens)
    return scheduler


def reads(plan: StepPlan) -> list[list[str]]:
    return [[chunk.id for chunk in chunks] for chunks in plan.reads]


def test_short_prompts_are_read_together_block_by_block() -> None:
    scheduler = together(100, 101, 80)
    plan = step(scheduler)
    assert sorted(map(sorted, reads(plan))) == [["p0", "p1", "p2"], ["p0", "p1", "p2"]]
    assert {(chunk.start, chunk.end) for chunk in plan.reads[0]} == {(0, 64)}
    assert all(chunk.last for chunk in plan.reads[1])


def test_a_single_token_and_a_marked_request_are_read_alone() -> None:
    scheduler = together(66, 100, 100)
    scheduler.requeue("p2", 100, 0.0, apart=True)
    alone = [names for names in reads(step(scheduler)) if len(names) == 1]
    assert ["p0"] in alone, "one token goes to another place in a ring"
    assert alone.count(["p2"]) == 2


def test_the_end_of_a_long_conversation_is_read_alone() -> None:
    """Beside it, every other prompt's keys and values would be copied as far as its own reach."""
    scheduler = together(32_000, 60, 60, 60)
    scheduler.offer("p0", 31_936, None)
    assert sorted(map(sorted, reads(step(scheduler)))) == [["p0"], ["p1", "p2", "p3"]]


def test_what_is_filled_up_counts() -> None:
    """A forward has room for so many tokens, those that nobody reads among them."""
    scheduler = together(*[60] * 20, max_chunk=512)
    assert max(map(len, reads(step(scheduler)))) == 512 // 59


def test_nothing_is_read_together_once_that_is_off() -> None:
    scheduler = together(100, 100)
    scheduler.together = False
    assert all(len(names) == 1 for names in reads(step(scheduler)))
