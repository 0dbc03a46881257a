"""Several servers with one SSD folder: what one removes and another writes ends as a row with its file, or as none."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ssd_support import NAMESPACE, bytes_on_disk, chain, file_of, payload_of, record_files, running

from millpond.prefix.disk.age_clock import AgeClock
from millpond.prefix.disk.block_file import file_bytes
from millpond.prefix.disk.events import Found
from millpond.prefix.disk.files import Files, Space
from millpond.prefix.disk.index import DiskIndex
from millpond.prefix.disk.pool import DiskPool
from millpond.prefix.disk.reader import Fault
from millpond.prefix.records import RecordHead
from millpond.settings import PrefixSettings

SIZE = file_bytes(chain(1)[0], NAMESPACE)

WRITER = """
import sys
from pathlib import Path
from ssd_support import NO_LIMITS, chain, running
from millpond.settings import PrefixSettings
limits = PrefixSettings(cache_ssd=int(sys.argv[3]))
with running(Path(sys.argv[1]), limits) as tier:
    for salt in range(int(sys.argv[2]), 12, 2):
        tier.save(*chain(4, salt=salt))
        for record in chain(4, salt=salt - 1 if salt else 0):
            tier.load(record)
    assert tier.tier.stats.write_errors == 0, tier.tier.stats
    assert not tier.tier.stats.damaged, tier.tier.stats
"""


@pytest.mark.parametrize("room", [1000, 10])
def test_two_processes_share_a_folder(tmp_path: Path, room: int) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(first), str(room * SIZE)], cwd=Path(__file__).parent.parent / "support")
        for first in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    with running(tmp_path, PrefixSettings(cache_ssd=room * SIZE)) as tier:
        tier.swept()
        files = record_files(tmp_path)
        assert bytes_on_disk(tmp_path) <= room * SIZE
        assert {file_of(tmp_path, entry) for entry in tier.opened.entries} == set(files)
        assert len(files) == min(48, room)
        assert not tier.listener.of(Found)


def test_a_folder_that_another_is_just_opening_is_waited_for(tmp_path: Path) -> None:
    """Servers and ranks that start together: none of them may take the folder for an empty one."""
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(*heads)
    with ExitStack() as held:
        held.enter_context(Files().locked(tmp_path / "index.lock"))
        threading.Timer(0.2, held.close).start()
        with running(tmp_path) as tier:
            assert tier.opened.problem == ""
            assert {entry.id for entry in tier.opened.entries} == {head.id for head in heads}


def test_a_file_removed_by_another_is_a_miss(tmp_path: Path) -> None:
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(*heads)
        file_of(tmp_path, heads[1]).unlink()
        assert tier.load(heads[1]).problem == "the file is missing"
        tier.listener.wait(lambda: len(tier.listener.gone()) == 2)
        assert tier.listener.gone() == {heads[1].id, heads[2].id}
        assert tier.tier.stats.missing == 1
        assert tier.load(heads[0]).problem == ""
        assert set(tier.save(*heads[1:]).values()) == {""}


def test_a_missing_file_that_another_has_written_since_stays(tmp_path: Path) -> None:
    """A reader was there first, and its report comes when the record and what depends on it are in the folder."""
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(*heads)
        tier.swept()
        tier.tier._inbox.report(Fault(heads[0].id, missing=True))
        tier.save(*chain(1, salt=1))
        assert not tier.listener.gone()
        assert {file_of(tmp_path, record) for record in heads} <= set(record_files(tmp_path))
        assert tier.load(heads[2]).problem == ""


class RivalFiles(Files):
    """Another server removes a file between its publication and its row."""

    def publish(self, temporary: Path, final: Path) -> None:
        super().publish(temporary, final)
        final.unlink()


def test_no_row_for_a_file_that_another_removed_at_once(tmp_path: Path) -> None:
    [record] = chain(1)
    with running(tmp_path, files=RivalFiles()) as tier:
        assert "another server" in tier.save(record)[record.id]
        assert tier.tier.stats.files == 0
    with running(tmp_path) as again:
        assert not again.opened.entries
        assert again.save(record)[record.id] == ""


class CrowdedFiles(Files):
    """Whenever somebody asks how much space is free, another server has just written a record."""

    def __init__(self, folder: Path) -> None:
        self._rival = DiskPool(folder, Files(), AgeClock())
        self._salt = 100

    def space(self, folder: Path) -> Space:
        if folder.exists():
            self._salt += 1
            self._rival.open()
            publish(self._rival, chain(1, salt=self._salt)[0])
            self._rival.close()
        return super().space(folder)


def test_what_another_writes_meanwhile_drives_nothing_out(tmp_path: Path) -> None:
    """There is room for all: the more there is when room is made, the less of it may be taken for too much."""
    heads = chain(3)
    with running(tmp_path, files=CrowdedFiles(tmp_path)) as tier:
        assert set(tier.save(*heads).values()) == {""}
        assert tier.tier.stats.evicted == 0
        assert not tier.listener.gone()
        assert len(record_files(tmp_path)) > len(heads)
    with running(tmp_path) as again:
        assert {file_of(tmp_path, entry) for entry in again.opened.entries} == set(record_files(tmp_path))


def publish(pool: DiskPool, record: RecordHead) -> None:
    entry = pool.publish(record, NAMESPACE, payload_of(record), lambda: False)
    with pool.index.transaction():
        pool.index.put(NAMESPACE, entry, 0.0)


@pytest.mark.parametrize("way", ["evict_to", "drop", "expire", "remove"])
def test_a_file_published_anew_survives_its_removal(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server removes a record's row, another writes the record again, then the first comes to the file."""
    [record] = chain(1)
    mine, theirs = (DiskPool(tmp_path, Files(), AgeClock()) for _ in range(2))
    mine.open()
    theirs.open()
    publish(mine, record)
    path = file_of(tmp_path, record)
    if way == "drop":
        path.unlink()
    rows = mine.index.entries()
    transaction = DiskIndex.transaction
    locked = 0

    @contextmanager
    def watched(index: DiskIndex) -> Iterator[None]:
        nonlocal locked
        if index is mine.index:
            locked += 1
            if locked == 2:
                publish(theirs, record)
        with transaction(index):
            yield

    monkeypatch.setattr(DiskIndex, "transaction", watched)
    ways = {
        "evict_to": lambda: mine.evict_to(0),
        "drop": lambda: mine.drop([record.id]),
        "expire": lambda: mine.expire(1e12),
        "remove": lambda: mine.remove(rows),
    }
    ways[way]()
    assert locked >= 2
    assert path.exists() == bool(theirs.index.entries())
    if way in ("drop", "remove"):
        assert path.exists()
    mine.close()
    theirs.close()
