"""Copies of the tree with an interpreter of their own, so that a copy's code is what runs, in every child process too.

A copy's interpreter finds the copy before anything else, whether or not PYTHONPATH reaches a child, and the packages of
the interpreter that runs this.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", ".mutants*", "results"
)
MARK = "MUTANT_RUN"
"""The variable by which the processes of one run are known, those in sessions of their own as well."""
LIMITED = (
    "import os, resource, sys; seconds = int(sys.argv[1]);"
    "resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5)); os.execvp(sys.argv[2], sys.argv[2:])"
)


class Ran(NamedTuple):
    """How a command ended: its status, None when it had to be killed, and what it wrote."""

    status: int | None
    output: str


class Copy:
    """A copy of the tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"

    def run(self, arguments: Sequence[str], seconds: float) -> Ran:
        """Run the copy's interpreter with ``arguments`` in the copy, for at most so many seconds of wall time, and as
        many of CPU time in each process. Nothing that it started is left afterwards."""
        mark = uuid.uuid4().hex
        python = self.tree / ".venv" / "bin" / "python"
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PATH": path, MARK: mark}
        environment["VIRTUAL_ENV"] = str(python.parent.parent)
        command = [str(python), "-c", LIMITED, str(int(seconds)), str(python), *arguments]
        log = self.folder / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status: int | None = None
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _kill_marked(mark)
        exceeded = status == -signal.SIGXCPU
        return Ran(None if exceeded else status, log.read_text(encoding="utf-8", errors="replace"))


@contextmanager
def snapshot() -> Iterator[Path]:
    """The tree as it is now: what is edited later disturbs no run."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        shutil.copytree(ROOT, Path(folder) / "tree", ignore=LEFT_OUT)
        yield Path(folder) / "tree"


@contextmanager
def copy_of(tree: Path) -> Iterator[Copy]:
    """A fresh copy, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy = Copy(Path(folder))
        shutil.copytree(tree, copy.tree)
        _give_interpreter(copy.tree)
        yield copy


def _give_interpreter(tree: Path) -> None:
    """A virtual environment with the tree and the packages, and the commands, of this interpreter."""
    home = tree / ".venv"
    venv.EnvBuilder(symlinks=True).create(home)
    python = home / "bin" / "python"
    [site] = (home / "lib").glob("python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "mutant.pth").write_text("\n".join([str(tree), *packages]) + "\n", encoding="utf-8")
    for command in Path(sys.executable).parent.iterdir():
        if (python.parent / command.name).exists() or not command.is_file():
            continue
        content = command.read_bytes()
        if content.startswith(b"#!"):
            _, _, rest = content.partition(b"\n")
            (python.parent / command.name).write_bytes(b"#!" + str(python).encode() + b"\n" + rest)
            (python.parent / command.name).chmod(0o755)
        else:
            (python.parent / command.name).symlink_to(command)


def _kill_marked(mark: str) -> None:
    """End what a run left behind in sessions of its own (Linux; elsewhere such processes end with their parents)."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
