"""``make test-mutants``: every break on trial; exit 1 if one survives, is stale or could not be tried."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import Break, all_breaks
from mutants.copies import ROOT, copy_of, snapshot
from mutants.report import Report
from mutants.table import named_tests
from mutants.trial import QUICK_SECONDS, Result, Trials, Verdict, run_tests


class Unbroken:
    """Which tests pass without any break: a test that fails here for another reason must not count as a kill."""

    def __init__(self, tree: Path, report: Report) -> None:
        self._tree = tree
        self._report = report
        self._lock = threading.Lock()

    def passes(self, test: str) -> bool:
        with self._lock:  # two breaks killed by one test ask once
            if self._report.passes_unbroken(test):
                return True
            with copy_of(self._tree) as copy:
                outcome = run_tests(copy, [test], "slow or not slow", QUICK_SECONDS)
            if not outcome.ended or outcome.wrong or outcome.failed:
                return False
            self._report.keep_unbroken(test)
            return True


def chosen(breaks: list[Break], words: Sequence[str]) -> list[Break]:
    """Those of the rows and names given. Raises SystemExit for a word that chooses nothing."""
    for word in words:
        if not any(word in (broken.row, broken.name) for broken in breaks):
            raise SystemExit(f"test-mutants: {word} is neither a row with breaks nor a break")
    return [broken for broken in breaks if not words or broken.row in words or broken.name in words]


def line_of(broken: Break, result: Result) -> str:
    said = result.by if result.verdict is Verdict.KILLED else " ".join(result.why.split())
    return f"{result.verdict.value:9} {broken.name:40} {result.seconds:6.1f} s  {said}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="test-mutants", description="Breaks that the tests must see.")
    parser.add_argument("rows", nargs="*", help="rows (B7) or breaks (B7-kept-whole); all unless given")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="copies at a time (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="try also what has not changed since it was tried")
    parser.add_argument("--list", action="store_true", help="only list them")
    options = parser.parse_args(arguments)
    breaks = chosen(all_breaks(), options.rows)
    if options.list:
        print("\n".join(f"{broken.name:40} {broken.file}" for broken in breaks))
        return 0
    started = time.monotonic()
    named = named_tests()
    results: dict[str, Result] = {}
    with snapshot() as tree, ThreadPoolExecutor(options.jobs) as pool:
        report = Report(ROOT, tree)
        trials = Trials(tree, named, report.seconds_of, Unbroken(tree, report).passes)

        def tried(broken: Break) -> None:
            tests = named.get(broken.row, [])
            result = None if options.fresh else report.known(broken, tests)
            if result is None:
                result = trials.of(broken)
                if result.verdict is not Verdict.ERROR:
                    report.keep(broken, tests, result)
                print(line_of(broken, result), flush=True)
            results[broken.name] = result

        for done in [pool.submit(tried, broken) for broken in breaks]:
            done.result()
    print(f"\n{'verdict':9} {'break':40} {'took':>8}  by")
    for broken in breaks:
        print(line_of(broken, results[broken.name]))
    counts = {verdict: sum(result.verdict is verdict for result in results.values()) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict.value.lower()}" for verdict, count in counts.items())
    print(f"\n{told}; {time.monotonic() - started:.0f} s")
    return 0 if counts[Verdict.KILLED] == len(breaks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
