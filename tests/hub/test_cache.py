"""Building a model folder once: crashes, leftovers and two processes at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarn.hub.cache import build_once, cache_root
from kvarn.hub.progress import SilentProgress


def test_where_the_cache_is() -> None:
    assert cache_root({"KVARN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_root({"XDG_CACHE_HOME": "/b"}) == Path("/b/kvarn")
    assert cache_root({}) == Path.home() / ".cache" / "kvarn"


def test_built_once_then_found(cache: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("content")

    first = build_once("model", build, SilentProgress())
    assert first == build_once("model", build, SilentProgress()) == cache / "models" / "model"
    assert (first / "file").read_text() == "content"
    assert len(built) == 1


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        build_once("model", fail, SilentProgress())
    assert [path.name for path in (cache / "models").iterdir()] == [".lock-model"]


def test_leftovers_of_a_crash_are_removed(cache: Path) -> None:
    leftover = cache / "models" / ".tmp-model-dead"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("")
    build_once("model", lambda folder: None, SilentProgress())
    assert not leftover.exists()


SLOW_BUILD = """
import sys, threading
from pathlib import Path
from kvarn.hub.cache import build_once
from kvarn.hub.progress import SilentProgress

def build(folder):
    with Path(sys.argv[1]).open("a") as log:
        log.write("built\\n")
    threading.Event().wait(0.3)
    (folder / "file").write_text("whole")

print((build_once("model", build, SilentProgress()) / "file").read_text())
"""


def test_several_processes_at_once_build_it_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", SLOW_BUILD, str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(3)]
    assert [process.communicate(timeout=30)[0].strip() for process in running] == ["whole"] * 3
    assert log.read_text() == "built\n"


def test_a_killed_process_does_not_block_the_next(cache: Path, tmp_path: Path) -> None:
    endless = SLOW_BUILD.replace("wait(0.3)", "wait(60)")
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", endless, str(log)], env=os.environ)
    while not log.exists():
        assert process.poll() is None
        process_alive = process.poll() is None
        assert process_alive
    process.kill()
    process.wait(timeout=10)
    done = subprocess.run([sys.executable, "-c", SLOW_BUILD, str(log)], timeout=30, check=True, env=os.environ)
    assert done.returncode == 0
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".lock-model", "model"]
