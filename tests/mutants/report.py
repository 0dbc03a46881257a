"""What earlier runs found out, in ``.mutants.json``: verdicts, which tests pass unbroken, how long tests take.

A verdict holds until the break, the broken file or a file of the row's tests changes; that a test passes unbroken,
until its own file changes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mutants import Break
from mutants.table import Named
from mutants.trial import Result, Verdict

FILE = ".mutants.json"


class Report:
    """Threads share it. ``root``: where the file is; ``tree``: what is hashed."""

    def __init__(self, root: Path, tree: Path) -> None:
        self._path = root / FILE
        self._tree = tree
        self._lock = threading.Lock()
        self._results: dict[str, dict[str, str | float]] = {}
        self._unbroken: dict[str, str] = {}
        self.seconds_of: dict[str, float] = {}
        if self._path.exists():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._results, self._unbroken = kept["results"], kept["unbroken"]
            self.seconds_of = kept["seconds"]

    def known(self, broken: Break, tests: Iterable[Named]) -> Result | None:
        """The verdict, if it still holds."""
        kept = self._results.get(broken.name)
        if kept is None or kept["key"] != self._key(broken, tests):
            return None
        return Result(Verdict(str(kept["verdict"])), str(kept["by"]), float(kept["seconds"]), str(kept["why"]))

    def keep(self, broken: Break, tests: Iterable[Named], result: Result) -> None:
        with self._lock:
            self._results[broken.name] = {"key": self._key(broken, tests), **asdict(result)}
            self._write()

    def passes_unbroken(self, test: str) -> bool:
        return self._unbroken.get(test) == self._digest([test.partition("::")[0]])

    def keep_unbroken(self, test: str) -> None:
        with self._lock:
            self._unbroken[test] = self._digest([test.partition("::")[0]])
            self._write()

    def _key(self, broken: Break, tests: Iterable[Named]) -> str:
        files = sorted({test.file for test in tests} | {broken.file})
        named = sorted(test.id for test in tests)
        return self._digest(files, repr((broken.old, broken.new, broken.by, broken.hangs, named)))

    def _digest(self, files: Iterable[str], more: str = "") -> str:
        digest = hashlib.sha256(more.encode())
        for file in files:
            path = self._tree / file
            digest.update(b"\0" + file.encode() + b"\0" + (path.read_bytes() if path.exists() else b""))
        return digest.hexdigest()[:32]

    def _write(self) -> None:
        kept = {"results": self._results, "unbroken": self._unbroken, "seconds": dict(self.seconds_of)}
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")
        fresh.replace(self._path)
