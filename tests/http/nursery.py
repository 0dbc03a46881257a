"""Servers by fork: one process imports what a front end needs, and every server is a copy of it.

A front end then starts in a tenth of the processor time, most of which goes into importing transformers. What runs is
what ``scripted_server.py`` or ``millpond`` run in a process of their own, with an engine that is started as ever; only
the imports are shared. ``nursery.py FD`` is the process that forks: it takes a request per message on a socket and
writes each server's process id and, at its end, exit status to the server's own pipe. Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Protocol

AVAILABLE = sys.platform == "linux"
MESSAGE_BYTES = 1 << 20
IMPORTED = (
    "scripted_server",
    "millpond.cli.main",
    "millpond.hub.source",
    "millpond.http.app",
    "millpond.http.connection",
    "millpond.http.gate",
    "millpond.http.front_end",
    "millpond.text.tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "uvicorn.lifespan.off",
    "uvicorn.protocols.http.h11_impl",
)


class Process(Protocol):
    """What the tests use of ``subprocess.Popen``."""

    pid: int
    stderr: IO[str] | None

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


# --- the tests' side ----------------------------------------------------------------------------------------------


class Forked:
    """A server that was forked, in the manner of ``subprocess.Popen``."""

    def __init__(self, arguments: list[str], status: IO[str], stderr: IO[str]) -> None:
        self.args = arguments
        self.stderr: IO[str] | None = stderr
        self.returncode: int | None = None
        self._status = status
        self.pid = int(self._line())

    def _line(self) -> str:
        line = self._status.readline()
        assert line.endswith("\n"), "the process that forks servers has died"
        return line

    def poll(self) -> int | None:
        return self._ended(0)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks, as long as it is open."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def start(self, program: str, arguments: list[str]) -> Forked:
        """``main`` of a module with these arguments, and with this process's environment of now."""
        status, their_status = os.pipe()
        stderr, their_stderr = os.pipe()
        request = {
            "program": program,
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [their_status, their_stderr])
        finally:
            os.close(their_status)
            os.close(their_stderr)
        return Forked(arguments, os.fdopen(status), os.fdopen(stderr))

    def close(self) -> None:
        """Servers that still run are killed."""
        self._socket.close()
        self._process.wait()


# --- the process that forks -----------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> tuple[bytes, int] | None:
    """Fork on request and report who ended, until the other end of the socket is closed.

    Returns twice and more often: in each server its request and its stderr, here nothing.
    """
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    reports: dict[int, tuple[int, int]] = {}
    """Descriptor of a server's process: its id, and its pipe."""
    while True:
        for key, _ in selector.select():
            if key.fd != requests.fileno():
                selector.unregister(key.fd)
                report(key.fd, *reports.pop(key.fd))
                continue
            request, passed, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
            if not request:
                for child, _ in reports.values():
                    os.kill(child, signal.SIGKILL)
                return None
            pipe, stderr = passed
            if (child := os.fork()) == 0:
                selector.close()
                requests.close()
                return request, stderr
            os.close(stderr)
            os.write(pipe, b"%d\n" % child)
            watched = os.pidfd_open(child)
            reports[watched] = (child, pipe)
            selector.register(watched, selectors.EVENT_READ)


def report(watched: int, child: int, pipe: int) -> None:
    _, status = os.waitpid(child, 0)
    os.close(watched)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(pipe, b"%d\n" % os.waitstatus_to_exitcode(status))
    os.close(pipe)


def become_server(request: bytes, stderr: int) -> int:
    """As if the interpreter had just been started for it; its end is an interpreter's end, too."""
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = json.loads(request)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    program = importlib.import_module(wanted["program"])
    sys.argv = [str(program.__file__), *wanted["arguments"]]
    return int(program.main())


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the tests and the servers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    born = serve(socket.socket(fileno=int(sys.argv[1])))
    return 0 if born is None else become_server(*born)


if __name__ == "__main__":
    sys.exit(main())
