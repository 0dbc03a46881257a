"""Clocks that jump move nothing (L): durations and deadlines go by clocks that nobody sets."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "millpond"
WALL = {"time", "time_ns", "now", "today", "utcnow"}
"""What reads the wall clock, of the modules time and datetime."""
DATES = {
    "bench/runner.py": 2,  # when a measurement was made, and texts that no earlier run has used
    "cli/doctor/tls.py": 1,  # whether a certificate has expired
    "http/openai/choices.py": 1,  # created
    "http/response_table.py": 3,  # ages of what is kept over restarts
    "http/responses/writer.py": 1,
    "http/served_model.py": 1,
    "prefix/disk/age_clock.py": 1,  # ages of files outlive every other clock
    "prefix/disk/upkeep.py": 2,
    "text/environment.py": 1,  # what templates are told of today
}
"""Where a date is meant, and how often; anywhere else a jump of the clock would end answers or keep them for ever."""


def readings(source: str) -> Iterator[str]:
    """Every place that reads the wall clock, or hands on what reads it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="time" | "datetime" | "date"), attr=name) if name in WALL:
                yield f"line {node.lineno}: {name}"
            case ast.ImportFrom(module="time", names=names):
                yield from (f"line {node.lineno}: {alias.name}" for alias in names if alias.name in WALL)


def test_only_dates_are_read_off_the_wall_clock() -> None:
    found = {
        str(path.relative_to(PACKAGE)): list(readings(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    unexpected = {name: places for name, places in found.items() if len(places) != DATES.get(name, 0)}
    assert not unexpected


def test_readings_are_found() -> None:
    source = "from time import time, monotonic\nimport time\nf = time.time\ntime.monotonic()\ndatetime.now(UTC)\n"
    assert Counter(reading.rpartition(" ")[2] for reading in readings(source)) == {"time": 2, "now": 1}
