"""One engine process and its socket.

The process runs in its own session, so that a Ctrl-C in the terminal reaches the front end only, and holds the other
end of a socket pair: when either side dies, the other reads an end of file. Only the process started here is ever
signalled. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence

from millpond import wire
from millpond.child import inherited


class EngineProcess:
    """A running engine. ``spawn`` one, ``send`` and ``receive`` frames, then always ``end`` it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> EngineProcess:
        """Start ``command --fd N`` with ``environment`` on top of ours; ``pass_fds`` stay open in it, under their
        numbers. Raises OSError when it cannot be started."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *pass_fds),
                start_new_session=True,
                env=inherited(environment),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            # Held open here, it would hide the engine's death: the socket would never read an end of file.
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: wire.ToEngine) -> None:
        """Queue one message. A dead engine is noticed by ``receive``, not here. Raises WireError when too large."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def receive(self) -> wire.FromEngine | None:
        """The next message; None when the engine is gone. Raises WireError for a frame that makes no sense."""
        try:
            header = await self._reader.readexactly(wire.HEADER.size)
            body = await self._reader.readexactly(wire.frame_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return wire.decode_from_engine(body)

    def abandon(self) -> None:
        """Hear and say nothing more: ``receive`` gives what has arrived already, then None."""
        self._writer.transport.abort()

    @property
    def ending(self) -> str:
        """How it ended; empty while it runs."""
        return "" if self._process.returncode is None else described(self._process.returncode)

    async def end(self, patience: float) -> str:
        """See the process out: wait ``patience`` seconds, terminate, wait one more, kill. Returns how it ended."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        for wait, then in ((patience, signal.SIGTERM), (1.0, signal.SIGKILL)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), wait)
                break
            send_signal(self._process, then)
        return described(await self._process.wait())

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        send_signal(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL now, without waiting; for a forced exit."""
        send_signal(self._process, signal.SIGKILL)


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """To a child that has not ended. Not by its own method: that looks at the child first, and a death that it sees is
    one that asyncio's watcher does not see and reports with a status of its own invention."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def described(status: int) -> str:
    """How a process ended, by its status; a signal's is negative."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
