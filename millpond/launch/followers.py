"""The followers of one group of ranks: started here or over ssh, told their place, watched, and killed all at once.

A follower reads its GroupSettings, the secret among them, as one line of JSON on standard input, which then stays open:
its end means that it must die. On another machine ``millpond rank`` (cli/rank.py) holds the follower, and ssh holds
that. Nothing secret is ever in a command line or an environment. Only processes started here are signalled. Event loop
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from millpond.child import inherited, python
from millpond.launch.layout import GroupLayout
from millpond.launch.process import described, send_signal
from millpond.lifeline import LOST_STATUS
from millpond.observe.log import fields
from millpond.types import GroupSettings

log = logging.getLogger("millpond.client")

RANK_COMMAND = python("-m", "millpond.parallel")
"""Rank 0 with ``--fd N``, a follower without."""
SSH_OPTIONS = ("-T", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=5", "-oServerAliveCountMax=3")
SSH_FAILED = 255
SIGNALLED = 128
"""What a shell, and ``millpond rank``, add to the number of a signal to make it a status."""
REMOTE_PATIENCE = 2.0
"""Seconds for the other machines to say that their rank is dead; it is, or it sees that nobody is there any more."""
LAST_WORDS = 0.2
"""Seconds for what a dead rank wrote to standard error to arrive."""
LONGEST_LINE = 64 * 1024
LONGEST_QUOTE = 300
SECRET_BYTES = 32


@dataclass(frozen=True)
class GroupPlan:
    """What every group of this server is started from."""

    layout: GroupLayout
    given: str
    """The model as it was named: what ranks on other machines are told."""
    folder: str
    """The model's folder on this machine."""
    command: Sequence[str] = RANK_COMMAND
    """A follower's, on this machine."""
    python: str = sys.executable
    """On the other machines."""
    ssh: Sequence[str] = ("ssh",)
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of ours, on this machine."""
    options: Sequence[str] = ()
    """Of ``millpond rank``."""


@dataclass(frozen=True)
class Ending:
    """How a follower ended."""

    rank: int
    status: int
    """A signal's is negative."""
    text: str
    """``rank 1 was ended by SIGKILL``."""
    at: float
    """When it was noticed; monotonic."""

    @property
    def killed(self) -> bool:
        """Nothing but the outside kills: no rank ends so because of another."""
        return self.status == -signal.SIGKILL

    @property
    def consequence(self) -> bool:
        return self.status == LOST_STATUS


class Followers:
    """The followers of one group, and rank 0's place in it. ``assemble`` one, ``start`` it, always ``end`` it."""

    def __init__(self, plan: GroupPlan, settings: Sequence[GroupSettings], listener: socket.socket) -> None:
        """``assemble`` makes them."""
        self._plan = plan
        self._settings = settings
        self._listener = listener
        self._followers: list[_FollowerProcess] = []
        self._on_end: Callable[[], None] = lambda: None
        self._culprit = asyncio.Event()
        self.endings: list[Ending] = []
        """In the order in which they were noticed."""

    @classmethod
    def assemble(cls, plan: GroupPlan) -> Followers:
        """Take rank 0's address, find ports and make a secret. Raises OSError, in words."""
        layout = plan.layout
        listener = _listen(layout.host, layout.port)
        try:
            ports = layout.fixed_ports or _free_ports(layout.addresses)
        except OSError:
            listener.close()
            raise
        elsewhere = str(Path(plan.given).absolute()) if Path(plan.given).exists() else plan.given
        models = {rank: elsewhere if layout.hosts[rank].ssh else plan.folder for rank in range(layout.world)}
        secret = layout.secret or secrets.token_hex(SECRET_BYTES)
        return cls(plan, layout.settings(listener.getsockname()[1], ports, secret, models), listener)

    @property
    def leader(self) -> GroupSettings:
        """Rank 0's place; its process inherits ``descriptor``."""
        return msgspec.structs.replace(self._settings[0], listen_fd=self.descriptor)

    @property
    def descriptor(self) -> int:
        """Of the socket on which rank 0 takes control connections."""
        return self._listener.fileno()

    def release(self) -> None:
        """Rank 0 has the socket now: held open here, it would take connections for a rank 0 that is dead."""
        self._listener.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes on this machine, each in the place of a follower."""
        return tuple(follower.pid for follower in self._followers)

    async def start(self, on_end: Callable[[], None]) -> None:
        """Start all followers that are ours to start; ``on_end`` is called each time one has ended. Raises OSError."""
        self._on_end = on_end
        layout = self._plan.layout
        for rank in sorted((*layout.followers_here, *layout.followers_elsewhere)):
            host = layout.hosts[rank].ssh
            command = self._over_ssh(host) if host else self._plan.command
            follower = await _FollowerProcess.spawn(rank, host, command, self._plan.environment, self._ended)
            self._followers.append(follower)
            follower.tell(self._settings[rank])
            log.info("rank started", extra=fields(rank=rank, pid=follower.pid, host=host or None))

    def _over_ssh(self, host: str) -> list[str]:
        keeper = python("-m", "millpond.cli.main", "rank", *self._plan.options, program=self._plan.python)
        return [*self._plan.ssh, *SSH_OPTIONS, "--", host, f"exec {shlex.join(keeper)}"]

    def _ended(self, ending: Ending) -> None:
        self.endings.append(ending)
        if not ending.consequence:
            self._culprit.set()
        self._on_end()

    async def culprit_or_all(self, seconds: float) -> None:
        """Wait until a follower has ended for a reason of its own, or all for whatever reason; but not for longer."""
        culprit = asyncio.create_task(self._culprit.wait())
        everybody = asyncio.create_task(self._all_ended(seconds))
        await asyncio.wait({culprit, everybody}, return_when=asyncio.FIRST_COMPLETED)
        culprit.cancel()
        everybody.cancel()

    def kill(self) -> None:
        """SIGKILL for every one, without waiting; on other machines, the loss of ssh does the same."""
        for follower in self._followers:
            follower.kill()

    async def end(self, patience: float) -> None:
        """Wait ``patience`` seconds for all to end by themselves, then kill, and see them out."""
        await self._all_ended(patience)
        for follower in self._followers:
            follower.hang_up()
        await self._all_ended(REMOTE_PATIENCE)
        self.kill()
        await asyncio.gather(*(follower.minding for follower in self._followers))
        self.release()

    async def _all_ended(self, seconds: float) -> None:
        left = {follower.minding for follower in self._followers if not follower.minding.done()}
        if left and seconds > 0:
            await asyncio.wait(left, timeout=seconds)


class _FollowerProcess:
    """One process: a follower, or the ssh to the machine where one runs."""

    def __init__(
        self, rank: int, host: str, process: asyncio.subprocess.Process, ended: Callable[[Ending], None]
    ) -> None:
        self._rank = rank
        self._host = host
        self._process = process
        self._ended = ended
        self._last_line = ""
        self.minding = asyncio.create_task(self._mind(), name=f"rank-{rank}")

    @classmethod
    async def spawn(
        cls,
        rank: int,
        host: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        ended: Callable[[Ending], None],
    ) -> _FollowerProcess:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env=inherited(environment),
            )
        except OSError as error:
            raise OSError(error.errno, f"rank {rank}: {command[0]}: {error.strerror}") from error
        return cls(rank, host, process, ended)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, settings: GroupSettings) -> None:
        """Its first and only line."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(settings) + b"\n")

    def hang_up(self) -> None:
        """Its death: at once on this machine, through the end of its input on another."""
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.close()
        if not self._host:
            self.kill()

    def kill(self) -> None:
        send_signal(self._process, signal.SIGKILL)

    async def _mind(self) -> None:
        """Pass its standard error on until it has ended, and tell how."""
        passing = asyncio.create_task(self._pass_on())
        status = await self._process.wait()
        at = time.monotonic()
        if status > 0:
            await asyncio.wait({passing}, timeout=LAST_WORDS)
        passing.cancel()
        self._ended(self._ending(status, at))

    def _ending(self, status: int, at: float) -> Ending:
        name = f"rank {self._rank} on {self._host}" if self._host else f"rank {self._rank}"
        said = f": {self._last_line[:LONGEST_QUOTE]}" if self._last_line else ""
        if self._host and status == SSH_FAILED:
            return Ending(self._rank, status, f"{name}: ssh has lost it{said}", at)
        if self._host and status > SIGNALLED:
            status = SIGNALLED - status
        return Ending(self._rank, status, f"{name} {described(status)}{said if status > 0 else ''}", at)

    async def _pass_on(self) -> None:
        assert self._process.stderr is not None
        rest = b""
        while piece := await self._process.stderr.read(LONGEST_LINE):
            lines, newline, rest = (rest + piece).rpartition(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, newline, rest = rest, b"\n", b""
            self._write(lines + newline)
        self._write(rest)

    def _write(self, text: bytes) -> None:
        shown = text.decode(errors="replace")
        if shown.strip():
            self._last_line = shown.strip().rpartition("\n")[2]
        with contextlib.suppress(OSError, ValueError):  # nobody reads our standard error any more
            sys.stderr.write(shown)
            sys.stderr.flush()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        number = getattr(error, "errno", None) or 0
        raise OSError(
            number, f"rank 0, which must be on this machine, cannot listen on {host} port {port}: {reason}"
        ) from error
    return listener


def _free_ports(addresses: Sequence[str]) -> tuple[int, ...]:
    """A port for each address, no two the same; free a moment ago, and taken by the backend a moment from now."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for address in addresses:
            sockets.append(stack.enter_context(socket.socket()))
            try:
                sockets[-1].bind((address, 0))
            except OSError as error:
                raise OSError(error.errno, f"no port can be had on {address}: {error.strerror}") from error
        return tuple(each.getsockname()[1] for each in sockets)
