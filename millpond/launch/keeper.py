"""A rank that mlx.launch or mpirun has started and that is not the first: no HTTP, a follower, and another whenever it
ends, until it is told to stop or rank 0 has said goodbye. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Mapping, Sequence

import msgspec

from millpond.child import inherited
from millpond.config import ServeConfig
from millpond.launch.followers import RANK_COMMAND
from millpond.launch.process import described, send_signal
from millpond.observe.log import fields, last_words
from millpond.types import GroupSettings

log = logging.getLogger("millpond.serve")

FIRST_DELAY = 0.2
LONGEST_DELAY = 10.0
LONG_LIFE = 60.0
"""A follower that lived for so many seconds was no failed start."""
STOP_MARGIN = 15.0
"""Seconds that rank 0 may need for a stop, beyond those for draining."""


class Keeper:
    """Starts followers, one after the other."""

    def __init__(
        self, settings: GroupSettings, config: ServeConfig, restarts: bool, command: Sequence[str] = RANK_COMMAND
    ) -> None:
        """``restarts``: whether one that is lost is followed by another."""
        self._settings = settings
        self._environment = config.log_environment
        self._patience = config.drain_seconds + STOP_MARGIN
        self._restarts = restarts
        self._command = command
        self._stop = asyncio.Event()
        self._signalled = False
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Until told to stop, or until a follower ends well. Returns the exit code."""
        self._catch_signals()
        ended = asyncio.create_task(self._stop_with_input())
        try:
            return await self._keep()
        finally:
            ended.cancel()

    async def _keep(self) -> int:
        delay = FIRST_DELAY
        while True:
            begun = time.monotonic()
            self._process = await start_follower(self._settings, self._environment, self._command)
            log.info("rank started", extra=fields(rank=self._settings.rank, pid=self._process.pid))
            status = await self._seen_out(self._process)
            if self._stop.is_set() or status == 0:
                return 0
            if not self._restarts:
                log.error("rank lost", extra=fields(rank=self._settings.rank, reason=described(status)))
                return 1
            delay = FIRST_DELAY if time.monotonic() - begun > LONG_LIFE else min(LONGEST_DELAY, delay * 2)
            told = fields(rank=self._settings.rank, reason=f"it {described(status)}", delay_s=delay)
            log.warning("rank lost, starting another", extra=told)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
                return 0

    async def _seen_out(self, process: asyncio.subprocess.Process) -> int:
        """Wait for its end; once a stop is asked for, not much longer than rank 0 may take to tell it."""
        exited = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({exited, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        await asyncio.wait({exited}, timeout=self._patience)
        self._kill()
        return await exited

    def _kill(self) -> None:
        if self._process is not None:
            send_signal(self._process, signal.SIGKILL)

    async def _stop_with_input(self) -> None:
        await input_ended()
        self._stop.set()

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled:
            self._kill()
            last_words()
            os._exit(128 + number)
        # A lost terminal is no impatience: mlx.launch sends a SIGTERM behind it.
        self._signalled = number != signal.SIGHUP
        self._stop.set()


async def start_follower(
    settings: GroupSettings, environment: Mapping[str, str], command: Sequence[str] = RANK_COMMAND
) -> asyncio.subprocess.Process:
    """A follower that says what it has to say on our standard error. It dies with its input, which is ours to close."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, start_new_session=True, env=inherited(environment)
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    return process


async def input_ended() -> None:
    """Wait until whoever started us has closed our standard input; for ever, if that is no pipe."""
    kind = os.fstat(sys.stdin.fileno()).st_mode
    if not stat.S_ISFIFO(kind) and not stat.S_ISSOCK(kind):
        await asyncio.Event().wait()
    reader = await read_input()
    while await reader.read(4096):
        continue
    log.info("standard input has ended, stopping")


async def read_input() -> asyncio.StreamReader:
    """Standard input. Raises ValueError when it is neither a pipe nor a socket nor a terminal."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader
