"""What a serving process has once, whichever model it serves: places, text threads, keys, and its end.

A permit belongs to a request from before its prompt is read until its last byte is sent, streams included. Event loop
only, except for what runs in the text threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request

from millpond.client import EngineState, EngineUnavailable
from millpond.client.engine import SHUTTING_DOWN
from millpond.client.state import EngineSnapshot
from millpond.config import ServeConfig
from millpond.http.errors import ApiError, shown, too_many
from millpond.http.json_body import JsonBodies
from millpond.http.keys import Keys
from millpond.http.response_store import ResponseStore
from millpond.http.response_table import NAME
from millpond.http.served_model import STOP_SECONDS, ServedModel
from millpond.http.snapshot import Snapshot
from millpond.http.threads import Threads

T = TypeVar("T")

TEXT_THREADS = 2
STALE_BEAT_SECONDS = 5.0
"""A heartbeat comes twice a second; after this long without one something is wrong."""
STUCK_SECONDS = 30.0
"""A step takes less than this, or people should know."""
REPLACING = "the server is replacing its model"


class FrontEnd:
    """The state of one serving process."""

    def __init__(self, config: ServeConfig, keys: Keys, model: ServedModel) -> None:
        self.config = config
        self.keys = keys
        self.model = model
        self.refusals: Counter[tuple[int, str]] = Counter()
        """HTTP requests turned away before anything was submitted, by status and error code."""
        self.unknown_fields = 0
        self.draining = False
        self.held = 0
        """Answers that hold a place."""
        self._held_by: Counter[str] = Counter()
        self.bodies = JsonBodies(config.max_values)
        self.responses = ResponseStore(_responses_path(config), config.responses_size, config.responses_ttl)
        self._pool = Threads(TEXT_THREADS, "text")
        self._replacing = asyncio.Lock()
        self._loaded = asyncio.Event()

    def model_for(self, asked: str) -> ServedModel:
        """The model that a request names; no name means the one there is. Raises ApiError 404."""
        names = self.model.names
        if asked and asked not in names:
            message = f"model: {shown(asked)} does not exist; this server has {shown(names.served)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.model

    async def in_text_thread(self, work: Callable[[], T], *, urgent: bool = True) -> T:
        """Run templating, tokenising or reading off the event loop; what is not urgent comes after all that is."""
        return await asyncio.wrap_future(self._pool.submit(work, urgent=urgent))

    def snapshot(self) -> Snapshot:
        """The state now, of the process and of its model."""
        model = self.model.snapshot()
        return Snapshot(
            status=self._status(model.engine),
            reasons=self.model.not_ready(),
            held=self.held,
            most_held=self.most_held,
            unknown_fields=self.unknown_fields,
            refusals=dict(self.refusals),
            model=model,
        )

    def _status(self, engine: EngineSnapshot) -> str:
        if self.draining:
            return "shutting_down"
        if self.model.refusing:
            return EngineState.STOPPED.value
        if engine.state is not EngineState.READY:
            return engine.state.value
        if self.model.not_ready():
            return "starting"
        if (engine.beat_age or 0.0) > STALE_BEAT_SECONDS or engine.stuck_seconds > STUCK_SECONDS:
            return "degraded"
        return "overloaded" if self.held >= self.most_held else "ok"

    # --- admission ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def permit(self, model: ServedModel, choices: int, client: str) -> Iterator[None]:
        """Hold the places of ``choices`` answers for a client. Raises ApiError 429 when there are none, or when the
        wait is predicted to be longer than the queue's time-out."""
        self._admit(model, choices, client)
        self.held += choices
        self._held_by[client] += choices
        try:
            with model.answering(choices):
                yield
        finally:
            self.held -= choices
            self._held_by[client] -= choices
            if not self._held_by[client]:
                del self._held_by[client]

    def _admit(self, model: ServedModel, choices: int, client: str) -> None:
        most, own_most = self.most_held, self.config.max_per_client
        least = min(most, own_most or most)
        if choices > least:
            message = f"n: prompts times n must be at most {least} here, got {choices}"
            raise ApiError(400, message, param="n", code="invalid_value")
        beat = model.client.beat
        wait = beat.wait_seconds if beat is not None else 0.0
        if self.held + choices > most:
            message = f"{self.held} answers are running or waiting, at most {most} may; {choices} more do not fit"
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
    def most_held(self) -> int:
        """How many answers may hold a place."""
        info = self.model.client.info
        return (info.max_batch if info is not None else 0) + self.config.max_waiting

    # --- the model ----------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Wait until the model can answer; its engine has been started. Raises TokenizerError, EngineUnavailable."""
        await self.model.load(self.in_text_thread)
        self._loaded.set()

    async def replace(self, model: ServedModel, drain_seconds: float) -> None:
        """Serve ``model`` in the place of the one there is, which is drained and ended first: memory is for one. Until
        it can answer, requests get a 503 that says why. Raises OSError, TokenizerError or EngineUnavailable when it
        cannot be had: then it keeps the place and says so, and another may replace it. Not to be cancelled halfway: the
        place would be left to a model that nobody loads."""
        async with self._replacing:
            await self.model.close(drain_seconds, REPLACING)
            if self.draining:
                raise EngineUnavailable(SHUTTING_DOWN)
            self.model = model
            await model.client.start()
            await self.load()

    async def lost(self) -> str:
        """Wait until a model that could answer cannot any more, for good and unasked; returns why."""
        while True:
            await self._loaded.wait()
            self._loaded.clear()
            model = self.model
            await model.client.gone()
            if model.loaded and not model.refusing:
                return model.client.whole_reason()

    # --- the end ------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Refuse new work, let the running finish for ``seconds``, then end the rest with an error."""
        self.draining = True
        await self.model.drain(seconds, SHUTTING_DOWN)

    async def stop(self) -> None:
        """Welcome no more requests and end the model's engine."""
        self.draining = True
        self.model.refusing = SHUTTING_DOWN
        await self.model.client.stop(STOP_SECONDS)

    def kill(self) -> None:
        """End the model's engine this instant; for a forced exit."""
        self.model.client.kill()

    def close(self) -> None:
        """End the text threads, and write what waits for the disk."""
        self._pool.close()
        self.responses.close()


def _responses_path(config: ServeConfig) -> Path | None:
    """Beside the cached prefixes, which say as much; nowhere where those are not on a disk either."""
    folder = config.cache_folder if config.cache_ssd and config.cache_ram != 0 else None
    return folder / NAME if folder is not None else None


def front_end_of(request: Request) -> FrontEnd:
    """What serves this request."""
    front: FrontEnd = request.app.state.front_end
    return front
