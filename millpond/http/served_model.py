"""One model as it is served: its names, tokenizer and defaults, its engine, and the answers that run on it.

A process may serve one after another. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from millpond.client import EngineClient, EngineError, EngineState
from millpond.http.errors import unavailable
from millpond.http.generation_request import SamplingDefaults
from millpond.http.meters import Meters
from millpond.http.names import ModelNames
from millpond.text.tokenizer import Tokenizer
from millpond.types import ErrorKind, ModelInfo, Speculation

LAST_ERRORS_SECONDS = 1.0
"""For the errors of requests that a drain has ended to be written to their clients."""


class ServedModel:
    """What is the model's own, apart from what the process has once (FrontEnd)."""

    def __init__(
        self,
        names: ModelNames,
        load_tokenizer: Callable[[], Tokenizer],
        client: EngineClient,
        sampling: SamplingDefaults,
        speculation: Speculation,
    ) -> None:
        """``load_tokenizer`` runs in a text thread; ``sampling`` and ``speculation``: of requests that do not say."""
        self.names = names
        self.load_tokenizer = load_tokenizer
        self.client = client
        self.sampling = sampling
        self.speculation = speculation
        self.meters = Meters()
        self.created = int(time.time())
        self.tokenizer: Tokenizer | None = None
        self.leaving = ""
        """Why it takes no more requests; empty while it takes them."""
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def not_ready(self) -> list[str]:
        """Why requests are refused now; empty when they are welcome."""
        reasons = []
        if self.leaving:
            reasons.append(self.leaving)
        elif self.client.state is not EngineState.READY:
            reasons.append(self.client.unavailable_reason())
        if self.tokenizer is None:
            reasons.append("the tokenizer is loading")
        return reasons

    def ready(self) -> tuple[Tokenizer, ModelInfo]:
        """What a request needs. Raises ApiError 503 with the reasons."""
        reasons = self.not_ready()
        if reasons or self.tokenizer is None or self.client.info is None:
            raise unavailable("; ".join(reasons))
        return self.tokenizer, self.client.info

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
        self.leaving = why
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            message = f"{why} and stopped this request after {seconds:g} s"
            self.client.fail_all(EngineError(ErrorKind.UNAVAILABLE, message))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), LAST_ERRORS_SECONDS)
