from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.bench.prompts import WORDS_PER_TOKEN, request_text, story
from millpond.bench.sse import EventReader
from millpond.bench.stream import Reply
from millpond.bench.summary import percentile, summarise
from millpond.bench.workloads import Outcome, _interference

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(st.lists(LINE, min_size=1, max_size=3), max_size=5), st.data(), st.sampled_from(["\n", "\r\n"]))
def test_events_do_not_depend_on_how_the_bytes_are_split(
    events: list[list[str]], data: st.DataObject, newline: str
) -> None:
    lines = [": ping", "event: message"]
    for event in events:
        lines += [f"data: {line}" for line in event] + [""]
    whole = "".join(line + newline for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    reader = EventReader()
    got = [item for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) for item in reader.feed(whole[a:b])]
    assert got == ["\n".join(event) for event in events]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.integers(1, 100))
def test_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    result = percentile(values, percent)
    enough = [v for v in values if sum(w <= v for w in values) * 100 >= percent * len(values)]
    assert result == min(enough)


def test_no_values_no_figures() -> None:
    assert percentile([], 95) is None
    summary = summarise("x", Outcome([Reply(error="broken")], 1.0))
    assert (summary.failures, summary.ttft_mean, summary.gap_max, summary.tokens_per_second) == (1, None, None, None)
    assert summary.counted_by == "none"


@pytest.mark.parametrize("tokens", [1, 20, 123, 2000])
def test_stories_are_as_long_as_asked_and_repeatable(tokens: int) -> None:
    text = story("seed", tokens)
    assert len(text.split()) == max(4, round(tokens * WORDS_PER_TOKEN))
    assert text == story("seed", tokens)
    assert request_text("a", tokens) != request_text("b", tokens)


def test_figures_of_a_reply() -> None:
    reply = Reply(sent=10.0, ended=14.5, arrivals=[11.0, 12.0, 14.0], completion_tokens=5)
    assert (reply.ttft, reply.gaps, reply.per_token) == (1.0, [1.0, 2.0], 0.75)
    assert (reply.tokens, reply.counted_by) == (5, "usage")


def test_figures_of_a_workload_leave_the_long_prompt_out_of_the_running_ones() -> None:
    running = Reply("running", sent=0.0, ended=4.0, arrivals=[1.0, 2.0, 4.0], completion_tokens=3, prompt_tokens=10)
    late = Reply("long", sent=2.5, ended=9.0, arrivals=[8.0, 9.0], completion_tokens=2, prompt_tokens=3000)
    failed = Reply("running", sent=0.0, ended=1.0, error="HTTP 503: no")
    summary = summarise("long-prompt", Outcome([running, failed, late], 10.0))
    assert (summary.requests, summary.failures, summary.errors) == (3, 1, ("HTTP 503: no",))
    assert (summary.ttft_mean, summary.gap_max, summary.prompt_tokens) == (1.0, 2.0, 10.0)
    assert (summary.tokens, summary.tokens_per_second) == (5, 0.5)


def test_interference_looks_only_at_the_time_of_the_long_prompt() -> None:
    before = Reply("running", sent=0.0, ended=40.0, arrivals=[1.0, 6.0, 11.0, 12.0, 32.0, 40.0], finish_reason="length")
    short = Reply("running", sent=0.0, ended=11.5, arrivals=[1.0, 11.5], finish_reason="stop")
    late = Reply("long", sent=11.8, ended=33.0, arrivals=[31.0, 33.0], finish_reason="length")
    notes = _interference([before, short], late)
    assert notes["largest gap of the running streams meanwhile"] == 20.0
    assert notes["p99 gap of the running streams meanwhile"] == 20.0
    assert notes["TTFT of the long prompt"] == pytest.approx(19.2)
    assert notes["running streams that lasted (count)"] == 1
