"""Fixtures for all tests. The fast BLAS is put in place here, before any test imports mlx."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    """MLX's own generator begins with the time of day."""
    if mlx := sys.modules.get("mlx.core"):
        mlx.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_at_work() -> Iterator[None]:
    """A thread that a test leaves behind may wait; one that works takes processor time from all tests that follow."""
    yield
    ends = time.monotonic() + 5
    while busy := threads_at_work():
        assert time.monotonic() < ends, f"still at work after the last test: {busy}"


def threads_at_work() -> list[str]:
    """Names of threads beside the main one that take most of a processor. Linux only; nothing elsewhere."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if not others or sys.platform != "linux":
        return []
    before = {thread: ticks(thread) for thread in others}
    time.sleep(0.1)
    return [thread.name for thread in others if ticks(thread) - before[thread] > 5]


def ticks(thread: threading.Thread) -> int:
    """Processor time so far, in hundredths of a second."""
    try:
        stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:  # it is over
        return 0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an MLX folder: the demo model, fetched the first time."""
    return resolve("demo", SilentProgress()).path


@pytest.fixture(scope="module", params=["thin", pytest.param("demo", marks=pytest.mark.slow)])
def demo_or_thin(
    request: pytest.FixtureRequest, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The demo model, and every time a model like it that answers ten times as fast."""
    if request.param == "demo":
        return smollm2_folder
    import tiny_models

    return tiny_models.thin(smollm2_folder, tmp_path_factory.mktemp("thin") / "model")


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """Gemma 3 270M (base) as an MLX folder, fetched the first time under the Gemma terms of use."""
    return resolve("gemma3-270m", SilentProgress()).path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that do not run often are slow ones. Files with slow tests go first: at the end each would keep one
    process busy, and the others waiting.
    """
    often = [(item, marker) for item in items if (marker := item.get_closest_marker("often"))]
    wanted = {id(item) for item, marker in often if any(word in item.name for word in marker.args)}
    whole = {name_of(item) for item, _ in often} if not any("::" in argument for argument in config.args) else set()
    for item, _ in often:
        if id(item) not in wanted:
            item.add_marker("slow")
    if never := whole - {name_of(item) for item, _ in often if id(item) in wanted}:
        raise pytest.UsageError(f"no case of these runs often: {sorted(never)}")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def name_of(item: pytest.Item) -> str:
    """Of a test, its cases apart."""
    return item.nodeid.partition("[")[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything that tests need was installed (MILLPOND_TEST_SKIPS=fail), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MILLPOND_TEST_SKIPS") == "fail" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.ensure_newline()
        reporter.write_line("skipped tests are failures here", red=True)
