"""Killed at any point, the tier starts again, serves only what was written, and leaves nothing lying about.

A child process writes, evicts and discards, and is killed at every single step that changes a file, in the middle of
writes, inside transactions, or from outside at any moment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ssd_support import NAMESPACE, RunningTier, chain, file_of, payload_of, record_files, running

from millpond.prefix.disk.block_file import file_bytes
from millpond.prefix.disk.events import Found
from millpond.prefix.records import RecordHead
from millpond.settings import PrefixSettings

SIZE = file_bytes(chain(1)[0], NAMESPACE)
CAP = int(4.5 * SIZE)
SUPPORT = Path(__file__).parent.parent / "support"

CHILD = """
import itertools, os, sys
from pathlib import Path
import crash_child
crash_child.work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""


def run_child(folder: Path, mode: str, at: int, cap: int = CAP) -> int:
    """The exit status of a child that is killed at step ``at``; 0 when it got through without reaching it."""
    command = [sys.executable, "-c", CHILD, str(folder), mode, str(at), str(cap)]
    return subprocess.run(command, cwd=SUPPORT, timeout=60).returncode


def known(salts: int = 40) -> dict[bytes, RecordHead]:
    return {record.key: record for salt in range(salts) for record in chain(3, salt=salt)}


def check(folder: Path, records: dict[bytes, RecordHead]) -> int:
    """Reopen after a crash: everything offered is served as it was written, and the folder is in order."""
    with running(folder, PrefixSettings(cache_ssd=CAP)) as tier:
        tier.swept()
        offered = {entry.id for entry in tier.opened.entries}
        offered |= {entry.id for found in tier.listener.of(Found) for entry in found.entries}
        offered -= tier.listener.gone()
        for record in offered:
            assert tier.load(records[record.key]).problem == ""
        assert {file_of(folder, records[record.key]) for record in offered} == set(record_files(folder))
        stats = tier.tier.stats
        assert (stats.files, stats.bytes) == (len(offered), sum(p.stat().st_size for p in record_files(folder)))
        assert stats.bytes <= CAP
        assert not stats.damaged
        works(tier)
    return len(offered)


def works(tier: RunningTier) -> None:
    fresh = chain(2, salt=99)
    assert set(tier.save(*fresh).values()) == {""}
    assert tier.load(fresh[1]).problem == ""
    tier.tier.discard([fresh[0].id])
    tier.listener.wait(lambda: fresh[1].id in tier.listener.gone())


@pytest.mark.parametrize("mode", ["best-effort", pytest.param("durable", marks=pytest.mark.slow)])
def test_killed_at_every_file_step(tmp_path: Path, mode: str) -> None:
    """All steps of writing, evicting and discarding; the children run one after the other in a process that forks."""
    command = [sys.executable, "-c", CHILD, str(tmp_path), f"every-{mode}", "0", str(CAP)]
    with subprocess.Popen(command, cwd=SUPPORT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as forker:
        assert forker.stdout is not None
        assert forker.stdin is not None
        rounds = 0
        kept = 0
        for line in forker.stdout:
            outcome, folder = line.split()
            kept += check(Path(folder), known())
            rounds += 1
            if outcome == "through":
                break
            forker.stdin.write("next\n")
            forker.stdin.flush()
    assert forker.returncode == 0
    assert rounds > 40
    assert kept > rounds


@pytest.mark.parametrize("mode", ["rows", "evictions"])
def test_killed_inside_a_transaction(tmp_path: Path, mode: str) -> None:
    for at in range(3):
        assert run_child(tmp_path, mode, at) == -signal.SIGKILL
        check(tmp_path, known())


def kill_at_random(folder: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        command = [sys.executable, "-c", CHILD, str(folder), "endless", "0", str(CAP)]
        with subprocess.Popen(command, cwd=SUPPORT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            os.kill(child.pid, signal.SIGKILL)
        check(folder, known())


def test_killed_from_outside_at_any_time(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 12, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_from_outside_hundreds_of_times(tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path, 30, seed=100 + seed)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (record,) = chain(1)
    with running(tmp_path) as tier:
        tier.save(record)
    path = file_of(tmp_path, record)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout
    ages = {int(dead): 0, os.getppid(): 0, 1: 0, os.getpid(): 0}
    temporary = {pid: path.with_name(f"{path.name}.{pid}.1.tmp") for pid in ages}
    old = path.with_name(f"{path.name}.{os.getppid()}.2.tmp")
    own_old = path.with_name(f"{path.name}.{os.getpid()}.2.tmp")
    stranger = path.with_name("notes.tmp")
    for file in (*temporary.values(), old, own_old, stranger):
        file.write_bytes(payload_of(record))
    now = time.time()
    os.utime(old, (now - 4000, now - 4000))
    os.utime(own_old, (now - 10, now - 10))
    # As if written by another tier of this very process, after this one began.
    os.utime(temporary[os.getpid()], (now + 60, now + 60))
    with running(tmp_path) as tier:
        tier.swept()
        left = set(record_files(tmp_path))
        assert left == {path, temporary[os.getppid()], temporary[1], temporary[os.getpid()], stranger}
        assert tier.tier.stats.leftovers_removed == 3
