"""``make coverage``: every architecture on trial, each in a process of its own, and docs/models.md written again."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from architectures import folders, found, page
from architectures.found import Report

SECONDS = 300
"""Within these an architecture has to be done."""
DEVICES = ("gpu", "cpu")
TESTS = Path(__file__).parent.parent


def tried(name: str, device: str) -> Report:
    """What is found out in a process of its own, however that ends."""
    with TemporaryDirectory() as place:
        file = Path(place) / "report.json"
        command = [sys.executable, "-m", "architectures.child", name, device, str(Path(place) / "model"), str(file)]
        try:
            paths = os.pathsep.join([str(TESTS), str(TESTS / "support")])
            environment = {**os.environ, "PYTHONPATH": paths}
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment
            )
            how = f"the process ended with {ended.returncode}" if ended.returncode else ""
            said = ended.stderr
        except subprocess.TimeoutExpired:
            how, said = f"it took more than {SECONDS} seconds", ""
        if not file.exists():
            raise SystemExit(f"coverage: {name} could not be tried: {how}\n{said}")
        report = found.REPORT_DECODER.decode(file.read_bytes())
    if report.stage != "done":
        trouble = f"{how} while it was at {report.stage!r}"
        if report.stage in ("build", "mlx-lm"):
            report.alien = f"mlx-lm's own run of it fails: {how}"
        else:
            report.refused = trouble
            print(f"{name}: {trouble}\n{said}", file=sys.stderr)
    return report


def line_of(report: Report) -> str:
    """For people who wait."""
    if report.alien:
        how = f"not tried: {report.alien}"
    elif report.refused:
        how = f"not served: {report.refused}"
    elif report.wrong:
        how = f"WRONG: {'; '.join(report.wrong)}"
    else:
        how = f"solo: {report.solo}" if report.solo else "batched"
    return f"{report.name} on a {'GPU' if report.gpu else 'CPU'}: {how}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="coverage", description="Every architecture of mlx-lm, built small and served."
    )
    parser.add_argument(
        "names", nargs="*", help="of tests/architectures/models.toml, or modules of mlx-lm; default: all"
    )
    parser.add_argument("-j", "--jobs", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument("--new", action="store_true", help="only modules of mlx-lm that the file does not have yet")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    names = options.names or folders.names()
    if options.new:
        names = folders.unknown()
        print(f"new in mlx-lm: {', '.join(names) or 'nothing'}")
    if options.page:
        names = []
    lock, wrong = threading.Lock(), 0

    def one(job: tuple[str, str]) -> None:
        nonlocal wrong
        report = tried(*job)
        with lock:
            print(line_of(report), flush=True)
            wrong += bool(report.wrong)
            if not options.new:
                everything = found.read()
                everything.put(report)
                found.write(everything)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, [(name, device) for name in names for device in DEVICES]))
    if not options.new:
        page.PAGE.write_text(page.written(found.read()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
