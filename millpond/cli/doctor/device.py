"""``millpond doctor --device``: a self-test of about two minutes on the user's own device, as a table for an issue.

It starts real engines, as ``millpond serve`` would with the same flags, beside whatever server is running: nothing
binds a port, and the SSD tier is a temporary folder. Nothing that is printed names a key or a path.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from millpond import __version__
from millpond.cli.doctor import engine, machine, model, settings
from millpond.cli.doctor.finding import Finding, fail
from millpond.cli.doctor.results import ResultRow
from millpond.cli.doctor.selftest import ROWS, SelfTest
from millpond.client.start import start_message
from millpond.config import OF_THE_ENGINE, ServeConfig, read_config
from millpond.hub.errors import SourceError
from millpond.hub.progress import Progress, SilentProgress, TerminalProgress
from millpond.hub.source import ResolvedModel, resolve
from millpond.settings import SavePolicy
from millpond.types import ModelInfo, SpecMode

DEMO = "demo"
"""What is measured where no model is named, so that devices can be compared."""
HOW = (
    "Greedy, prompts of random tokens, nothing guessed ahead, no HTTP; the SSD tier (policy all) is a temporary folder."
)
REPORT = "paste this table into an issue"
FOLDER = "millpond-doctor-"


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1 when something has failed."""
    progress = SilentProgress() if args.json else TerminalProgress()
    config, found = settings.read({name: getattr(args, name) for name in ServeConfig.model_fields}, args.config)
    wrong = [finding for finding in found if finding.state == "fail"]
    about: dict[str, str] = {}
    rows: list[ResultRow] = []
    if config is not None:
        chosen = _chosen(args.model or DEMO, config, progress)
        if isinstance(chosen, Finding):
            wrong.append(chosen)
        else:
            source, probed = chosen
            rows, info = _tested(config, source, progress)
            about = _about(config, source.name, probed, info)
    wrong += [fail(row.test, row.text, REPORT) for row in rows if row.state == "failed"]
    if args.json:
        findings = [asdict(finding) for finding in wrong]
        tested = {"about": about, "rows": [asdict(row) for row in rows]}
        print(json.dumps({"millpond": __version__, "ok": not wrong, "findings": findings, "device": tested}, indent=2))
    elif rows:
        print(table(about, rows))
    else:
        print("\n".join(finding.lines for finding in wrong))
    return int(bool(wrong))


def _chosen(name: str, config: ServeConfig, progress: Progress) -> tuple[ResolvedModel, engine.Probe] | Finding:
    """The model on this machine, and what mlx computes with; or why nothing can be measured."""
    if config.tp > 1 or config.hostfile is not None:
        return fail("settings", "the self-test is of one device", "leave --tp and --hostfile out")
    try:
        source = resolve(name, progress)
    except SourceError as error:
        return fail("model", str(error), "name another one: millpond doctor --device MODEL")
    probed = engine.probe()
    return model.cannot_be_loaded(source, None, probed) or (source, probed)


def _tested(config: ServeConfig, source: ResolvedModel, progress: Progress) -> tuple[list[ResultRow], ModelInfo | None]:
    """Run the self-test. Raises KeyboardInterrupt where a signal has ended it; the folder is gone in any case."""
    with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder:
        own = of_the_test(config, Path(folder))
        test = SelfTest(own, start_message(own, str(source.path), "", source.name), progress.say)
        try:
            return asyncio.run(_until_terminated(test)), test.info
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _until_terminated(test: SelfTest) -> list[ResultRow]:
    """SIGTERM ends it as Ctrl-C does: in order."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await test.run()


def of_the_test(config: ServeConfig, folder: Path) -> ServeConfig:
    """The user's settings, but for what is measured: all rows of the curve at once, nothing guessed ahead, and an SSD
    tier in ``folder`` that is written to at once."""
    changed: dict[str, object] = {
        "max_batch": max(config.max_batch, *ROWS),
        "spec": SpecMode.OFF.value,
        "draft_model": "",
        "cache_dir": folder,
        "cache_ssd": read_config({}, {}).cache_ssd,
        "ssd_policy": SavePolicy.ALL.value,
        "ssd_daily_writes": 0,
    }
    if "log_level" not in config.model_fields_set:
        changed["log_level"] = "error"
    return config.model_copy(update=changed)


def _about(config: ServeConfig, name: str, probed: engine.Probe, info: ModelInfo | None) -> dict[str, str]:
    """What was measured, and on what."""
    computing = info.device if info is not None else probed.device
    details = (probed.name or machine.processor(), info.blas if info is not None else "")
    return {
        "millpond": __version__,
        **{package: _version(package) for package in ("mlx", "mlx-lm")},
        "python": platform.python_version(),
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "device": ", ".join(filter(None, (computing, *details))),
        "model": name,
        "settings": ", ".join(f"{key}={value}" for key, value in _given(config).items()) or "all are the defaults",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _given(config: ServeConfig) -> Mapping[str, str]:
    """Settings of the engine that are not the defaults. None of these is a path or a secret."""
    ours, defaults = of_the_test(config, Path()).of_the_engine, of_the_test(read_config({}, {}), Path()).of_the_engine
    return {name: ours[name] for name in OF_THE_ENGINE if ours[name] != defaults[name]}


def table(about: Mapping[str, str], rows: Sequence[ResultRow]) -> str:
    """Markdown that can be read as it is."""
    versions = f"Millpond {about['millpond']}, mlx {about['mlx']}, mlx-lm {about['mlx-lm']}, Python {about['python']}"
    lines = [
        *(f"{versions}, {about['system']}", ""),
        *(f"- {name}: {about[name]}" for name in ("device", "model", "settings")),
        *("", "| self-test | result |", "|---|---|"),
        *(f"| {_cell(row.test)} | {'**failed**: ' * (row.state == 'failed')}{_cell(row.text)} |" for row in rows),
        *("", HOW),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """One line, which ends no cell."""
    return " ".join(text.split()).replace("|", "\\|")
