"""What all routes share: the model's names, the tokenizer, the engine, and who is let in.

A permit belongs to a request from before its prompt is read until its last byte is sent, streams included. Event loop
only, except for what runs in the text threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from millpond.client import EngineClient, EngineError, EngineState
from millpond.config import ServeConfig
from millpond.http.errors import ApiError, shown, too_many, unavailable
from millpond.http.meters import Meters
from millpond.http.openai.schemas import SamplingDefaults
from millpond.http.threads import Threads
from millpond.text.tokenizer import Tokenizer
from millpond.types import ErrorKind, ModelInfo

T = TypeVar("T")

TEXT_THREADS = 2
STALE_BEAT_SECONDS = 5.0
"""A heartbeat comes twice a second; after this long without one something is wrong."""
STUCK_SECONDS = 30.0
"""A step takes less than this, or people should know."""


@dataclass(frozen=True)
class ModelNames:
    """The name shown to clients, and every name they may use."""

    served: str
    aliases: frozenset[str]

    def check(self, asked: str) -> None:
        """Raises ApiError 404 for a model that is not here. No name means the one there is."""
        if asked and asked != self.served and asked not in self.aliases:
            message = f"model: {shown(asked)} does not exist; this server has {shown(self.served)}"
            raise ApiError(404, message, param="model", code="model_not_found")


class Service:
    """The state of one front end."""

    def __init__(
        self,
        config: ServeConfig,
        names: ModelNames,
        load_tokenizer: Callable[[], Tokenizer],
        client: EngineClient,
        sampling: SamplingDefaults,
    ) -> None:
        self.config = config
        self.sampling = sampling
        self.names = names
        self.client = client
        self.meters = Meters()
        self.created = int(time.time())
        self.unknown_fields = 0
        self.draining = False
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._pool = Threads(TEXT_THREADS, "text")
        self._held = 0
        self._held_by: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    async def load(self) -> None:
        """Load the tokenizer in a text thread. Raises whatever the loader raises."""
        self._tokenizer = await self.in_text_thread(self._load_tokenizer)

    async def in_text_thread(self, work: Callable[[], T], *, urgent: bool = True) -> T:
        """Run templating, tokenising or reading off the event loop; what is not urgent comes after all that is."""
        return await asyncio.wrap_future(self._pool.submit(work, urgent=urgent))

    def close(self) -> None:
        self._pool.close()

    # --- readiness ----------------------------------------------------------------------------------------------

    def not_ready(self) -> list[str]:
        """Why requests are refused now; empty when they are welcome."""
        reasons = []
        if self.draining:
            reasons.append("the server is shutting down")
        elif self.client.state is not EngineState.READY:
            reasons.append(self.client.unavailable_reason())
        if self._tokenizer is None:
            reasons.append("the tokenizer is loading")
        return reasons

    def ready(self) -> tuple[Tokenizer, ModelInfo]:
        """What a request needs. Raises ApiError 503 with the reasons."""
        reasons = self.not_ready()
        if reasons or self._tokenizer is None or self.client.info is None:
            raise unavailable("; ".join(reasons))
        return self._tokenizer, self.client.info

    def status(self) -> str:
        """One word for /health."""
        if self.draining:
            return "shutting_down"
        if self.client.state is not EngineState.READY:
            return self.client.state.value
        if self.not_ready():
            return "starting"
        age = self.client.beat_age
        if (age is not None and age > STALE_BEAT_SECONDS) or self.client.watchdog.stuck_seconds > STUCK_SECONDS:
            return "degraded"
        return "overloaded" if self._held >= self.most_held else "ok"

    # --- admission ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def permit(self, choices: int, client: str) -> Iterator[None]:
        """Hold the places of ``choices`` answers for a client. Raises ApiError 429 when there are none, or when the
        wait is predicted to be longer than the queue's time-out."""
        self._admit(choices, client)
        self._held += choices
        self._held_by[client] += choices
        self._idle.clear()
        try:
            yield
        finally:
            self._held -= choices
            self._held_by[client] -= choices
            if not self._held_by[client]:
                del self._held_by[client]
            if not self._held:
                self._idle.set()

    def _admit(self, choices: int, client: str) -> None:
        most, own_most = self.most_held, self.config.max_per_client
        least = min(most, own_most or most)
        if choices > least:
            message = f"n: prompts times n must be at most {least} here, got {choices}"
            raise ApiError(400, message, param="n", code="invalid_value")
        wait = self.client.beat.wait_seconds if self.client.beat is not None else 0.0
        if self._held + choices > most:
            message = f"{self._held} answers are running or waiting, at most {most} may; {choices} more do not fit"
            raise too_many(message, "queue_full", wait)
        own = self._held_by.get(client, 0)
        if own_most and own + choices > own_most:
            message = f"{own} answers of this client are running or waiting, at most {own_most} may"
            raise too_many(message, "client_limit", wait)
        patience = self.config.queue_timeout
        if patience and wait > patience:
            message = f"a request would wait for about {wait:.0f} s, and may for {patience:g} s"
            raise too_many(message, "queue_too_long", wait - patience)

    @property
    def held(self) -> int:
        """Answers that hold a place."""
        return self._held

    @property
    def most_held(self) -> int:
        """How many may."""
        rows = self.client.info.max_rows if self.client.info is not None else 0
        return rows + self.config.max_waiting

    async def drain(self, seconds: float) -> None:
        """Refuse new work, let the running finish for ``seconds``, then end the rest with an error."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            message = f"the server is shutting down and stopped this request after {seconds:g} s"
            self.client.fail_all(EngineError(ErrorKind.UNAVAILABLE, message))
            with contextlib.suppress(TimeoutError):
                # The errors still have to be written to the clients.
                await asyncio.wait_for(self._idle.wait(), 1.0)
