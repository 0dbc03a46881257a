"""What happens when a forward raises, or leaves numbers that are not finite: one request pays, its neighbours do not.

Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

import mlx.core as mx

from millpond.engine.executor import Executor
from millpond.engine.group import GroupBroken
from millpond.engine.requests import Requests
from millpond.engine.sequence import Health, Status
from millpond.engine.speculation import Speculator
from millpond.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)

MOST_COMMON_FAILURES = 3
"""Forwards over several prompts that may fail; then it is them, not the prompts."""


class Recovery:
    """What the engine loop calls when something has gone wrong that is not known to be about one request alone."""

    def __init__(self, scheduler: Scheduler, executor: Executor, speculator: Speculator, requests: Requests) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._speculator = speculator
        self._requests = requests
        self._common_failures = 0
        """Forwards over several prompts that have raised."""

    def restore_failed(self, name: str, error: Exception) -> None:
        """Restoring the prefix of a prompt raised: only its request needs what failed. Raises GroupBroken as it is."""
        if isinstance(error, GroupBroken):
            raise error
        log.error("restoring the prefix of request %s failed", name, exc_info=error)
        self._requests.end(name, error)

    def chunk_failed(self, name: str, error: Exception) -> None:
        """A chunk of a prompt raised: only its request needs what failed. Raises GroupBroken where there are other
        ranks, because nobody knows how far they have come."""
        if self._executor.group.world > 1:
            raise GroupBroken(f"a forward failed on rank 0: {error}") from error
        log.error("prefill of request %s failed", name, exc_info=error)
        self._requests.end(name, error)

    def read_failed(self, names: Sequence[str], error: Exception) -> None:
        """A forward over chunks of these prompts raised: of several nobody knows which is to blame, and each is read
        again, alone. Raises GroupBroken as above."""
        if len(names) == 1 or self._executor.group.world > 1:
            self.chunk_failed(names[0], error)
            return
        log.error("reading %d prompts together failed", len(names), exc_info=error)
        self._common_failures += 1
        if self._common_failures >= MOST_COMMON_FAILURES:
            log.warning("prompts are read one by one from now on")
            self._scheduler.together = False
        now = time.monotonic()
        for name in names:
            self._executor.set_aside(name)
            self._scheduler.requeue(name, len(self._executor.sequences[name].tokens), now, apart=True)

    def step_failed(self, error: Exception, *, guessed: bool) -> None:
        """A decode step raised: rebuild the batch, and find the row that is to blame.

        A lone row is to blame, and so is a row on probation. Otherwise nobody is known to be: all rows are recomputed
        and join again one by one, on probation until a step has succeeded with them. With draft tokens in it
        (``guessed``) the step may have failed because of those: its rows go on without. Raises GroupBroken where there
        are other ranks.
        """
        log.error("decode step with %d rows failed", len(self._executor.batch), exc_info=error)
        with suppress(Exception):  # told already
            mx.synchronize()  # an earlier step may still be writing into the rows that are given up here
        rows = self._executor.rebuild()
        suspects = [name for name in rows if name in self._scheduler.suspects]
        guilty = rows[0] if len(rows) == 1 else suspects[0] if len(suspects) == 1 else None
        if guessed:
            guilty = None
            self._speculator.failed(rows)
        now = time.monotonic()
        for name in rows:
            tokens = len(self._executor.sequences[name].tokens)
            self._scheduler.requeue(name, tokens, now, probation=guilty is None and not guessed)
        if guilty is not None:
            self._requests.end(guilty, error)

    def step_read(self, rows: tuple[str, ...]) -> None:
        """Compute rows again that a step with draft tokens has spoilt: plain decoding might never meet such numbers."""
        for name in rows:
            sequence = self._executor.sequences[name]
            if sequence.health is not Health.SPOILT:
                continue
            self._speculator.stop(name)
            if sequence.status is Status.ENDED:
                continue  # its row is zeroed when it is freed
            log.warning("a step with draft tokens gave numbers that are not finite; request %s goes on without", name)
            self._executor.set_aside(name)
            self._scheduler.requeue(name, len(sequence.tokens), time.monotonic())
