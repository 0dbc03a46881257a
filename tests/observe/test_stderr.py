"""(K3) A standard error that nobody reads holds nobody up; what was dropped is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading

import pytest

from millpond.child import python
from millpond.observe.stderr import PatientStderr

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def until(reading: int, end: str) -> str:
    said = b""
    while not said.decode().endswith(end):
        said += os.read(reading, 65536)
    return said.decode()


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    outlet = PatientStderr(pipe[1], str)
    for number in range(1000):
        print(number, file=outlet, flush=True)
    assert until(pipe[0], "999\n").split() == [str(number) for number in range(1000)]
    outlet.drain(60)


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    """Writing goes on, memory does not grow, and once somebody reads, the count comes behind what was kept."""
    full = 0
    os.set_blocking(pipe[1], False)
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe[1], LINE.encode()):
            full += 1
    os.set_blocking(pipe[1], True)
    outlet = PatientStderr(pipe[1], lambda count: f"{count} dropped\n", 10_000)
    for _ in range(10_000):
        outlet.write(LINE)
    assert outlet._bytes <= 10_000
    outlet.drain(0.05)
    assert outlet._bytes
    told = kept = -full
    while told != 10_000:
        for line in until(pipe[0], "\n").splitlines():
            kept += line == LINE.strip()
            told += int(line.removesuffix(" dropped")) if line.endswith(" dropped") else 1
    assert kept < 10_000
    outlet.write("again\n")
    assert until(pipe[0], "\n") == "again\n"


def test_the_reader_is_gone(pipe: tuple[int, int]) -> None:
    outlet = PatientStderr(pipe[1], str, 10_000)
    os.close(pipe[0])
    for _ in range(1000):
        outlet.write(LINE)
        outlet.drain(60)
    assert not outlet._bytes


def test_an_end_that_does_not_block(pipe: tuple[int, int]) -> None:
    """Somebody made it so: lines wait all the same."""
    os.set_blocking(pipe[1], False)
    outlet = PatientStderr(pipe[1], str)
    for _ in range(2000):
        outlet.write(LINE)
    threading.Thread(target=outlet.write, args=("end\n",)).start()
    assert until(pipe[0], "end\n").count("\n") == 2001


PROGRAM = """
import logging, sys
from millpond.observe.log import configure, fields
configure("info", sys.argv[1])
log = logging.getLogger("millpond.test")
for number in range(int(sys.argv[2])):
    log.info("line", extra=fields(number=number, path="\\x01" * 15000))
print("last", file=sys.stderr)
raise SystemExit(3)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_process_ends_whoever_reads(form: str) -> None:
    """And everything that is written before its end is read by those who do; a field takes a few hundred characters."""
    process = subprocess.Popen(python("-c", PROGRAM, form, "5000"), stderr=subprocess.PIPE)
    assert process.wait(60) == 3
    process = subprocess.Popen(python("-c", PROGRAM, form, "20"), stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    lines = said.splitlines()
    assert (len(lines), lines[-1]) == (21, "last")
    assert all(
        400 <= line.count("u0001") <= 500 and "(14600 more)" in line.replace("\\u2026", "") for line in lines[:-1]
    )
