"""Starts the real processes of a group, over the ring backend on loopback, and is their front end.

One rank is a lone engine (``millpond.engine``): what a group answers is compared with it. Every rank has a cache folder
of its own below ``home``, as if each were on its own machine; what the ranks log is in ``home``, too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec
from engine_driver import Outcome
from patient_ring import patient

from millpond import wire
from millpond.launch.hosts import Host
from millpond.launch.layout import LOOPBACK, GroupLayout
from millpond.types import Finish, ModelInfo, Request

PATIENCE = 120.0
"""Seconds after which what should happen has not: far above what it takes, because machines are busy."""
RANK = (sys.executable, "-m", "millpond.parallel")
ALONE = (sys.executable, "-m", "millpond.engine")


class GroupFailed(Exception):  # noqa: N818 - reads as the fact it states
    """Rank 0 has said that the group cannot go on, and why."""


class Group:
    """Rank 0 and its followers, from start to end. A context manager: nothing outlives it."""

    def __init__(
        self,
        folder: Path,
        world: int,
        home: Path,
        *,
        models: Mapping[int, Path] | None = None,
        followers: bool = True,
        silence_seconds: float = 5.0,
        **start: object,
    ) -> None:
        """``models``: other folders of followers. Without ``followers``, the test starts them. ``start``: fields of
        Start."""
        self.world = world
        self.home = home
        self.processes: list[subprocess.Popen[bytes]] = []
        """Rank 0 first."""
        self.outcomes: dict[str, Outcome] = {}
        self.beat = wire.Beat(step=0, running=0, waiting=0, kv_bytes=0)
        self._logs: dict[int, _Log] = {}
        self._buffer = b""
        self._socket, theirs = socket.socketpair()
        with contextlib.ExitStack() as inherited:
            inherited.callback(theirs.close)
            listener = inherited.enter_context(socket.create_server((LOOPBACK, 0)))
            self.port = listener.getsockname()[1]
            layout = GroupLayout(
                hosts=(Host("", (LOOPBACK,)),) * world,
                backend="ring",
                host=LOOPBACK,
                port=0,
                silence_seconds=silence_seconds,
            )
            named = {rank: str((models or {}).get(rank, folder)) for rank in range(world)}
            self.settings = layout.settings(self.port, _free_ports(world), secrets.token_hex(32), named)
            leader = msgspec.structs.replace(self.settings[0], listen_fd=listener.fileno()) if world > 1 else None
            descriptors = (theirs.fileno(), *((listener.fileno(),) if leader is not None else ()))
            command = [*(RANK if world > 1 else ALONE), "--fd", str(theirs.fileno())]
            self._spawn(0, command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        fields: dict[str, object] = {"max_batch": 8, "max_itl_ms": 400.0, "group": leader, **start}
        self.send(wire.Start(model_path=str(folder), **fields))  # type: ignore[arg-type]
        for rank in range(1, world) if followers else ():
            self.follow(rank)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        for log in self._logs.values():
            log.close()
        self._socket.close()

    # --- processes --------------------------------------------------------------------------------------------

    def follow(self, rank: int, command: Sequence[str] = RANK, **changed: object) -> subprocess.Popen[bytes]:
        """Start a follower. ``changed``: fields of its GroupSettings."""
        process = self._spawn(rank, command, stdin=subprocess.PIPE)
        assert process.stdin is not None
        settings = msgspec.structs.replace(self.settings[rank], **changed)
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        return process

    def _spawn(self, rank: int, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        own = {"MILLPOND_CACHE": str(self.cache(rank)), "MILLPOND_LOG_LEVEL": "info"}
        environment = {**os.environ, **patient(), **own}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
        assert isinstance(process, subprocess.Popen)
        assert process.stderr is not None
        self.processes.append(process)
        self._logs.setdefault(rank, _Log()).follow(process.stderr)
        return process

    def cache(self, rank: int) -> Path:
        """Where a rank keeps what it keeps; its blocks unless Start names a folder."""
        return self.home / f"cache-{rank}"

    def log(self, rank: int) -> str:
        """What has been logged by all that have been this rank."""
        return self._logs[rank].text

    def logged(self, rank: int, what: str) -> None:
        """Wait until a rank has logged something."""
        self._logs[rank].wait_for(what)

    # --- messages ---------------------------------------------------------------------------------------------

    def send(self, message: wire.ToEngine) -> None:
        self._socket.sendall(wire.encode(message))

    def messages(self, seconds: float = PATIENCE) -> Iterator[wire.FromEngine]:
        """What comes, until rank 0 is gone; what tells of requests is noted in ``outcomes``. Raises GroupFailed."""
        ends = time.monotonic() + seconds
        while True:
            header = self._read(wire.HEADER.size, ends)
            if not header:
                return
            message = wire.decode_from_engine(self._read(wire.frame_length(header), ends))
            self._note(message)
            yield message

    def _read(self, count: int, ends: float) -> bytes:
        """``count`` bytes; none at the end. The time limit is for what is waited for: beats come for ever."""
        while len(self._buffer) < count:
            left = ends - time.monotonic()
            assert left > 0, f"nothing of what was waited for has come: {self.log(0)}"
            self._socket.settimeout(left)
            try:
                piece = self._socket.recv(1 << 16)
            except ConnectionError:
                piece = b""
            if not piece:
                assert not self._buffer, "the end came inside a message"
                return b""
            self._buffer += piece
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _note(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Fatal(reason):
                raise GroupFailed(reason)
            case wire.Beat():
                self.beat = message
            case wire.Failed(name):
                self.outcomes[name].failure = message
                self.outcomes[name].endings += 1
            case wire.Deltas(items):
                for delta in items:
                    outcome = self.outcomes[delta.id]
                    assert outcome.endings == 0, "a token after the end"
                    outcome.tokens += delta.tokens
                    outcome.logprobs += delta.logprobs or []
                    outcome.prompt_logprobs += delta.prompt_logprobs or []
                    outcome.embedding = delta.embedding or outcome.embedding
                    outcome.prefix = delta.prefix or outcome.prefix
                    if delta.verdict is not None:
                        outcome.accepted += delta.verdict.accepted
                        outcome.rejected += delta.verdict.rejected
                    if delta.finish is not None:
                        outcome.finish = delta.finish
                        outcome.endings += 1

    def until(self, reached: Callable[[], bool]) -> None:
        """Take messages until something is so."""
        if reached():
            return
        for _ in self.messages():
            if reached():
                return
        raise AssertionError(f"rank 0 is gone: {self.log(0)}")

    def ready(self) -> ModelInfo:
        """Wait for the group. Raises GroupFailed."""
        for message in self.messages():
            if isinstance(message, wire.Ready):
                return message.info
        raise AssertionError(f"rank 0 is gone: {self.log(0)}")

    def failure(self) -> str:
        """Why the group cannot go on; waits for that, and for the end of rank 0."""
        try:
            for _ in self.messages():
                pass
        except GroupFailed as failed:
            assert self.processes[0].wait(PATIENCE) != 0
            return str(failed)
        raise AssertionError(f"rank 0 is gone without a word: {self.log(0)}")

    # --- requests ---------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.outcomes[request.id] = Outcome()
            self.send(wire.Submit(request))

    def cancel(self, name: str) -> None:
        self.send(wire.Cancel(name))

    def finish(self) -> None:
        """Wait until all requests have ended."""
        self.until(lambda: all(outcome.endings for outcome in self.outcomes.values()))

    def rest(self) -> wire.Beat:
        """Wait until the group says that it holds nothing of any request."""
        heard = self.beat
        self.until(lambda: self.beat is not heard and (self.beat.running, self.beat.waiting) == (0, 0))
        return self.beat

    def answers(self, requests: Iterable[Request]) -> dict[str, Outcome]:
        """All at once; what becomes of each, by name."""
        asked = list(requests)
        self.submit(*asked)
        self.finish()
        return {request.id: self.outcomes[request.id] for request in asked}

    def stop(self) -> list[int]:
        """Tell them to go; the exit status of each."""
        self.send(wire.Stop())
        for _ in self.messages():
            pass
        return [process.wait(PATIENCE) for process in self.processes]


class _Log:
    """What processes write to their standard error."""

    def __init__(self) -> None:
        self.text = ""
        self._more = threading.Condition()
        self._threads: list[threading.Thread] = []

    def follow(self, stream: IO[bytes]) -> None:
        self._threads.append(threading.Thread(target=self._read, args=(stream,), daemon=True))
        self._threads[-1].start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                with self._more:
                    self.text += line.decode(errors="replace")
                    self._more.notify_all()

    def wait_for(self, what: str) -> None:
        with self._more:
            assert self._more.wait_for(lambda: what in self.text, PATIENCE), f"{what!r} was not logged: {self.text}"

    def close(self) -> None:
        """Whoever wrote has ended."""
        for thread in self._threads:
            thread.join()


def text(outcome: Outcome) -> tuple[list[int], Finish | None]:
    """What must be the same, however many ranks there are."""
    assert outcome.failure is None, outcome.failure
    assert outcome.endings == 1
    return outcome.tokens, outcome.finish


def _free_ports(count: int) -> list[int]:
    """Free a moment ago, and taken by the backend a moment from now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
