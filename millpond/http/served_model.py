"""One model as it is served: its names, tokenizer and defaults, its engine, and the answers that run on it.

A process may serve one after another. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

from millpond.client import EngineClient, EngineError, EngineState
from millpond.client.public import public
from millpond.http.errors import unavailable
from millpond.http.generation_request import SamplingDefaults
from millpond.http.meters import Meters
from millpond.http.names import ModelNames
from millpond.http.snapshot import ModelSnapshot
from millpond.http.spellings import Spellings
from millpond.text.tokenizer import Tokenizer, TokenizerError
from millpond.types import ErrorKind, ModelInfo, Speculation

InTextThread = Callable[[Callable[[], Tokenizer]], Awaitable[Tokenizer]]

STOP_SECONDS = 8.0
"""How long an engine may take to stop: it writes live conversations to the SSD for up to five of them."""
LAST_ERRORS_SECONDS = 1.0
"""For the errors of requests that a drain has ended to be written to their clients."""


class ServedModel:
    """What is the model's own, apart from what the process has once (FrontEnd)."""

    def __init__(
        self,
        names: ModelNames,
        read_tokenizer: Callable[[], Tokenizer],
        client: EngineClient,
        sampling: SamplingDefaults,
        speculation: Speculation,
    ) -> None:
        """``read_tokenizer`` runs in a text thread; ``sampling`` and ``speculation``: of requests that do not say."""
        self.names = names
        self._read_tokenizer = read_tokenizer
        self.client = client
        self.sampling = sampling
        self.speculation = speculation
        self.meters = Meters()
        self.spellings = Spellings()
        self.created = int(time.time())
        self.tokenizer: Tokenizer | None = None
        self.loaded = False
        """Whether it could answer at some time."""
        self.refusing = ""
        """Why it takes no more requests, though it could; empty while it does."""
        self._without_tokenizer = "the tokenizer is loading"
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def load(self, in_text_thread: InTextThread) -> None:
        """Wait until it can answer; its engine has been started. Raises TokenizerError, EngineUnavailable."""
        await asyncio.gather(self._load_tokenizer(in_text_thread), self.client.settled())
        await self.client.settled()  # it may have died while the tokenizer was loading
        self.loaded = True

    async def _load_tokenizer(self, in_text_thread: InTextThread) -> None:
        try:
            self.tokenizer = await in_text_thread(self._read_tokenizer)
        except TokenizerError as error:
            self._without_tokenizer = public(str(error))
            raise

    def not_ready(self) -> list[str]:
        """Why requests are refused now; empty when they are welcome."""
        reasons = []
        if self.refusing:
            reasons.append(self.refusing)
        elif self.client.state is not EngineState.READY:
            reasons.append(self.client.unavailable_reason())
        if self.tokenizer is None:
            reasons.append(self._without_tokenizer)
        return reasons

    def ready(self) -> tuple[Tokenizer, ModelInfo]:
        """What a request needs. Raises ApiError 503 with the reasons."""
        reasons = self.not_ready()
        if reasons or self.tokenizer is None or self.client.info is None:
            raise unavailable("; ".join(reasons))
        return self.tokenizer, self.client.info

    def snapshot(self) -> ModelSnapshot:
        """Its state now."""
        return ModelSnapshot(self.names.served, self.client.snapshot(), self.meters.copy())

    @contextlib.contextmanager
    def answering(self, choices: int) -> Iterator[None]:
        """So many answers are under way, from before their prompt is read until their last byte is sent."""
        self._answering += choices
        self._idle.clear()
        try:
            yield
        finally:
            self._answering -= choices
            if not self._answering:
                self._idle.set()

    async def drain(self, seconds: float, why: str) -> None:
        """Refuse new work, let the running finish for ``seconds``, then end the rest with an error; ``why`` says what
        the server is doing."""
        self.refusing = why
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            message = f"{why} and stopped this request after {seconds:g} s"
            self.client.fail_all(EngineError(ErrorKind.UNAVAILABLE, message))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), LAST_ERRORS_SECONDS)

    async def close(self, drain_seconds: float, why: str) -> None:
        """Drain it, then end its engine: nothing of it runs any more."""
        await self.drain(drain_seconds, why)
        await self.client.stop(STOP_SECONDS, why)
