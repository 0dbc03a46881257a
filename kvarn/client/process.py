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

from kvarn import wire

SECRET = "KVARN_API_KEY"  # noqa: S105 - a name
"""The engine has no business with it, and whoever may read its environment neither."""


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
    async def spawn(cls, command: Sequence[str], environment: Mapping[str, str]) -> EngineProcess:
        """Start ``command --fd N`` with ``environment`` on top of ours. Raises OSError when it cannot be started."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**{name: os.environ[name] for name in os.environ if name != SECRET}, **environment},
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

    async def end(self, patience: float) -> str:
        """See the process out: wait ``patience`` seconds, terminate, wait one more, kill. Returns how it ended."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        for wait, then in ((patience, signal.SIGTERM), (1.0, signal.SIGKILL)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), wait)
                break
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(then)
        return _ending(await self._process.wait())

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL now, without waiting; for a forced exit."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _ending(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
