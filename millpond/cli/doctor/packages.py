"""Whether Python and the packages installed are those that Millpond asks for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from millpond import __version__
from millpond.cli.doctor.finding import Finding, fail, ok, warn

EXTRAS = ("", "cpu", "cuda12", "cuda13")
"""Ways to install Millpond; on Linux the extra brings mlx."""
NAMED = ("mlx", "mlx-lm")
"""Packages with a line of their own."""
PIP = f"{shlex.quote(sys.executable)} -m pip install"


def findings() -> Iterator[Finding]:
    """Python, the system, mlx and mlx-lm, then all others in one line."""
    yield _python()
    yield ok("system", f"{platform.platform()}, {os.cpu_count()} cores")
    try:
        asked = _asked(importlib.metadata.requires("millpond") or ())
    except importlib.metadata.PackageNotFoundError:
        yield warn("packages", "Millpond runs from a folder and is not installed", f"{PIP} that folder")
        return
    for name in NAMED:
        yield _package(name, name, asked.get(name, SpecifierSet()))
    others = {name: versions for name, versions in asked.items() if name not in NAMED}
    checked = [_package("packages", name, versions) for name, versions in others.items()]
    wrong = [finding for finding in checked if finding.state != "ok"]
    yield from wrong or [ok("packages", f"{len(others)} others, as asked for")]


def _python() -> Finding:
    here = f"{__version__} on Python {platform.python_version()} ({sys.executable})"
    try:
        asked = SpecifierSet(importlib.metadata.metadata("millpond")["Requires-Python"] or "")
    except importlib.metadata.PackageNotFoundError:
        return ok("millpond", here)
    if platform.python_version() in asked:
        return ok("millpond", here)
    return fail("millpond", here, f"make the virtual environment anew with a Python {asked}")


def _asked(requirements: Iterable[str]) -> Mapping[str, SpecifierSet]:
    """What is needed here to serve, by package; of the extras only mlx, since any one of them will do."""
    asked: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, requirements):
        for extra in EXTRAS if requirement.name == "mlx" else ("",):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                asked[requirement.name] = requirement.specifier
    return asked


def _package(subject: str, name: str, asked: SpecifierSet) -> Finding:
    before = "" if subject == name else f"{name} "
    extra = "[cpu]" if name == "mlx" and sys.platform == "linux" else ""
    remedy = f"{PIP} {shlex.quote(f'{name}{extra}{asked}')}"
    if extra:
        remedy += ", with [cuda12] or [cuda13] for a GPU"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return fail(subject, f"{before}not installed", remedy)
    if asked.contains(version, prereleases=True):
        return ok(subject, f"{before}{version}")
    return warn(subject, f"{before}{version}, but Millpond is made for {asked}", remedy)
