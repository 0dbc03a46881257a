"""Supervision of the engine.

One task owns the engine, with its followers if it has any: it starts it, reads its messages, and when it dies fails
every open request at once and starts another, waiting a little longer after each failure. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

from millpond import wire
from millpond.child import python
from millpond.client.open_requests import OpenRequests
from millpond.client.public import public
from millpond.client.state import EngineSnapshot, EngineState
from millpond.client.stream import EngineError, EngineUnavailable, Stream
from millpond.client.watchdog import Watchdog
from millpond.launch.followers import GroupPlan
from millpond.launch.group import EngineGroup
from millpond.observe.log import fields
from millpond.types import ErrorKind, ModelInfo, PrefixReport, Request, Salt

log = logging.getLogger("millpond.client")

ENGINE_COMMAND = python("-m", "millpond.engine")
FIRST_DELAY = 0.2
LONGEST_DELAY = 10.0
MOST_FAILURES = 5
RESTART_WINDOW = 600.0
"""Seconds in which engines that had been ready may die so many times."""
WATCH_SECONDS = 0.1
SHUTTING_DOWN = "the server is shutting down"


class EngineClient:
    """The engine as the front end sees it.

    ``command`` is what to run, without its ``--fd N``; ``environment`` is added to ours; ``on_ready`` is called each
    time an engine gets ready. An engine with work that makes no step for ``stall_timeout`` (0: no limit) is killed;
    after ``max_restarts`` deaths within RESTART_WINDOW no other is started. With ``group`` each engine is rank 0 of a
    new group of ranks, and ``command`` what rank 0 runs.
    """

    def __init__(
        self,
        start: wire.Start,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        on_ready: Callable[[ModelInfo], None] | None = None,
        stall_timeout: float = 0.0,
        max_restarts: int = MOST_FAILURES,
        group: GroupPlan | None = None,
    ) -> None:
        self._start = start
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._on_ready = on_ready
        self._stall_timeout = stall_timeout
        self._max_restarts = max_restarts
        self._plan = group
        self._deaths: deque[float] = deque()
        """When the engines died that had been ready; seconds, monotonic."""
        self._silence_seconds = group.layout.silence_seconds if group is not None else 0.0
        self.watchdog = self._new_watchdog()
        self._group: EngineGroup | None = None
        self._task: asyncio.Task[None] | None = None
        self._open = OpenRequests(self._cancel)
        self.counts = self._open.counts
        self._stop_asked = asyncio.Event()
        self._stop_reason = SHUTTING_DOWN
        self._settled = asyncio.Event()
        self._state = EngineState.STARTING
        self._been_ready = False
        self._fatal = ""
        self.reason = ""
        """Why the state is restarting or failed."""
        self.info: ModelInfo | None = None
        self.beat: wire.Beat | None = None
        self._beat_time = 0.0
        self.stage: wire.Loading | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def _stopping(self) -> bool:
        return self._stop_asked.is_set()

    @property
    def pid(self) -> int | None:
        return self._group.pid if self._group is not None else None

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all processes on this machine that work or stand for a rank, rank 0's first."""
        return self._group.pids if self._group is not None else ()

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the engine makes a step."""
        return self.counts.restarts, self.beat.step if self.beat is not None else 0

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def snapshot(self) -> EngineSnapshot:
        """All that is known of the engine now."""
        return EngineSnapshot(
            state=self._state,
            info=self.info,
            stage=self.stage,
            beat=self.beat,
            beat_age=time.monotonic() - self._beat_time if self.beat is not None else None,
            stuck_seconds=self.watchdog.stuck_seconds,
            open_requests=len(self._open),
            counts=deepcopy(self.counts),
        )

    async def start(self) -> None:
        """Start the process and its supervision; loading goes on in the background. Raises OSError."""
        if self._task is not None:
            raise RuntimeError("this engine client was started before")
        try:
            group = await self._spawn()
        except OSError as error:
            self.reason = f"it could not be started: {error.strerror}"
            self._set_state(EngineState.FAILED)
            raise
        self._task = asyncio.create_task(self._supervise(group), name="engine-supervisor")

    async def settled(self) -> None:
        """Wait until the engine is ready, or until it is certain that it will not be. Raises EngineUnavailable."""
        while self._state is not EngineState.READY:
            if self._state in (EngineState.FAILED, EngineState.STOPPED):
                raise EngineUnavailable(self.whole_reason())
            self._settled.clear()
            await self._settled.wait()

    async def gone(self) -> None:
        """Wait until supervision is over: stopped, or failed for good."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def stop(self, patience: float = 5.0, why: str = SHUTTING_DOWN) -> None:
        """Fail what is open, ask the engine to exit, wait ``patience`` seconds, then make it. Safe to repeat."""
        self._stop_reason = why
        self._stop_asked.set()
        self.fail_all(EngineError(ErrorKind.UNAVAILABLE, why))
        if self._group is not None:
            self._group.send(wire.Stop())
        await self._supervised_within(patience)
        if self._group is not None:
            self._group.terminate()
        await self._supervised_within(1.0)
        self.kill()
        await self.gone()
        self._set_state(EngineState.STOPPED)

    async def _supervised_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), seconds)

    def kill(self) -> None:
        """End the engine, and every rank of it, this instant; for a forced exit of the front end."""
        if self._group is not None:
            self._group.kill()

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Hand one request to the engine. An id is never used twice: late messages about the first would be taken for
        the second. Raises EngineUnavailable, ValueError for an id that is open.
        """
        if self._state is not EngineState.READY or self._group is None or self._stopping:
            raise EngineUnavailable(self.whole_reason())
        if request.id in self._open:
            raise ValueError(f"request id {request.id!r} is in use")
        self._group.send(wire.Submit(request))
        return self._open.add(request.id)

    async def explain(self, tokens: list[int], cache_salt: Salt) -> PrefixReport:
        """What the prefix cache would do for a prompt. Raises EngineUnavailable, EngineError."""
        if self._state is not EngineState.READY or self._group is None or self._stopping:
            raise EngineUnavailable(self.whole_reason())
        name = uuid.uuid4().hex
        self._group.send(wire.Explain(name, tokens, cache_salt))
        return await self._open.explanation(name)

    def fail_all(self, error: EngineError) -> None:
        """End every open request with ``error`` and tell the engine to drop them."""
        self._open.drop_all(error)

    def _cancel(self, request_id: str) -> None:
        if self._group is not None:
            self._group.send(wire.Cancel(request_id))

    def unavailable_reason(self) -> str:
        """Why no request is taken now, for anybody who asks: without paths."""
        return public(self.whole_reason())

    def whole_reason(self) -> str:
        """The same for whoever runs the server."""
        if self._stopping or self._state is EngineState.STOPPED:
            return self._stop_reason
        if self._state is EngineState.STARTING:
            stage = self.stage
            return f"the model is loading ({stage.stage}, {stage.fraction:.0%})" if stage else "the engine is starting"
        if self._state is EngineState.RESTARTING:
            return f"the engine is restarting: {self.reason}"
        return f"the engine failed: {self.reason}"

    # --- supervision --------------------------------------------------------------------------------------------

    async def _supervise(self, group: EngineGroup) -> None:
        """Own the process until stopped or until trying again makes no sense."""
        try:
            await self._keep_running(group)
        except Exception as error:
            # Without its supervisor nothing would ever answer the open requests: say so and let serve end.
            log.exception("engine supervision failed")
            self._open.fail_all(EngineError(ErrorKind.UNAVAILABLE, "the engine is not supervised any more"))
            self._give_up(f"its supervision failed: {type(error).__name__}")

    async def _keep_running(self, group: EngineGroup | None) -> None:
        failures = 0
        while True:
            failures = 0 if await self._run(group) else failures + 1
            if self._stopping:
                return
            hopeless = self._fatal and self.reason.startswith(self._fatal) and not self._been_ready
            if hopeless or (self._plan and not self._plan.layout.restarts):
                self._give_up(self.reason)
                return
            if failures >= MOST_FAILURES:
                self._give_up(f"{self.reason} ({failures} starts in a row)")
                return
            if failures == 0 and self._dies_too_often():
                self._give_up(f"{self.reason} ({len(self._deaths)} deaths within {RESTART_WINDOW:g} s)")
                return
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** max(0, failures - 1))
            log.warning("engine lost, starting another", extra=fields(reason=self.reason, delay_s=delay))
            self._set_state(EngineState.RESTARTING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_asked.wait(), delay)
                return
            self.counts.restarts += 1
            try:
                group = await self._spawn()
            except OSError as error:
                self.reason = f"it could not be started: {error.strerror}"
                group = None

    def _dies_too_often(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        return len(self._deaths) > self._max_restarts

    async def _spawn(self) -> EngineGroup:
        self._fatal = ""
        self.stage = None
        self.beat = None
        group = await EngineGroup.spawn(self._command, self._environment, self._start, self._plan)
        if self._stopping:
            group.send(wire.Stop())
        self._group = group
        return group

    async def _run(self, group: EngineGroup | None) -> bool:
        """Read messages until the engine is gone, then clean up. True when it was ready at some time."""
        if group is None:
            return False
        was_ready = False
        wrong = ""
        watch = asyncio.create_task(self._watch(group), name="engine-watchdog")
        try:
            while (message := await group.receive()) is not None:
                self._apply(message)
                was_ready = was_ready or self._state is EngineState.READY
        except wire.WireError as error:
            wrong = f"it sent a message that cannot be read: {error}"
            group.give_up()
        finally:
            watch.cancel()
            if self._state is EngineState.READY:
                self._set_state(EngineState.RESTARTING)
            self._open.fail_all(EngineError(ErrorKind.DIED, "the engine process died while working on this request"))
            ending = await group.end(self._fatal)
            self._group = None
            stalled = watch.result() if watch.done() and not watch.cancelled() else ""
            self.reason = wrong or stalled or ending
        return was_ready

    async def _watch(self, group: EngineGroup) -> str:
        """Kill the process when it hangs; returns what was wrong."""
        pause = max(WATCH_SECONDS, min(filter(None, (self._stall_timeout, self._silence_seconds)), default=0.0) / 10)
        while True:
            before = time.monotonic()
            await asyncio.sleep(pause)
            if time.monotonic() - before > 2 * pause:
                self.watchdog.pardon()
            wrong = self.watchdog.verdict() if self._state is EngineState.READY else ""
            if wrong:
                log.error("engine stalled, killing it", extra=fields(reason=wrong))
                group.give_up()
                return wrong

    def _apply(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Deltas(items):
                for delta in items:
                    self._open.deliver(delta)
            case wire.Beat():
                self.beat = message
                self.watchdog.beat(message, len(self._open))
                self._beat_time = time.monotonic()
            case wire.Failed(request_id, kind, text):
                self._open.fail(request_id, EngineError(kind, text))
            case wire.Explained(name, report):
                self._open.explained(name, report)
            case wire.Loading():
                self.stage = message
            case wire.Ready(info):
                self._become_ready(info)
            case wire.Fatal(text):
                self._fatal = text

    def _become_ready(self, info: ModelInfo) -> None:
        self.info = info
        self.stage = None
        self.reason = ""
        self._been_ready = True
        self.watchdog = self._new_watchdog()
        self._set_state(EngineState.READY)
        if self._on_ready is not None:
            self._on_ready(info)

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(self._stall_timeout, silence=self._silence_seconds)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._set_state(EngineState.FAILED)
        log.error("engine failed", extra=fields(reason=reason))

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._settled.set()
