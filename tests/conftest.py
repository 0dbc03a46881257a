"""Fixtures for all tests. The fast BLAS is put in place here, before any test imports mlx."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from millpond.hub.progress import SilentProgress
from millpond.hub.source import resolve
from millpond.model import blas
from millpond.model.open_files import limit_kept

blas.prepare()

FILES = limit_kept()
FILES.__enter__()
"""Tests import mlx-lm themselves, and what it takes from them it takes from every process that they start."""

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ["MILLPOND_CACHE_SSD"] = "0"
"""Servers that tests start keep nothing on disk unless the test says so: no test depends on an earlier run."""


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an MLX folder: the demo model, fetched the first time."""
    return resolve("demo", SilentProgress()).path


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """Gemma 3 270M (base) as an MLX folder, fetched the first time under the Gemma terms of use."""
    return resolve("gemma3-270m", SilentProgress()).path


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything that tests need was installed (MILLPOND_TEST_SKIPS=fail), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MILLPOND_TEST_SKIPS") == "fail" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.ensure_newline()
        reporter.write_line("skipped tests are failures here", red=True)
