"""The conformance table is complete, and every proof it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "conformance.md"
ROWS_PER_SECTION = {
    "A": 7,
    "B": 15,
    "C": 4,
    "D": 9,
    "E": 9,
    "F": 10,
    "G": 7,
    "H": 6,
    "I": 2,
    "J": 2,
    "K": 3,
    "L": 31,
    "M": 12,
    "N": 6,
    "R": 5,
}
IDS = [f"{section}{number}" for section, count in ROWS_PER_SECTION.items() for number in range(1, count + 1)]
PROOF = re.compile(r"`(tests/[\w/]+\.py)::((?:\w+::)?\w+)`")


class Row(NamedTuple):
    id: str
    behaviour: str
    state: str
    proof: str


def rows_of(text: str) -> list[Row]:
    """The rows of the one table in the text, its two heading lines left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines[2:]]


@cache
def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file, those of classes as Class::name."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = _functions(body)
    for node in body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner}" for inner in _functions(node.body)}
    return names


def _functions(body: list[ast.stmt]) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in body if isinstance(node, kinds) and node.name.startswith("test")}


def problems(rows: list[Row], root: Path) -> list[str]:
    """Everything wrong with the table, in words."""
    found = [row.id for row in rows]
    wrong = [f"{id_}: {found.count(id_)} rows, 1 wanted" for id_ in IDS if found.count(id_) != 1]
    wrong += [f"{id_}: no such row is known" for id_ in found if id_ not in IDS]
    for row in rows:
        wrong += [f"{row.id}: {problem}" for problem in _problems_of(row, root)]
    return wrong


def _problems_of(row: Row, root: Path) -> list[str]:
    if row.state not in ("open", "done"):
        return [f"state {row.state!r}; open or done wanted"]
    if row.state == "open":
        return ["open, yet it names a proof"] if row.proof else []
    named = PROOF.findall(row.proof)
    rest = PROOF.sub("", row.proof).replace(",", "").strip()
    wrong = [f"not a test: {rest!r}"] if rest else []
    if not named:
        wrong.append("done without a test")
    for path, name in named:
        if not (root / path).is_file():
            wrong.append(f"no file {path}")
        elif name not in names_in(root / path):
            wrong.append(f"no test {name} in {path}")
    return wrong


def test_the_table_is_complete_and_its_proofs_exist() -> None:
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    assert problems(rows, ROOT) == []
    assert [row.id for row in rows] == IDS


GOOD = [Row(id_, "it works", "open", "") for id_ in IDS]
HERE = "`tests/test_conformance.py::test_the_table_is_complete_and_its_proofs_exist`"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (Row("A1", "", "open", ""), ""),
        (Row("A1", "", "done", HERE), ""),
        (Row("A1", "", "done", f"{HERE}, {HERE}"), ""),
        (Row("A2", "", "open", ""), "A1: 0 rows"),
        (Row("Z1", "", "open", ""), "Z1: no such row"),
        (Row("A1", "", "half", ""), "state 'half'"),
        (Row("A1", "", "open", HERE), "open, yet"),
        (Row("A1", "", "done", ""), "done without a test"),
        (Row("A1", "", "done", "seen by eye"), "not a test: 'seen by eye'"),
        (Row("A1", "", "done", "`tests/nowhere.py::test_x`"), "no file tests/nowhere.py"),
        (Row("A1", "", "done", "`tests/test_conformance.py::test_x`"), "no test test_x"),
        (Row("A1", "", "done", "`tests/test_conformance.py::rows_of`"), "no test rows_of"),
    ],
)
def test_a_wrong_row_is_found(row: Row, complaint: str) -> None:
    wrong = problems([row, *GOOD[1:]], ROOT)
    assert bool(wrong) == bool(complaint)
    assert not complaint or any(complaint in problem for problem in wrong)
