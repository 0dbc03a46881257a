"""Starting one server at a time, waiting until it answers, and stopping it with all its children."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS = 300.0
STOP_SECONDS = 30.0


class ServerError(Exception):
    """A server that does not start; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """How to start one. ``{port}`` in the command is replaced by a free port."""

    name: str
    command: str
    model: str
    """Name to give in requests; empty: the first it lists."""
    environ: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A server that answers: where, how long it took to its first token, and its process."""

    url: str
    start_seconds: float
    process: subprocess.Popen[bytes]

    def memory_mb(self) -> float:
        """Resident memory of the process and all its descendants, in MB."""
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True)
        rows = [tuple(int(cell) for cell in line.split()) for line in listing.stdout.splitlines()]
        family, before = {self.process.pid}, 0
        while len(family) != before:
            before = len(family)
            family |= {pid for pid, parent, _ in rows if parent in family}
        return sum(rss for pid, _, rss in rows if pid in family) * 1024 / 1e6


@contextmanager
def running(server: Server, log: Path) -> Iterator[Running]:
    """Run the server while the block runs, its output going to ``log``. Raises ServerError when it does not start."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = shlex.split(server.command.replace("{port}", str(port)))
    began = time.perf_counter()
    with log.open("wb") as output:
        # A session of its own, so that everything it starts can be stopped together.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **server.environ},
            start_new_session=True,
        )
    try:
        _wait_for_first_token(process, url, server, log)
        yield Running(url, time.perf_counter() - began, process)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_first_token(process: subprocess.Popen[bytes], url: str, server: Server, log: Path) -> None:
    """Ask for one token until it comes: the only sign of readiness that all servers share."""
    until = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        while time.monotonic() < until:
            if _answers(client, server.model):
                return
            try:
                # Ends the wait at once when the process dies; otherwise it paces the attempts.
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            raise ServerError(f"{server.name} ended with status {process.returncode}:\n{_tail(log)}")
    raise ServerError(f"{server.name} gave no token within {START_SECONDS:g} s:\n{_tail(log)}")


def _answers(client: httpx.Client, model: str) -> bool:
    try:
        name = model or client.get("/v1/models").json()["data"][0]["id"]
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        return client.post("/v1/chat/completions", json=body).status_code == 200
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, then, for whatever is left of its session, SIGKILL."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-15:])
