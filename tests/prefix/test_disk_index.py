"""The index: totals, children, the order of eviction and what it costs, and databases that are not ours."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ssd_support import NAMESPACE, OTHER, chain, head

from millpond.prefix.disk import index as disk_index
from millpond.prefix.disk.events import DiskEntry
from millpond.prefix.disk.index import DiskIndex, UnusableIndex, is_busy
from millpond.prefix.disk.pool import entry_of
from millpond.prefix.keys import root_key
from millpond.prefix.records import Kind, RecordHead, RecordId


@pytest.fixture
def index(tmp_path: Path) -> DiskIndex:
    return DiskIndex(tmp_path / "index.sqlite")


def put(index: DiskIndex, *heads: RecordHead, nbytes: int = 100, at: float = 1.0) -> None:
    with index.transaction():
        for record in heads:
            index.put(NAMESPACE, entry_of(record, nbytes), at)


def evict(index: DiskIndex, count: int = 1) -> list[RecordId]:
    gone = []
    for _ in range(count):
        for row in index.oldest_leaves():
            with index.transaction():
                index.delete(row.id)
            gone.append(row.id)
    return gone


def test_entries_survive_reopening(tmp_path: Path) -> None:
    index = DiskIndex(tmp_path / "index.sqlite")
    heads = chain(3)
    put(index, *reversed(heads))
    index.close()
    again = DiskIndex(tmp_path / "index.sqlite")
    assert [row.entry for row in again.entries(NAMESPACE)] == [entry_of(record, 100) for record in heads]
    assert again.entries(OTHER) == []
    assert again.totals() == (3, 300)


def test_leaves_go_first_and_a_child_keeps_its_parent(index: DiskIndex) -> None:
    heads = chain(4)
    put(index, *heads)
    assert evict(index, 4) == [record.id for record in reversed(heads)]


def test_children_count_whatever_the_order_of_writing(index: DiskIndex) -> None:
    heads = chain(4)
    put(index, *reversed(heads))
    assert evict(index, 4) == [record.id for record in reversed(heads)]


def test_windows_and_states_go_before_the_block_they_belong_to(index: DiskIndex) -> None:
    (block,) = chain(1)
    window = head(block.parent, 0, kind=Kind.WINDOW)
    state = head(block.parent, 0, kind=Kind.STATE)
    put(index, window, block, state)
    assert evict(index, 3) == [window.id, state.id, block.id]


def test_the_least_recently_used_leaf_goes_first(index: DiskIndex) -> None:
    first, second, third = (chain(1, salt=salt)[0] for salt in range(3))
    put(index, first, second, third)
    with index.transaction():
        index.touch([first.id], 2.0)
    assert index.oldest_leaves(spared=[second.key])[0].id == third.id
    assert evict(index, 3) == [second.id, third.id, first.id]


def test_the_order_of_uses_ignores_the_clock(index: DiskIndex) -> None:
    first, second = (chain(1, salt=salt)[0] for salt in range(2))
    put(index, first, at=2e9)
    put(index, second, at=1.0)
    assert evict(index, 2) == [first.id, second.id]


def test_adopted_records_are_the_oldest_in_order_of_their_files(index: DiskIndex) -> None:
    heads = [chain(1, salt=salt)[0] for salt in range(3)]
    put(index, heads[0])
    with index.transaction():
        index.adopt(NAMESPACE, entry_of(heads[1], 1), 2e9)
        index.adopt(NAMESPACE, entry_of(heads[2], 1), 1e9)
    assert evict(index, 3) == [heads[2].id, heads[1].id, heads[0].id]


def test_dependents_are_all_that_follow(index: DiskIndex) -> None:
    heads = chain(4)
    state = head(heads[1].parent, 64, kind=Kind.STATE)
    other = head(heads[0].key, 64, salt=1)
    put(index, *heads, state, other)
    assert {row.id for row in index.with_dependents(heads[1].id)} == {*(h.id for h in heads[1:]), state.id}
    assert [row.id for row in index.with_dependents(state.id)] == [state.id]
    missing = RecordId(root_key(NAMESPACE), Kind.KV)
    assert {row.id for row in index.with_dependents(missing)} == {*(h.id for h in heads), state.id, other.id}


def test_only_old_leaves_expire(index: DiskIndex) -> None:
    heads = chain(2)
    put(index, heads[0], at=1.0)
    put(index, heads[1], at=9.0)
    assert index.expired_leaves(5.0) == []
    assert [row.id for row in index.expired_leaves(10.0)] == [heads[1].id]


def test_ages_follow_a_clock_that_was_set(index: DiskIndex) -> None:
    first, second = (chain(1, salt=salt)[0] for salt in range(2))
    put(index, first, at=100.0)
    put(index, second, at=5000.0)
    index.shift_ages(1000.0, 1150.0)
    assert {row.id: row.used_at for row in index.entries()} == {first.id: 1100.0, second.id: 1150.0}


def test_bytes_per_day(index: DiskIndex) -> None:
    index.add_written(100, 5)
    index.add_written(100, 6)
    index.add_written(101, 7)
    assert [index.written(day) for day in (99, 100, 101)] == [0, 11, 7]
    index.add_written(100 + disk_index.KEPT_DAYS + 1, 1)
    assert [index.written(day) for day in (100, 101)] == [0, 7]


def _steps(index: DiskIndex, work: object) -> int:
    """Steps of SQLite's machine that some work takes: a cost that no clock disturbs."""
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return 0

    index._db.set_progress_handler(counted, 1)
    work()
    index._db.set_progress_handler(None, 0)
    return count


def test_eviction_costs_the_same_in_a_large_pool(tmp_path: Path) -> None:
    costs: dict[int, int] = {}
    for size in (100, 4000):
        index = DiskIndex(tmp_path / f"{size}.sqlite")
        put(index, *(record for salt in range(size // 10) for record in chain(10, salt=salt)))
        costs[size] = _steps(index, lambda index=index: evict(index, 5))
        index.close()
    assert costs[4000] < 1.5 * costs[100]


def test_no_query_on_the_way_of_writes_reads_the_whole_table(index: DiskIndex) -> None:
    put(index, *chain(3))
    plans: list[str] = []
    statements: list[str] = []
    index._db.set_trace_callback(statements.append)
    record = chain(1, salt=5)[0]
    put(index, record)
    with index.transaction():
        index.touch([record.id], 1.0)
        index.oldest_leaves([record.key])
        index.expired_leaves(1.0)
        index.with_dependents(record.id)
        index.get(record.id)
        index.shard(3)
        index.delete(record.id)
        index.totals()
    index._db.set_trace_callback(None)
    for statement in statements:
        if statement.startswith(("SELECT", "UPDATE", "INSERT", "DELETE", "WITH", "\n")) and "written" not in statement:
            plans += [row[3] for row in index._db.execute("EXPLAIN QUERY PLAN " + statement)]
    scans = [plan for plan in plans if plan.startswith("SCAN")]
    # The recursion's own working table, the one row of totals, and partial indexes that are read from their start.
    assert all("totals" in s or " d" in s or "USING" in s or "CONSTANT" in s or "doomed" in s for s in scans), scans
    assert len(plans) > 10


class PoolMachine(RuleBasedStateMachine):
    """Totals and children as the triggers keep them against a model that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.index = DiskIndex(Path(":memory:"))
        self.model: dict[RecordId, DiskEntry] = {}

    @rule(salt=st.integers(0, 2), depth=st.integers(0, 3), kind=st.sampled_from(Kind), nbytes=st.integers(1, 99))
    def put(self, salt: int, depth: int, kind: Kind, nbytes: int) -> None:
        block = chain(depth + 1, salt=salt)[depth]
        record = head(block.parent, block.start, kind=kind, salt=salt)
        entry = entry_of(record, nbytes)
        with self.index.transaction():
            self.index.put(NAMESPACE, entry, 1.0)
        self.model[entry.id] = entry

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(sorted(self.model)))
        with self.index.transaction():
            self.index.delete(record)
        del self.model[record]

    @invariant()
    def agrees(self) -> None:
        assert self.index.totals() == (len(self.model), sum(entry.nbytes for entry in self.model.values()))
        found = {
            RecordId(key, Kind(kind)): children
            for key, kind, children in self.index._db.execute("SELECT key, kind, children FROM records")
        }
        assert found == {record: self._children(record) for record in self.model}

    def _children(self, record: RecordId) -> int:
        if record.kind != Kind.KV:
            return 0
        return sum(
            entry.parent == record.key or (entry.key == record.key and entry.kind != Kind.KV)
            for entry in self.model.values()
        )

    def teardown(self) -> None:
        self.index.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to look at" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_that_is_no_database_is_unusable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.sqlite"
    path.write_bytes(content)
    with pytest.raises(UnusableIndex):
        DiskIndex(path)


def test_a_database_of_others_or_of_another_version_is_unusable(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE notes(text)")
    foreign.close()
    with pytest.raises(UnusableIndex):
        DiskIndex(tmp_path / "foreign.sqlite")
    index = DiskIndex(tmp_path / "later.sqlite")
    index._db.execute("PRAGMA user_version = 99")
    index.close()
    with pytest.raises(UnusableIndex, match="99"):
        DiskIndex(tmp_path / "later.sqlite")


def test_another_holder_makes_it_busy_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_index, "BUSY_SECONDS", 0.01)
    first, second = DiskIndex(tmp_path / "index.sqlite"), DiskIndex(tmp_path / "index.sqlite")
    with first.transaction(), pytest.raises(sqlite3.OperationalError) as caught, second.transaction():
        pass
    assert is_busy(caught.value)
    put(second, *chain(1))
    assert first.totals().files == 1


def test_two_processes_worth_of_threads_agree(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    DiskIndex(path).close()

    def add(salt: int) -> None:
        index = DiskIndex(path)
        for record in chain(20, salt=salt):
            put(index, record)
        index.close()

    threads = [threading.Thread(target=add, args=(salt,)) for salt in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = DiskIndex(path)
    assert index.totals() == (60, 6000)
    assert len({used for (used,) in index._db.execute("SELECT used FROM records")}) == 60


def test_it_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    writer = DiskIndex(path)
    put(writer, *chain(2))
    writer.close()
    reader = DiskIndex(path, writable=False)
    assert len(reader.entries()) == 2
    with pytest.raises(sqlite3.OperationalError):
        reader.add_written(1, 1)


def test_what_each_namespace_uses(index: DiskIndex) -> None:
    put(index, *chain(3), at=5.0)
    index.name(NAMESPACE, "small model")
    index.name(NAMESPACE, "")
    (use,) = index.use_by_namespace()
    assert use == (NAMESPACE, "small model", 3, 300, 5.0)
