"""What docs/conformance.md says, as far as breaks need it."""

from __future__ import annotations

from typing import NamedTuple

from test_conformance import PROOF, TABLE, rows_of


class Named(NamedTuple):
    """A test that a row names."""

    file: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.file}::{self.name}"


def named_tests() -> dict[str, list[Named]]:
    """The tests that each row that is done names, by the row's id."""
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    return {row.id: [Named(*found) for found in PROOF.findall(row.proof)] for row in rows if row.state == "done"}
