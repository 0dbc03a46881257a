"""(M6) The responses that are kept, in their database: bounded in bytes and age, no conversation without its head."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from millpond.http import response_table
from millpond.http.response_store import ResponseStore
from millpond.http.response_table import NAME, Kept, LineTooLong, ResponseTable

OWNER = "ann"


def kept(id_: str, previous: str = "", size: int = 100, owner: str = OWNER) -> Kept:
    items = json.dumps([{"id": f"in_{id_}", "text": ""}]).encode()
    response = json.dumps({"output": [{"id": f"out_{id_}"}], "pad": "x" * size}).encode()
    return Kept(owner, id_, previous, items, response)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    time = [1_000_000.0]
    monkeypatch.setattr(response_table.time, "time", lambda: time[0])
    return time


def test_what_is_kept_is_found_by_its_owner(tmp_path: Path) -> None:
    table = ResponseTable(tmp_path / "x" / NAME, 10_000, 0)
    table.keep(kept("a"))
    table.keep(kept("b", "a"))
    assert table.find(OWNER, "a") == kept("a")
    assert table.line(OWNER, "b") == [kept("a"), kept("b", "a")]
    for item in ("in_b", "out_b"):
        assert table.with_item(OWNER, item) == kept("b", "a")
    for owner, id_ in (("bob", "a"), ("", "a"), (OWNER, "c"), (OWNER, "")):
        assert table.find(owner, id_) is None
        assert table.line(owner, id_) == []
        assert not table.forget(owner, id_)
    assert table.with_item("bob", "in_b") is None
    table.close()
    assert (tmp_path / "x" / NAME).stat().st_mode & 0o077 == 0

    again = ResponseTable(tmp_path / "x" / NAME, 10_000, 0)
    assert again.line(OWNER, "b") == [kept("a"), kept("b", "a")]
    assert again.forget(OWNER, "a")
    assert again.find(OWNER, "a") is None
    assert again.with_item(OWNER, "in_a") is None
    assert again.line(OWNER, "b") == [], "a conversation without its beginning is none"
    again.close()


def test_what_was_used_last_goes_last(now: list[float]) -> None:
    table = ResponseTable(None, 3 * kept("a").size, 0)
    for id_ in "abc":
        now[0] += 1
        table.keep(kept(id_))
    now[0] += 1
    table.line(OWNER, "a")
    now[0] += 1
    table.keep(kept("d"))
    assert [table.find(OWNER, id_) is not None for id_ in "abcd"] == [True, False, True, True]


def test_old_ones_are_not_found_and_go(now: list[float]) -> None:
    table = ResponseTable(None, 10_000, 60)
    table.keep(kept("a"))
    table.keep(kept("b"))
    now[0] += 50
    assert table.line(OWNER, "a")
    now[0] += 20
    assert table.find(OWNER, "a") is not None
    assert table.find(OWNER, "b") is None
    assert table.with_item(OWNER, "in_b") is None
    table.keep(kept("c"))
    now[0] -= 1000  # the clock is set back
    assert table.find(OWNER, "b") is None
    assert table.find(OWNER, "a") is not None


def test_a_conversation_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_table, "LONGEST_LINE", 3 * kept("a").size)
    table = ResponseTable(None, 10_000, 0)
    for id_, previous in ("a", ""), ("b", "a"), ("c", "b"), ("d", "c"):
        table.keep(kept(id_, previous))
    assert len(table.line(OWNER, "c")) == 3
    with pytest.raises(LineTooLong):
        table.line(OWNER, "d")


class Conversations(RuleBasedStateMachine):
    """Random conversations that branch, in little room: what can be gone on from is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ResponseTable(None, 8 * kept("0").size, 0)
        self.time = 0.0
        self.original = response_table.time.time
        response_table.time.time = self.clock  # type: ignore[assignment]
        self.previous: dict[str, str] = {}

    def clock(self) -> float:
        return self.time

    def teardown(self) -> None:
        response_table.time.time = self.original  # type: ignore[assignment]
        self.table.close()

    @initialize()
    def begin(self) -> None:
        self.put("")

    @rule(pick=st.integers(0, 30), tick=st.booleans())
    def go_on(self, pick: int, tick: bool) -> None:
        self.time += tick
        names = [*self.previous, ""]
        before = names[pick % len(names)]
        if not before or self.table.line(OWNER, before):
            self.put(before)

    @rule(pick=st.integers(0, 30))
    def look(self, pick: int) -> None:
        names = list(self.previous)
        self.table.line(OWNER, names[pick % len(names)])

    def put(self, before: str) -> None:
        id_ = str(len(self.previous))
        self.table.keep(kept(id_, before, size=80 + len(self.previous) % 20))
        self.previous[id_] = before

    @invariant()
    def heads_stay(self) -> None:
        there = {id_ for id_ in self.previous if self.table.find(OWNER, id_)}
        assert there
        assert all(self.previous[id_] in {"", *there} for id_ in there)
        assert sum(self.table.find(OWNER, id_).size for id_ in there) <= 8 * kept("0").size  # type: ignore[union-attr]


def test_conversations_keep_their_heads() -> None:
    run_state_machine_as_test(Conversations, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


def test_a_broken_file_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read costs what was kept, and nothing else."""
    path = tmp_path / NAME
    path.write_bytes(b"no database" * 1000)
    store = ResponseStore(path, 10_000, 0)
    assert store.find(OWNER, "a").result(20) is None
    assert "responses cannot be kept or read" in caplog.text
    store.keep(kept("a"))
    assert store.find(OWNER, "a").result(20) == kept("a")
    store.close()


def test_what_is_too_large_costs_nobody_anything() -> None:
    store = ResponseStore(None, 1000, 0)
    store.keep(kept("a"))
    store.keep(kept("b", size=2000))
    assert store.find(OWNER, "a").result(20) == kept("a")
    assert store.find(OWNER, "b").result(20) is None
    store.close()


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ResponseStore(tmp_path / "file" / NAME, 10_000, 0)
    store.keep(kept("a"))
    assert store.find(OWNER, "a").result(20) is None
    assert store.line(OWNER, "a").result(20) == []
    assert store.forget(OWNER, "a").result(20) is False
    store.close()


def test_what_waits_for_the_disk_is_bounded_and_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.http.response_store.MOST_BEHIND", 3 * kept("a").size)
    path = tmp_path / NAME
    other = sqlite3.connect(path)
    ResponseTable(path, 10_000, 0).close()
    other.execute("BEGIN IMMEDIATE")  # another process writes
    store = ResponseStore(path, 10_000, 0)
    for id_ in "abcde":
        store.keep(kept(id_))
    other.rollback()
    store.close()
    table = ResponseTable(path, 10_000, 0)
    assert [table.find(OWNER, id_) is not None for id_ in "abcde"] == [True, True, True, False, False]
    table.close()
