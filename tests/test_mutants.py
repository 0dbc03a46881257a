"""Every row of docs/conformance.md has a break in tests/mutants, and every break still fits the tree."""

from __future__ import annotations

from collections import Counter

import pytest
from mutants import Break, StaleBreak, all_breaks
from mutants.table import named_tests
from test_conformance import ROOT

BREAKS = all_breaks()
NAMED = named_tests()
WITHOUT: frozenset[str] = frozenset()
"""Rows whose break is still to be written. May only shrink."""


def test_every_row_has_a_break() -> None:
    rows = {broken.row for broken in BREAKS}
    assert rows - set(NAMED) == set(), "breaks of rows that are not done"
    assert set(NAMED) - rows == WITHOUT


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(broken.name for broken in BREAKS).items() if count > 1] == []


@pytest.mark.parametrize("broken", BREAKS, ids=[broken.name for broken in BREAKS])
def test_a_break_fits_the_tree(broken: Break) -> None:
    """Its text occurs exactly once, leaves a program behind, and its row names the tests that it expects to fail."""
    text = (ROOT / broken.file).read_text(encoding="utf-8")
    changed = broken.applied(text)
    assert changed != text
    if broken.file.endswith(".py"):
        compile(changed, broken.file, "exec")
    assert set(broken.by) <= {test.name for test in NAMED[broken.row]}


@pytest.mark.parametrize(("text", "count"), [("a = 2", 0), ("a = 1; a = 1", 2)])
def test_a_stale_break_is_found(text: str, count: int) -> None:
    with pytest.raises(StaleBreak, match=f"occurs {count} times"):
        Break(name="A1-example", file="example.py", old="a = 1", new="a = 2").applied(text)
