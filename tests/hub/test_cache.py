"""The cache folder: where it is, what happens where it cannot be used, and building a model folder once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from millpond.hub.cache import NoCache, build_once, cache_root, keep, prefix_folder, problem, recalled
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress
from millpond.hub.source import resolve


def test_where_the_cache_is() -> None:
    assert cache_root({"MILLPOND_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_root({"XDG_CACHE_HOME": "/b"}) == Path("/b/millpond")
    assert cache_root({}) == Path.home() / ".cache" / "millpond"


def no_home(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    """An account that the system does not know, without HOME."""
    for name in ("HOME", "MILLPOND_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    return "no home folder"


def somebody_unknown(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setenv("MILLPOND_CACHE", "~nobody-of-this-name/cache")
    return "nobody-of-this-name"


def no_text(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("MILLPOND_CACHE", str(folder) + os.fsdecode(b"/caf\xe9"))
    return "UTF-8"


def a_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "file").touch()
    monkeypatch.setenv("MILLPOND_CACHE", str(folder / "file"))
    return "Not a directory"


def below_a_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "file").touch()
    monkeypatch.setenv("MILLPOND_CACHE", str(folder / "file" / "a" / "b"))
    return "Not a directory"


def a_system_folder(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setenv("MILLPOND_CACHE", "/proc/nowhere/cache" if sys.platform == "linux" else "/dev/nowhere")
    return "nowhere"


def a_link_to_itself(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    monkeypatch.setenv("MILLPOND_CACHE", str(folder / "loop"))
    return "Not a directory"


def a_full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("MILLPOND_CACHE", str(folder))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkstemp", "mkdtemp", "TemporaryFile"):
        monkeypatch.setattr(f"tempfile.{name}", full)
    return "No space left"


UNUSABLE = (no_home, somebody_unknown, no_text, a_file, below_a_file, a_system_folder, a_link_to_itself, a_full_disk)


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_a_cache_that_cannot_be_used_costs_time_only(
    unusable: Callable[[pytest.MonkeyPatch, Path], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = unusable(monkeypatch, tmp_path)
    keep("probes/finding.json", b"found")
    assert recalled("probes/finding.json") is None
    assert "MILLPOND_CACHE=FOLDER" in problem()
    with pytest.raises(SourceError) as refused:
        build_once("model", lambda folder: None, SilentProgress())
    assert said in str(refused.value)
    assert "MILLPOND_CACHE=FOLDER" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_without_a_home_there_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_home(monkeypatch, tmp_path)
    with pytest.raises(NoCache, match="MILLPOND_CACHE=FOLDER"):
        prefix_folder()
    for name in ("~", "~/model", "~/model.gguf", "~nobody-of-this-name/model"):
        with pytest.raises(SourceError, match=r"home|no such user"):
            resolve(name, SilentProgress())


def test_the_disk_gets_full_in_the_middle_of_a_conversion(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SourceError, match=r"No space left on device; MILLPOND_CACHE=FOLDER") as refused:
        build_once("model", build, SilentProgress())
    assert str(cache) in str(refused.value)
    assert [path.name for path in (cache / "models").iterdir()] == [".lock-model"]


def test_what_is_made_is_private_and_whole(cache: Path) -> None:
    keep("probes/finding.json", b"found")
    build_once("model", lambda folder: None, SilentProgress())
    assert recalled("probes/finding.json") == b"found"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (cache, *cache.rglob("*"))}
    assert modes == {
        cache.name: 0o700,
        "probes": 0o700,
        "finding.json": 0o600,
        "models": 0o700,
        "model": 0o700,
        ".lock-model": 0o600,
    }


def test_planted_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (cache / "models").mkdir(parents=True)
    (cache / "models" / ".lock-model").symlink_to(precious)
    (cache / "finding.json").symlink_to(precious)
    with pytest.raises(SourceError, match="symbolic links"):
        build_once("model", lambda folder: None, SilentProgress())
    keep("finding.json", b"found")
    assert precious.read_text() == "precious"
    assert not (cache / "finding.json").is_symlink()


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
from millpond.hub.cache import build_once
from millpond.hub.progress import SilentProgress

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
