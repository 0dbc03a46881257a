"""``kvarn doctor``: what this machine offers and what is missing, in one screen.

mlx is looked at in a short process of its own, because this one must not import it and because a broken installation
may take the process down.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvarn import __version__, wire
from kvarn.client import EngineClient, EngineUnavailable
from kvarn.hub.cache import cache_root
from kvarn.hub.errors import SourceError
from kvarn.hub.progress import TerminalProgress
from kvarn.hub.source import resolve
from kvarn.types import ModelInfo

PROBE = """
import json
from kvarn.model import blas
library = blas.prepare()
import mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
print(json.dumps({"blas": library, "device": str(mx.default_device())}))
"""
PROBE_SECONDS = 120
"""The first run may build and measure."""
LEAST_FREE_BYTES = 2 * 2**30
COMPILERS = ("c++", "clang++", "g++")


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ok, warn or fail; a fail means that nothing can be served."""

    state: str
    subject: str
    text: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("doctor", help="look at this machine and the installation", description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="load this model too, and say how it would be served")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns 1 when one of them prevents serving."""
    failed = False
    for finding in itertools.chain(findings(), _model(args.model) if args.model else ()):
        print(f"{finding.state:4}  {finding.subject:9} {finding.text}", flush=True)
        failed = failed or finding.state == "fail"
    return int(failed)


def findings() -> Iterator[Finding]:
    """Everything worth knowing, in the order of printing."""
    yield Finding("ok", "kvarn", f"{__version__} on Python {platform.python_version()} ({sys.executable})")
    yield Finding("ok", "system", f"{platform.platform()}, {os.cpu_count()} cores")
    for package in ("mlx", "mlx-lm"):
        yield _version(package)
    yield from _mlx()
    yield _compiler()
    yield _memory()
    yield _cache()


def _model(name: str) -> Iterator[Finding]:
    try:
        source = resolve(name, TerminalProgress())
        info = asyncio.run(_loaded(wire.Start(model_path=str(source.path), max_rows=1, max_itl_ms=400)))
    except (SourceError, EngineUnavailable) as error:
        yield Finding("fail", "model", str(error))
        return
    yield Finding("ok", "model", f"{source.name}: {info.dtype}, context {info.context_length}")
    if info.lane == "slots":
        yield Finding("ok", "batching", "requests share one forward")
    else:
        yield Finding("warn", "batching", f"one request at a time in turn: {info.lane_reason}")
    if info.prefix_cache:
        yield Finding("ok", "prefixes", f"cached and restored: {info.prefix_cache}, in RAM and on SSD")
    else:
        yield Finding("warn", "prefixes", f"not cached: {info.prefix_cache_reason}")


async def _loaded(start: wire.Start) -> ModelInfo:
    """What an engine finds out about the model. Raises EngineUnavailable."""
    client = EngineClient(start, environment={"KVARN_LOG_LEVEL": "error"})
    await client.start()
    try:
        await client.settled()
        assert client.info is not None
        return client.info
    finally:
        await client.stop()


def _version(package: str) -> Finding:
    try:
        return Finding("ok", package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding("fail", package, "not installed")


def _mlx() -> Iterator[Finding]:
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("fail", "device", f"mlx did not finish a small product within {PROBE_SECONDS} s")
        return
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        yield Finding("fail", "device", f"mlx does not work: {lines[-1]}")
        return
    found: dict[str, str] = json.loads(result.stdout.strip().splitlines()[-1])
    yield Finding("ok", "device", found["device"])
    if found["blas"]:
        yield Finding("warn" if "slow" in found["blas"] else "ok", "BLAS", found["blas"])


def _compiler() -> Finding:
    for name in COMPILERS:
        if path := shutil.which(name):
            return Finding("ok", "compiler", path)
    return Finding("warn", "compiler", f"none of {', '.join(COMPILERS)}: mx.compile does not work on CPUs without one")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available_memory()
    if free is None:
        return Finding("ok", "memory", f"{_gib(total)} in all")
    state = "ok" if free >= LEAST_FREE_BYTES else "warn"
    return Finding(state, "memory", f"{_gib(free)} free of {_gib(total)}")


def _available_memory() -> int | None:
    """Bytes that can be used without swapping; None where the system does not tell (anything but Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cache() -> Finding:
    root = cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    note = "" if writable else ", not writable"
    state = "ok" if writable and free >= LEAST_FREE_BYTES else "warn"
    return Finding(state, "cache", f"{root} ({_gib(free)} free on its disk{note})")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
