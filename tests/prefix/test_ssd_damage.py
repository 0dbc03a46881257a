"""Everything that can be wrong with files, index and disk: a miss and a counter, never an exception, and it goes on."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ssd_support import (
    NAMESPACE,
    NO_LIMITS,
    OTHER,
    FailingFiles,
    RunningTier,
    bytes_on_disk,
    chain,
    file_of,
    payload_of,
    record_files,
    running,
)

from millpond.prefix.disk import block_file, pool
from millpond.prefix.disk.block_file import Damage, encode, file_bytes, layout
from millpond.prefix.disk.events import Found
from millpond.settings import PrefixSettings

SIZE = file_bytes(chain(1)[0], NAMESPACE)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTier]:
    """One tier for many damaged files; the first record of its prompts stays sound."""
    with running(tmp_path_factory.mktemp("shared")) as tier:
        yield tier


def damaged_total(tier: RunningTier) -> int:
    return sum(tier.tier.stats.damaged.values())


def expect_miss(tier: RunningTier, content: bytes) -> None:
    """Put a content in place of a saved record: a miss, a counter, quarantine, and room for a sound one."""
    first, second, third = chain(3)
    assert set(tier.save(first, second, third).values()) == {""}
    file_of(tier.folder, second).write_bytes(content)
    before = damaged_total(tier)
    events = len(tier.listener.events)
    assert tier.load(second).problem.startswith("damaged")
    tier.listener.wait(lambda: {second.id, third.id} <= gone_since(tier, events))
    assert first.id not in gone_since(tier, events)
    assert damaged_total(tier) == before + 1
    assert not file_of(tier.folder, second).exists()
    assert not file_of(tier.folder, third).exists()
    assert tier.load(first).problem == ""


def gone_since(tier: RunningTier, events: int) -> set:
    return {record for event in tier.listener.events[events:] for record in getattr(event, "ids", ())}


def sound(number: int = 1) -> bytes:
    record = chain(3)[number]
    return b"".join(encode(record, NAMESPACE, payload_of(record)))


@given(offset=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@quick
def test_a_flipped_bit_anywhere(shared: RunningTier, offset: int, bit: int) -> None:
    file = bytearray(sound())
    file[offset] ^= 1 << bit
    expect_miss(shared, bytes(file))


@given(length=st.integers(0, SIZE - 1), zeros=st.booleans())
@quick
def test_cut_off_or_zeroed_from_anywhere(shared: RunningTier, length: int, zeros: bool) -> None:
    content = sound()[:length]
    expect_miss(shared, content.ljust(SIZE, b"\0") if zeros and length < layout(sound()).payload_end else content)


def test_two_files_swapped(shared: RunningTier) -> None:
    expect_miss(shared, sound(2))
    assert shared.tier.stats.damaged[Damage.KEY] == 1


def test_a_foreign_version(shared: RunningTier, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(block_file, "VERSION", 77)
        content = sound()
    expect_miss(shared, content)
    assert shared.tier.stats.damaged[Damage.VERSION] >= 1


def test_a_file_of_another_namespace(shared: RunningTier) -> None:
    record = chain(3)[1]
    expect_miss(shared, b"".join(encode(record, OTHER, payload_of(record))))
    assert shared.tier.stats.damaged[Damage.NAMESPACE] == 1


def test_other_tokens_than_those_asked_for(tmp_path: Path) -> None:
    first, second = chain(2)
    with running(tmp_path) as tier:
        tier.save(first, second)
        fields = {name: getattr(second, name) for name in second.__struct_fields__} | {"tokens": first.tokens}
        assert "tokens" in tier.load(type(second)(**fields)).problem
        assert tier.tier.stats.damaged == {Damage.BLOCK: 1}


def test_quarantine_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "QUARANTINE_FILES", 3)
    heads = [chain(1, salt=salt)[0] for salt in range(5)]
    with running(tmp_path) as tier:
        tier.save(*heads)
        for number, record in enumerate(heads):
            file_of(tmp_path, record).write_bytes(b"x" * 10)
            tier.load(record)
            tier.listener.wait(lambda number=number: len(tier.listener.gone()) == number + 1)
    quarantine = tmp_path / "quarantine"
    assert len(list(quarantine.iterdir())) == 3
    assert quarantine.stat().st_mode & 0o777 == 0o700


def test_several_damaged_files_are_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = [chain(1, salt=salt)[0] for salt in range(3)]
    with running(tmp_path) as tier:
        tier.save(*heads)
        for record in heads:
            file_of(tmp_path, record).write_bytes(b"x")
            tier.load(record)
        tier.listener.wait(lambda: len(tier.listener.gone()) == 3)
    assert sum("several damaged files" in message for message in caplog.messages) == 1


def found(tier: RunningTier) -> set:
    return {entry.id for event in tier.listener.of(Found) for entry in event.entries}


@pytest.mark.parametrize("harm", ["deleted", "noise", "zeros", "cut", "foreign", "middle"])
def test_a_lost_or_broken_index_is_made_anew(tmp_path: Path, harm: str) -> None:
    heads = chain(30)
    with running(tmp_path) as tier:
        tier.save(*heads)
    index = tmp_path / "index.sqlite"
    content = index.read_bytes()
    index.unlink()
    if harm == "noise":
        index.write_bytes(os.urandom(len(content)))
    elif harm == "zeros":
        index.write_bytes(bytes(len(content)))
    elif harm == "cut":
        index.write_bytes(content[: len(content) // 2])
    elif harm == "middle":
        index.write_bytes(content[:5000] + os.urandom(8000) + content[13000:])
    elif harm == "foreign":
        with sqlite3.connect(index) as database:
            database.execute("CREATE TABLE notes(text)")
        database.close()
    with running(tmp_path) as tier:
        tier.swept()
        assert found(tier) == {record.id for record in heads}
        stats = tier.tier.stats
        assert (stats.index_rebuilt, stats.adopted, stats.files) == (1, 30, 30)
        for record in heads[::7]:
            assert tier.load(record).problem == ""
    with running(tmp_path) as tier:
        assert len(tier.opened.entries) == 30


def test_an_index_broken_while_running_is_made_anew(tmp_path: Path) -> None:
    heads = chain(5)
    with running(tmp_path) as tier:
        tier.save(*heads[:4])
        tier.swept()
        index = tmp_path / "index.sqlite"
        index.with_name("other").write_bytes(b"no database" * 1000)
        index.with_name("other").replace(index)
        for suffix in ("-wal", "-shm"):
            # The log alone would be enough to restore everything.
            index.with_name(index.name + suffix).unlink()
        tier.tier.write(heads[4], payload_of(heads[4]))
        tier.listener.wait(lambda: tier.tier.stats.index_rebuilt == 1 and tier.tier.stats.files >= 4)
        tier.swept()
        assert tier.load(heads[2]).problem == ""


def test_rows_without_files_and_files_without_rows(tmp_path: Path) -> None:
    heads = chain(6)
    with running(tmp_path) as tier:
        tier.save(*heads)
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("DELETE FROM records WHERE key = ?", (heads[5].key,))
    database.close()
    file_of(tmp_path, heads[3]).unlink()
    wrong = file_of(tmp_path, heads[5]).with_name("ab" * 32 + ".kv")
    shutil.copy(file_of(tmp_path, heads[0]), wrong)
    with running(tmp_path) as tier:
        tier.swept()
        assert {heads[3].id, heads[4].id} <= tier.listener.gone()
        assert heads[5].id in found(tier)
        assert not wrong.exists()
        assert tier.tier.stats.damaged == {Damage.KEY: 1}


def test_a_file_of_the_wrong_size_is_found_by_the_sweep(tmp_path: Path) -> None:
    heads = chain(3)
    with running(tmp_path) as tier:
        tier.save(*heads)
    file_of(tmp_path, heads[1]).write_bytes(sound()[:-1])
    with running(tmp_path) as tier:
        tier.swept()
        assert tier.listener.gone() == {heads[1].id, heads[2].id}
        assert tier.tier.stats.damaged == {Damage.LENGTH: 1}


@pytest.mark.parametrize("again", [True, False])
def test_the_folder_removed_while_running(tmp_path: Path, again: bool) -> None:
    folder = tmp_path / "cache"
    heads = chain(4)
    with running(folder) as tier:
        tier.save(*heads[:3])
        tier.swept()
        shutil.rmtree(folder)
        if again:
            assert tier.load(heads[0]).problem == "the file is missing"
        answers = tier.save(*heads)
        tier.listener.wait(lambda: {record.id for record in heads[:3]} <= tier.listener.gone())
        assert set(answers.values()) == {""}
        assert tier.tier.stats.write_errors == 0
        assert (folder / "index.sqlite").exists()
        assert tier.load(heads[3]).problem == ""
        assert tier.tier.stats.files == len(record_files(folder)) > 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_errors_of_reading_are_misses(tmp_path: Path, number: int) -> None:
    files = FailingFiles()
    first, second = chain(2)
    with running(tmp_path, files=files) as tier:
        tier.save(first, second)
        files.failing["open"] = OSError(number, os.strerror(number))
        assert tier.load(second).problem.startswith("read error")
        assert tier.tier.stats.read_errors == 1
        files.failing.clear()
        if number == errno.EIO:
            tier.listener.wait(lambda: second.id in tier.listener.gone())
        else:
            assert tier.load(second).problem == ""
        assert tier.load(first).problem == ""


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with running(blocked / "cache") as tier:
        assert tier.opened.problem
        assert not tier.tier.stats.writing
        assert tier.load(chain(1)[0]).problem
        assert tier.save(chain(1)[0]).popitem()[1]
    assert blocked.read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_file_system(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = chain(4)
    with running(small_disk) as tier:
        tier.save(*heads[:3])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with running(small_disk, upkeep_seconds=0.05) as tier:
        assert tier.opened.problem == "the folder cannot be written to"
        assert len(tier.opened.entries) == 3
        tier.swept()
        assert tier.load(heads[2]).problem == ""
        assert tier.save(heads[3])[heads[3].id] == "the folder cannot be written to"
        assert not tier.tier.stats.writing
        assert tier.tier.stats.skipped_off == 1
        assert sum("only reads" in message for message in caplog.messages) == 1
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        tier.listener.wait(lambda: tier.tier.stats.writing)
        assert tier.save(heads[3])[heads[3].id] == ""


def test_a_read_only_file_system_without_an_index(small_disk: Path) -> None:
    heads = chain(3)
    with running(small_disk) as tier:
        tier.save(*heads)
    (small_disk / "index.sqlite").write_bytes(b"broken" * 1000)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with running(small_disk) as tier:
        tier.listener.wait(lambda: len(found(tier)) == 3)
        assert tier.load(heads[2]).problem == ""


def test_a_full_file_system(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled by our own records: the oldest make room, and it goes on by itself."""
    monkeypatch.setattr("millpond.prefix.disk.backoff.BACKOFF_SECONDS", (0.05,))
    heads = [chain(1, salt=salt, size=60_000)[0] for salt in range(30)]
    with running(small_disk, PrefixSettings(cache_ssd=1 << 40)) as tier:
        for record in heads:
            tier.save(record)
            tier.listener.wait(lambda: tier.tier.stats.writing)
        assert tier.tier.stats.evicted > 0
        assert not [path for path in record_files(small_disk) if path.suffix == ".tmp"]
        assert tier.load(next(r for r in heads if file_of(small_disk, r).exists())).problem == ""
        assert tier.tier.stats.bytes == bytes_on_disk(small_disk)


def fill(file: io.RawIOBase) -> None:
    while True:
        file.write(bytes(4096))


def test_a_disk_filled_by_others(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our records stay, writes stop, reads go on; when there is room again, so do writes."""
    monkeypatch.setattr("millpond.prefix.disk.backoff.BACKOFF_SECONDS", (0.05,))
    heads = [chain(1, salt=salt, size=60_000)[0] for salt in range(3)]
    with running(small_disk) as tier:
        tier.save(heads[0])
        tier.swept()
        big = small_disk / "others"
        with big.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            fill(file)
        assert tier.save(heads[1])[heads[1].id]
        assert tier.load(heads[0]).problem == ""
        big.unlink()
        tier.listener.wait(lambda: tier.tier.stats.writing and tier.save(heads[1])[heads[1].id] == "")
        assert tier.listener.gone() == set()


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """What a process may write is bounded: an error in the middle of a write, without root."""
    small, large, other = chain(1)[0], chain(1, salt=1, size=1 << 20)[0], chain(1, salt=2)[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with running(tmp_path, NO_LIMITS) as tier:
        tier.save(small)
        tier.swept()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, before[1]))
            assert "too large" in tier.save(large)[large.id]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert tier.tier.stats.write_errors == 1
        assert set(tier.save(other, large).values()) == {""}
        assert not [path for path in record_files(tmp_path) if path.suffix == ".tmp"]
