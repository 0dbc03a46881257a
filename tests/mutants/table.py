"""What docs/conformance.md says, as far as breaks need it.

A row that names ``test_the_proof_exists`` names with it the tests that tests/cli/test_every_setting.py lists for each
setting.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

from test_conformance import PROOF, ROOT, TABLE, rows_of


class Named(NamedTuple):
    """A test that a row names."""

    file: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.file}::{self.name}"


SETTINGS = Named("tests/cli/test_every_setting.py", "test_the_proof_exists")


def named_tests() -> dict[str, list[Named]]:
    """The tests that each row that is done names, by the row's id."""
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    named = {row.id: [Named(*found) for found in PROOF.findall(row.proof)] for row in rows if row.state == "done"}
    for tests in named.values():
        if SETTINGS in tests:
            tests += [test for test in _proofs_of_settings() if test not in tests]
    return named


def _proofs_of_settings() -> list[Named]:
    """Read, not imported: a test's module may import what it likes."""
    for node in ast.parse((ROOT / SETTINGS.file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "PROOFS":
            assert node.value is not None
            proofs: dict[str, tuple[str, ...]] = ast.literal_eval(node.value)
            found = dict.fromkeys(proof for each in proofs.values() for proof in each)
            return [Named(f"tests/{file}", name) for file, _, name in (proof.partition("::") for proof in found)]
    raise LookupError(f"{SETTINGS.file} has no PROOFS")
