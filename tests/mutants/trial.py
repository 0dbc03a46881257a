"""One break on trial: its row's tests, run in a broken copy."""

from __future__ import annotations

import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mutants import Break, StaleBreak
from mutants.copies import Copy, copy_of
from mutants.table import Named

QUICK_SECONDS = 300.0
SLOW_SECONDS = 900.0
BUILD_SECONDS = 300.0
NOTHING_COLLECTED = 5
FAILED = 1


class Verdict(StrEnum):
    KILLED = "killed"
    SURVIVED = "SURVIVED"
    ERROR = "ERROR"


@dataclass
class Result:
    """``by``: the id of the test that failed. ``seconds``: of wall time. ``why``: what it said, or what went wrong."""

    verdict: Verdict
    by: str = ""
    seconds: float = 0.0
    why: str = ""


@dataclass
class Outcome:
    """Of one run of pytest: the first test that failed, what it said, and the seconds that each test took."""

    failed: str = ""
    said: str = ""
    ended: bool = True
    wrong: str = ""
    took: dict[str, float] | None = None


class Trials:
    """``tree``: what is copied. ``seconds_of``: how long a test is known to take. ``unbroken``: whether a test passes
    without any break, asked only about tests that failed."""

    def __init__(
        self, tree: Path, named: dict[str, list[Named]], seconds_of: dict[str, float], unbroken: Callable[[str], bool]
    ) -> None:
        self._tree = tree
        self._named = named
        self._seconds_of = seconds_of
        self._unbroken = unbroken

    def of(self, broken: Break) -> Result:
        start = time.monotonic()
        try:
            result = self._tried(broken)
        except StaleBreak as error:
            result = Result(Verdict.ERROR, why=f"stale: {error}")
        result.seconds = round(time.monotonic() - start, 1)
        return result

    def _tried(self, broken: Break) -> Result:
        tests = self._named.get(broken.row)
        if not tests:
            return Result(Verdict.ERROR, why=f"{broken.row} names no tests")
        with copy_of(self._tree) as copy:
            _apply(broken, copy)
            if Path(broken.file).suffix in (".c", ".h"):
                shutil.rmtree(copy.tree / "build", ignore_errors=True)
                built = copy.run(["setup.py", "-q", "build_ext", "--inplace", "--force"], BUILD_SECONDS)
                if built.status != 0 or "error:" in built.output:
                    return Result(Verdict.ERROR, why=f"the C part was not built: {built.output[-300:]}")
            for stage, marked, seconds in self._stages(broken, tests):
                outcome = run_tests(copy, stage, marked, broken.hangs or seconds)
                self._seconds_of.update(outcome.took or {})
                if outcome.wrong:
                    return Result(Verdict.ERROR, why=outcome.wrong)
                if not outcome.ended:
                    if broken.hangs:
                        return Result(Verdict.KILLED, by=f"no end within {broken.hangs:g} s")
                    return Result(Verdict.ERROR, why=f"no end within {seconds:g} s: {outcome.said}")
                if outcome.failed and not self._unbroken(outcome.failed):
                    return Result(Verdict.ERROR, why=f"{outcome.failed} fails without the break, too")
                if outcome.failed:
                    return Result(Verdict.KILLED, outcome.failed, why=outcome.said)
        return Result(Verdict.SURVIVED)

    def _stages(self, broken: Break, tests: list[Named]) -> list[tuple[list[str], str, float]]:
        """What to run one after the other: ids of tests, which marks to run, seconds at most."""
        first = [test.id for test in tests if test.name in broken.by]
        rest = sorted((test.id for test in tests if test.name not in broken.by), key=self._cost)
        stages = [(first, "slow or not slow", SLOW_SECONDS)] if first else []
        if rest:
            stages += [(rest, "not slow", QUICK_SECONDS), (rest, "slow", SLOW_SECONDS)]
        return stages

    def _cost(self, test: str) -> float:
        known = [seconds for name, seconds in self._seconds_of.items() if name.partition("[")[0] == test]
        # Without experience: what starts servers, ranks or real models is dear.
        dear = test.split("/")[1] in ("http", "parallel", "model", "deploy")
        return sum(known) if known else 10.0 if dear else 3.0


def run_tests(copy: Copy, tests: Sequence[str], marked: str, seconds: float) -> Outcome:
    """Run tests in the order given until one fails."""
    report = copy.folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    options += [f"--basetemp={copy.folder / 't'}", "-m", marked]
    ran = copy.run(["-m", "pytest", *options, *tests], seconds)
    if ran.status is None or not report.exists():
        return Outcome(
            ended=ran.status is not None, said=ran.output[-300:], wrong="" if ran.status is None else ran.output[-500:]
        )
    outcome = _read(report)
    if ran.status not in (0, FAILED, NOTHING_COLLECTED):
        outcome.wrong = f"pytest ended with {ran.status}: {ran.output[-500:]}"
    elif ran.status == FAILED and not outcome.failed:
        outcome.wrong = f"nothing failed, yet pytest ended with 1: {ran.output[-500:]}"
    return outcome


def _apply(broken: Break, copy: Copy) -> None:
    file = copy.tree / broken.file
    text = broken.applied(file.read_text(encoding="utf-8"))
    if file.suffix == ".py":
        compile(text, broken.file, "exec")
    file.write_text(text, encoding="utf-8")


def _read(report: Path) -> Outcome:
    outcome = Outcome(took={})
    for case in ET.parse(report).getroot().iter("testcase"):
        name = _id_of(case)
        assert outcome.took is not None
        outcome.took[name] = outcome.took.get(name, 0.0) + float(case.get("time", "0"))
        for kind in ("failure", "error"):
            wrong = case.find(kind)
            if wrong is not None and not outcome.failed:
                outcome.failed = name
                outcome.said = (wrong.get("message") or "")[:300]
    return outcome


def _id_of(case: ET.Element) -> str:
    """As pytest takes it on its command line."""
    file = case.get("file", "")
    module = file.removesuffix(".py").replace("/", ".")
    inner = (case.get("classname") or "").removeprefix(module).strip(".")
    return "::".join(filter(None, (file, inner, case.get("name"))))
