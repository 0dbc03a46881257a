"""Breaks that the tests must see: the proof of the table of proofs, docs/conformance.md.

A row of that table is done only when the tests it names fail if its behaviour breaks. Here the behaviour is broken:
each ``Break`` replaces one text in one file. ``make test-mutants`` applies each to a copy of the tree, runs the tests
that the break's row names, and no others, and prints which test killed it, or that it survived.

    make test-mutants                              all of them, two at a time
    make test-mutants ARGS="B7 D1-copied-whole"    those of a row, or one by name
    make test-mutants ARGS="--fresh -j 1 B7"       also if nothing has changed since the last run, one at a time

To add breaks, write them into the module of their section in ``rows``, as members of its list ``BREAKS``:

    Break(
        name="B8-metrics-open",             # the row's id, a dash, words; unique
        file="millpond/http/gate.py",          # from the root of the tree; C files are built anew
        old='OPEN = ("/livez",',            # occurs exactly once in the file, or the break is stale
        new='OPEN = ("/metrics", "/livez",',
        by=("test_only_the_probes_are_open",),
    )

``by``: the tests expected to fail, by name, out of those that the row names. They run first; the row's other tests run
only if these pass, the cheap ones first, those marked slow at last. ``hangs``: seconds after which a run that does not
end counts as killed; only for breaks that make something endless. Without it such a run is an error.

A good break is what a slip would look like: small, and harmless to everything but the row's behaviour. One that keeps
the server from starting is killed by anything and proves nothing.

What was found is kept in ``.mutants.json`` until the break, the broken file or one of the test files changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """One text replaced in one file; the module's docstring says how to write one."""

    name: str
    file: str
    old: str
    new: str
    by: tuple[str, ...] = ()
    hangs: float | None = None

    @property
    def row(self) -> str:
        return self.name.partition("-")[0]

    def applied(self, text: str) -> str:
        """The file's text, broken. Raises StaleBreak."""
        found = text.count(self.old)
        if found != 1:
            raise StaleBreak(f"{self.name}: its text occurs {found} times in {self.file}, 1 wanted")
        return text.replace(self.old, self.new)


class StaleBreak(Exception):  # noqa: N818 - it names what is wrong
    """The file has changed since the break was written."""


def all_breaks() -> list[Break]:
    """Of every module of ``rows``, in the order of their names."""
    from mutants import rows

    names = sorted(module.name for module in pkgutil.iter_modules(rows.__path__))
    return [broken for name in names for broken in importlib.import_module(f"mutants.rows.{name}").BREAKS]
