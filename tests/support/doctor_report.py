"""Run ``millpond doctor`` as a process and read what it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120


@dataclass(frozen=True)
class Report:
    """What the command printed as JSON; states and texts by subject, of the worst finding when there are several."""

    code: int
    ok: bool
    state: Mapping[str, str]
    text: Mapping[str, str]
    remedy: Mapping[str, str]

    @property
    def failed(self) -> set[str]:
        return {subject for subject, state in self.state.items() if state == "fail"}


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
    return {**kept, "MILLPOND_PORT": "0", "MILLPOND_CACHE_SSD": "0", **more}


def doctor(*arguments: str, before: tuple[str, ...] = (), cwd: Path | None = None, **env: str) -> Report:
    command = [*before, sys.executable, "-m", "millpond.cli.main", "doctor", "--json", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment(**env), cwd=cwd
    )
    assert "Traceback" not in result.stderr
    printed = json.loads(result.stdout)
    findings = sorted(printed["findings"], key=lambda finding: ["ok", "warn", "fail"].index(finding["state"]))
    for finding in findings:
        assert (finding["state"] == "ok") == (not finding["remedy"]), finding
    by_subject = {finding["subject"]: finding for finding in findings}
    parts = [{subject: finding[key] for subject, finding in by_subject.items()} for key in ("state", "text", "remedy")]
    report = Report(result.returncode, printed["ok"], *parts)
    assert report.code == (1 if report.failed else 0)
    assert report.ok == (not report.failed)
    return report
