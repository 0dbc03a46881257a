"""The SSD tier in use: what is saved is found again, limits hold, and no call waits for the disk."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ssd_support import (
    NAMESPACE,
    NO_LIMITS,
    OTHER,
    STEPS,
    FailingFiles,
    Listener,
    RunningTier,
    SetClock,
    bytes_on_disk,
    chain,
    file_of,
    head,
    payload_of,
    record_files,
    running,
)

from millpond.prefix.disk.block_file import file_bytes
from millpond.prefix.disk.events import Found, Gone, Loaded, Opened, Saved, SsdEvent
from millpond.prefix.disk.files import Files, Space
from millpond.prefix.disk.index import DiskIndex
from millpond.prefix.disk.reader import AHEAD
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.records import Kind
from millpond.settings import PrefixSettings, SavePolicy

SIZE = file_bytes(chain(1)[0], NAMESPACE)


def cap(records: float, **more: object) -> PrefixSettings:
    return PrefixSettings(cache_ssd=int(records * SIZE), **more)


def test_what_is_saved_is_found_after_a_restart(tmp_path: Path) -> None:
    heads = chain(5)
    state = head(heads[2].parent, 128, kind=Kind.STATE, size=0)
    with running(tmp_path) as tier:
        assert tier.opened == Opened([])
        assert set(tier.save(*heads, state).values()) == {""}
        assert tier.load(heads[3]).problem == ""
        stats = tier.tier.stats
        assert (stats.files, stats.bytes, stats.writes) == (6, bytes_on_disk(tmp_path), 6)
        assert stats.written_bytes == stats.bytes
    with running(tmp_path) as tier:
        assert {entry.id for entry in tier.opened.entries} == {record.id for record in (*heads, state)}
        assert all(entry.nbytes == file_of(tmp_path, entry).stat().st_size for entry in tier.opened.entries)
        for record in (*heads, state):
            assert tier.load(record).problem == ""
        assert tier.tier.stats.reads == 6


def test_namespaces_do_not_see_each_other(tmp_path: Path) -> None:
    with running(tmp_path) as tier:
        tier.save(*chain(3))
    with running(tmp_path, namespace=OTHER) as tier:
        assert tier.opened.entries == []
        tier.save(*chain(2, namespace=OTHER))
        assert tier.tier.stats.files == 5


def test_everything_is_private_to_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    with running(folder) as tier:
        tier.save(*chain(3))
        paths = [folder.parent, folder, *folder.rglob("*")]
        modes = {path: path.stat().st_mode & 0o777 for path in paths}
    assert len(paths) > 8
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize("entries", [(), ("index.sqlite-old", "0123456789abcdef", "quarantine")])
def test_a_wide_folder_of_ours_is_narrowed(tmp_path: Path, entries: tuple[str, ...]) -> None:
    tmp_path.chmod(0o777)
    for name in entries:
        (tmp_path / name).mkdir()
    with running(tmp_path) as tier:
        tier.save(*chain(1))
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("mode", "other"), [(0o755, "letters"), (0o1777, "")])
def test_a_wide_folder_that_others_use_is_warned_of(
    tmp_path: Path, mode: int, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    if other:
        (tmp_path / other).mkdir()
    tmp_path.chmod(mode)
    with running(tmp_path) as tier:
        tier.save(*chain(1))
    assert tmp_path.stat().st_mode & 0o7777 == mode
    assert "others may look into" in caplog.text


@pytest.mark.parametrize("name", ["index.lock", "index.sqlite-wal", "index.sqlite-shm", "index.sqlite"])
def test_planted_links_are_not_followed(tmp_path: Path, name: str) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "cache"
    precious.write_bytes(b"precious" * 1000)
    folder.mkdir(mode=0o700)
    (folder / name).symlink_to(precious)
    with running(folder) as tier:
        tier.save(*chain(1))
    assert precious.read_bytes() == b"precious" * 1000


@pytest.mark.parametrize("plant", ["link", "pipe"])
def test_a_record_that_is_no_file_is_a_miss(tmp_path: Path, plant: str) -> None:
    [record] = chain(1)
    folder = tmp_path / "cache"
    with running(folder) as tier:
        tier.save(record)
        path, elsewhere = file_of(folder, record), tmp_path / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere) if plant == "link" else os.mkfifo(path)
        assert tier.load(record).problem
    assert elsewhere.exists()


def test_the_cap_holds_after_every_event(tmp_path: Path) -> None:
    limits = cap(4.5)
    over: list[SsdEvent] = []

    def check(event: SsdEvent) -> None:
        if bytes_on_disk(tmp_path) > limits.cache_ssd:
            over.append(event)

    with running(tmp_path, limits, check=check) as tier:
        for salt in range(4):
            tier.save(*chain(3, salt=salt))
        stats = tier.tier.stats
        assert stats.evicted == 8
        assert stats.bytes == bytes_on_disk(tmp_path) <= limits.cache_ssd
        assert len(tier.listener.gone()) == 8
    assert not over


def test_eviction_takes_leaves_least_recently_used_first(tmp_path: Path) -> None:
    old, new = chain(2), chain(2, salt=1)
    with running(tmp_path, cap(4.5)) as tier:
        tier.save(*old, *new)
        tier.tier.touch([record.id for record in old])
        tier.save(*chain(1, salt=2))
        assert tier.listener.gone() == {new[1].id}
        tier.save(*chain(1, salt=3))
        assert tier.listener.gone() == {new[1].id, new[0].id}
        assert tier.load(old[1]).problem == ""


def test_a_record_does_not_push_out_what_it_depends_on(tmp_path: Path) -> None:
    heads = chain(3)
    with running(tmp_path, cap(2.5)) as tier:
        answers = tier.save(*heads)
        assert [answers[record.id] for record in heads] == ["", "", "no room for it"]
        assert tier.listener.gone() == set()
        assert tier.tier.stats.skipped_full == 1


def test_a_file_above_the_cap_empties_nothing(tmp_path: Path) -> None:
    heads = chain(2)
    with running(tmp_path, cap(2.5)) as tier:
        tier.save(*heads)
        large = chain(1, salt=1, size=10 * SIZE)[0]
        assert tier.save(large)[large.id]
        assert tier.tier.stats.files == 2


def test_a_smaller_cap_holds_at_the_next_start(tmp_path: Path) -> None:
    heads = chain(6)
    with running(tmp_path) as tier:
        tier.save(*heads)
    with running(tmp_path, cap(3)) as tier:
        assert [entry.id for entry in tier.opened.entries] == [record.id for record in heads[:3]]
        assert bytes_on_disk(tmp_path) <= 3 * SIZE


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    heads = [chain(1, salt=salt)[0] for salt in range(3)]
    with running(tmp_path) as tier:
        tier.save(*heads)
        tier.tier.touch([heads[0].id])
        assert tier.close()
    with running(tmp_path, cap(1)) as tier:
        assert [entry.id for entry in tier.opened.entries] == [heads[0].id]


class NarrowFiles(Files):
    """A disk with little room, of which our records take theirs."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.bytes = size

    def space(self, folder: Path) -> Space:
        used = bytes_on_disk(self.folder)
        return Space(self.bytes - used, used)


def test_the_free_space_floor_holds(tmp_path: Path) -> None:
    files = NarrowFiles(tmp_path, 10 * SIZE)
    with running(tmp_path, PrefixSettings(cache_ssd=1 << 40, ssd_min_free=6 * SIZE), files=files) as tier:
        heads = [chain(1, salt=salt)[0] for salt in range(6)]
        assert set(tier.save(*heads).values()) == {""}
        assert files.space(tmp_path).free >= 6 * SIZE
        assert tier.listener.gone() == {record.id for record in heads[:2]}
        files.bytes = 5 * SIZE
        last = chain(1, salt=9)[0]
        assert tier.save(last)[last.id] == "no room for it"
        # Not even an empty cache would help, so it stays for reads until the upkeep; that frees what it can.
        assert tier.tier.stats.skipped_full == 1


def test_upkeep_holds_the_floor_when_others_fill_the_disk(tmp_path: Path) -> None:
    files = NarrowFiles(tmp_path, 20 * SIZE)
    limits = PrefixSettings(cache_ssd=1 << 40, ssd_min_free=6 * SIZE)
    with running(tmp_path, limits, files=files, upkeep_seconds=0.05) as tier:
        tier.save(*chain(4))
        files.bytes = 8 * SIZE
        tier.listener.wait(lambda: tier.tier.stats.files == 2)


def test_unused_records_expire(tmp_path: Path) -> None:
    time_ = SetClock()
    limits = PrefixSettings(cache_ssd=1 << 40, ssd_ttl=1000)
    heads = chain(3)
    with running(tmp_path, limits, clock=time_.clock(), upkeep_seconds=0.05) as tier:
        tier.save(*heads)
        time_.advance(900)
        tier.tier.touch([heads[0].id])
        tier.save(*chain(1, salt=1))
        time_.advance(200)
        tier.listener.wait(lambda: len(tier.listener.gone()) == 2)
        assert tier.listener.gone() == {heads[1].id, heads[2].id}
        assert tier.tier.stats.expired == 2
    time_.advance(2000)
    with running(tmp_path, limits, clock=time_.clock()) as tier:
        assert tier.opened.entries == []


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_clock_that_jumps_expires_nothing(tmp_path: Path, jump: float) -> None:
    time_ = SetClock()
    limits = PrefixSettings(cache_ssd=1 << 40, ssd_ttl=1000)
    with running(tmp_path, limits, clock=time_.clock(), upkeep_seconds=0.05) as tier:
        tier.save(*chain(2))
        time_.wall += jump
        settled = time_.wall - 1
        tier.listener.wait(lambda: tier.tier._writer._pool.clock._base[0] > settled)
        tier.save(*chain(1, salt=1))
        assert tier.tier.stats.expired == 0
    with running(tmp_path, limits, clock=time_.clock(), upkeep_seconds=0.05) as tier:
        assert len(tier.opened.entries) == 3
        time_.advance(1001)
        tier.listener.wait(lambda: tier.tier.stats.expired == 3)


def test_the_daily_budget_holds_over_restarts(tmp_path: Path) -> None:
    time_ = SetClock()
    limits = PrefixSettings(cache_ssd=1 << 40, ssd_daily_writes=3 * SIZE)
    heads = chain(5)
    with running(tmp_path, limits, clock=time_.clock()) as tier:
        assert list(tier.save(*heads[:2]).values()) == ["", ""]
    with running(tmp_path, limits, clock=time_.clock()) as tier:
        answers = tier.save(*heads[2:])
        assert [bool(answers[record.id]) for record in heads[2:]] == [False, True, True]
        assert tier.tier.stats.skipped_daily == 2
        time_.advance(86400)
        assert tier.save(heads[3])[heads[3].id] == ""


def test_a_known_record_is_not_written_again(tmp_path: Path) -> None:
    heads = chain(2)
    with running(tmp_path) as tier:
        tier.save(*heads)
        assert set(tier.save(*heads).values()) == {""}
        assert tier.tier.stats.writes == 2


def test_discarding_removes_what_depends_on_it(tmp_path: Path) -> None:
    heads = chain(4)
    with running(tmp_path) as tier:
        tier.save(*heads)
        tier.tier.discard([heads[1].id])
        tier.listener.wait(lambda: len(tier.listener.gone()) == 3)
        assert [path.name for path in record_files(tmp_path)] == [file_of(tmp_path, heads[0]).name]
        assert tier.load(heads[1]).problem == "the file is missing"


def test_writes_off_changes_nothing(tmp_path: Path) -> None:
    heads = chain(2)
    with running(tmp_path) as tier:
        tier.save(*heads)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with running(tmp_path, PrefixSettings(cache_ssd=0, ssd_ttl=0.0001, ssd_policy=SavePolicy.OFF)) as tier:
        assert tier.opened.problem == ""
        assert tier.load(heads[1]).problem == ""
        assert tier.save(chain(1, salt=1)[0]).popitem()[1] == "writes are off"
        assert not tier.tier.stats.writing
        assert tier.tier.stats.skipped_off == 1
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "index" not in path.name}
    assert after == {path: time_ for path, time_ in before.items() if "index" not in path.name}
    absent = tmp_path / "absent"
    with running(absent, PrefixSettings(cache_ssd=0, ssd_policy=SavePolicy.OFF)) as tier:
        assert tier.opened == Opened([])
    assert not absent.exists()


class RecordingFiles(Files):
    """Notes the steps that change files, in their order."""

    def __init__(self, folder: Path) -> None:
        self.steps: list[str] = []
        self.database = folder / "index.sqlite"

    def note(self, step: str) -> None:
        self.steps.append(step)


def _recording(name: str):  # noqa: ANN202
    def step(self: RecordingFiles, *args: object) -> object:
        self.note(name)
        return getattr(Files, name)(self, *args)

    return step


for _name in STEPS:
    setattr(RecordingFiles, _name, _recording(_name))


@pytest.mark.parametrize("durability", ["durable", "best-effort"])
def test_a_durable_write_is_synced_before_its_row(
    tmp_path: Path, durability: Literal["durable", "best-effort"], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RecordingFiles(tmp_path)
    with running(tmp_path, PrefixSettings(cache_ssd=1 << 40, ssd_durability=durability), files=files) as tier:
        tier.swept()
        put = DiskIndex.put

        def noted(self: DiskIndex, *args: object) -> None:
            files.note("row")
            put(self, *args)

        monkeypatch.setattr(DiskIndex, "put", noted)
        files.steps.clear()
        tier.save(*chain(1))
        steps = [step for step in files.steps if step not in ("make_folder", "write")]
    if durability == "durable":
        assert steps[:4] == ["create", "sync", "close", "publish"]
        assert set(steps[4:-1]) == {"sync_folder"}
        assert steps[-1] == "row"
    else:
        assert steps == ["create", "close", "publish", "row"]


class BlockingFiles(Files):
    """A disk that does not answer until it is let go."""

    def __init__(self, *steps: str) -> None:
        self.blocked = set(steps)
        self.entered = threading.Event()
        self.go = threading.Event()

    def hold(self, step: str) -> None:
        if step in self.blocked:
            self.entered.set()
            self.go.wait()

    def read(self, descriptor: int, into: memoryview) -> int:
        self.hold("read")
        return super().read(descriptor, into)

    def write(self, descriptor: int, data: memoryview) -> int:
        self.hold("write")
        return super().write(descriptor, data)


def test_a_disk_that_does_not_answer_holds_up_no_call(tmp_path: Path) -> None:
    """Single-threaded by nature: were one of these calls to wait for the disk, the test would never end."""
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(*heads[:2])
    files = BlockingFiles("read", "write")
    with running(tmp_path, files=files) as tier:
        tier.tier.read(heads[0], 1)
        tier.tier.write(heads[2], payload_of(heads[2]))
        files.entered.wait()
        for number in range(50):
            tier.tier.read(heads[1], 100 + number)
            tier.tier.touch([heads[0].id])
            assert tier.tier.stats.reads == 0
        tier.tier.discard([chain(1, salt=4)[0].id])
        files.go.set()
        seen: set[int] = set()

        def all_answered() -> bool:
            for event in tier.listener.of(Loaded):
                if event.ticket not in seen:
                    seen.add(event.ticket)
                    tier.tier.taken()
            return len(seen) == 51

        tier.listener.wait(all_answered)


@pytest.mark.parametrize("step", ["read", "write"])
def test_closing_meets_its_deadline_on_a_disk_that_does_not_answer(tmp_path: Path, step: str) -> None:
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(heads[0])
    files = BlockingFiles(step)
    tier = RunningTier(tmp_path, files=files)
    tier.tier.read(heads[0], 1)
    for record in heads[1:]:
        tier.tier.write(record, payload_of(record))
    files.entered.wait()
    written = tier.tier.close(0.3)
    # What counts is that it came back at all; the blocked thread is still there.
    assert written == (step == "read")
    files.go.set()


class SlowFiles(Files):
    """A disk that takes its time for every write."""

    def write(self, descriptor: int, data: memoryview) -> int:
        threading.Event().wait(0.02)
        return super().write(descriptor, data)


def test_closing_with_a_full_queue_answers_every_write(tmp_path: Path) -> None:
    heads = [chain(1, salt=salt)[0] for salt in range(200)]
    tier = RunningTier(tmp_path, files=SlowFiles())
    for record in heads:
        tier.tier.write(record, payload_of(record))
    assert not tier.tier.close(0.3)
    tier.listener.wait(lambda: len(tier.listener.saved()) == len(heads))
    saved = [record for record in heads if not tier.listener.saved()[record.id]]
    assert len(saved) < len(heads)
    assert not tier.tier.write(heads[0], b"")
    assert not [path for path in record_files(tmp_path) if path.suffix == ".tmp"]
    with running(tmp_path) as again:
        assert {entry.id for entry in again.opened.entries} == {record.id for record in saved}


def test_closing_finishes_what_is_queued(tmp_path: Path) -> None:
    heads = chain(40)
    tier = RunningTier(tmp_path)
    for record in heads:
        tier.tier.write(record, payload_of(record))
    tier.tier.touch([heads[0].id])
    assert tier.close()
    with running(tmp_path) as again:
        assert len(again.opened.entries) == 40


def test_closing_at_once_and_twice_is_fine(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, NAMESPACE, NO_LIMITS, Listener())
    assert tier.close(1.0)
    tier = SsdTier(tmp_path, NAMESPACE, NO_LIMITS, Listener())
    tier.start()
    assert tier.close(30.0)
    assert tier.close(1.0)


def test_what_was_read_stays_as_it_was_read(tmp_path: Path) -> None:
    """Each record in memory of its own: what follows changes none of it."""
    heads = chain(11)
    with running(tmp_path) as tier:
        tier.save(*heads)
        for ticket, record in enumerate([*heads, *heads]):
            tier.tier.read(record, ticket)
            tier.tier.taken()
        tier.listener.wait(lambda: len(tier.listener.of(Loaded)) == 2 * len(heads))
    found = tier.listener.of(Loaded)
    assert len({id(event.payload.obj) for event in found}) == len(found)
    for event in found:
        assert bytes(event.payload) == payload_of(heads[event.ticket % len(heads)])


def test_what_is_read_ahead_is_bounded(tmp_path: Path) -> None:
    """Until somebody takes it."""
    heads = chain(AHEAD + 3)
    with running(tmp_path) as tier:
        tier.save(*heads)
        for ticket, record in enumerate(heads):
            tier.tier.read(record, ticket)
        for taken in range(4):
            tier.listener.wait(lambda taken=taken: len(tier.listener.of(Loaded)) == min(AHEAD + taken, len(heads)))
            tier.tier.taken()
        assert tier.tier.stats.reads == len(heads)


def test_what_is_queued_for_reading_is_answered_when_the_tier_closes(tmp_path: Path) -> None:
    heads = chain(AHEAD + 3)
    tier = RunningTier(tmp_path)
    tier.save(*heads)
    for ticket, record in enumerate(heads):
        tier.tier.read(record, ticket)
    tier.listener.wait(lambda: len(tier.listener.of(Loaded)) == AHEAD)
    assert tier.close()
    problems = [event.problem for event in tier.listener.of(Loaded)]
    assert len(problems) == len(heads)
    assert problems.count("the tier is closing") == 3


def test_a_listener_that_raises_ends_no_thread(tmp_path: Path) -> None:
    failed = threading.Event()

    def check(event: SsdEvent) -> None:
        if isinstance(event, Saved) and not failed.is_set():
            failed.set()
            raise RuntimeError("a fault in the engine")

    with running(tmp_path, check=check) as tier:
        first, second = chain(2)
        tier.tier.write(first, payload_of(first))
        assert tier.save(second)[second.id] == ""


@given(salts=st.lists(st.integers(0, 5), min_size=1, max_size=12), room=st.integers(2, 8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_writes_and_uses_keeps_the_limits(
    tmp_path_factory: pytest.TempPathFactory, salts: list[int], room: int
) -> None:
    folder = tmp_path_factory.mktemp("pool")
    limits = cap(room + 0.5)
    with running(folder, limits) as tier:
        for salt in salts:
            heads = chain(3, salt=salt)
            tier.save(*heads)
            tier.tier.touch([record.id for record in heads])
            assert bytes_on_disk(folder) <= limits.cache_ssd
        left = {path.name for path in record_files(folder)}
        for salt in set(salts):
            present = [file_of(folder, record).name in left for record in chain(3, salt=salt)]
            assert present == sorted(present, reverse=True), "a child without its parent"


def test_a_locked_index_puts_work_off_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.prefix.disk.index.BUSY_SECONDS", 0.01)
    heads = chain(2)
    with running(tmp_path) as tier:
        tier.save(heads[0])
        tier.swept()
        other = DiskIndex(tmp_path / "index.sqlite")
        with other.transaction():
            tier.tier.write(heads[1], payload_of(heads[1]))
            tier.listener.wait(lambda: tier.tier.stats.index_busy >= 2)
            assert tier.load(heads[0]).problem == ""
            assert heads[1].id not in tier.listener.saved()
        tier.listener.wait(lambda: tier.listener.saved().get(heads[1].id) == "")
        other.close()


def test_a_locked_index_at_the_start_is_said_and_got_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.prefix.disk.index.BUSY_SECONDS", 0.01)
    monkeypatch.setattr("millpond.prefix.disk.writer.OPEN_SECONDS", 0.5)
    heads = chain(2)
    with running(tmp_path) as tier:
        tier.save(*heads)
    other = DiskIndex(tmp_path / "index.sqlite")
    with other.transaction():
        tier = RunningTier(tmp_path)
        assert tier.opened.problem
    tier.listener.wait(
        lambda: {e.id for found in tier.listener.of(Found) for e in found.entries} == {h.id for h in heads}
    )
    assert tier.close()


def test_errors_of_writing_pause_and_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.prefix.disk.backoff.BACKOFF_SECONDS", (0.05,))
    files = FailingFiles()
    first, second, third = chain(3)
    with running(tmp_path, files=files) as tier:
        tier.save(first)
        files.failing["publish"] = OSError(5, "Input/output error")
        assert "Input/output" in tier.save(second)[second.id]
        assert tier.tier.stats.write_errors == 1
        assert tier.load(first).problem == ""
        files.failing.clear()
        tier.listener.wait(lambda: tier.tier.stats.writing)
        assert set(tier.save(second, third).values()) == {""}
        assert len(record_files(tmp_path)) == 3
    assert isinstance(tier.listener.events[0], Opened)
    assert not tier.listener.of(Gone)


def test_threads_are_idle_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    """No polling: an idle tier takes no steps at all (the upkeep is a minute away)."""
    with running(tmp_path) as tier:
        tier.save(*chain(2))
        tier.swept()
        cycles = 0
        cycle = tier.tier._writer._cycle

        def counted() -> None:
            nonlocal cycles
            cycles += 1
            cycle()

        tier.tier._writer._cycle = counted
        time.sleep(0.2)
        assert cycles <= 1
