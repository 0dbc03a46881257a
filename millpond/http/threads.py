"""Threads for work that must not run on the event loop and that nothing can interrupt: templates and tokenizers, and
bodies that are large.

The standard pool waits for its threads when the interpreter exits, so that one endless template would keep a stopped
server alive. These are daemons. What was worked on is let go as soon as it is done.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from millpond.grammar.levels import deep_stacks

T = TypeVar("T")


@dataclass(slots=True)
class _Task(Generic[T]):
    """Work and who waits for it; neither once it has been run."""

    work: Callable[[], T] | None
    future: Future[T] | None

    def run(self) -> None:
        # An error holds the frames that it went through and those that had called them. If one of them held the
        # future, which holds the error, all of the work would stay until a garbage collection.
        work, future = self.work, self.future
        self.work = self.future = None
        try:
            if work is not None and future is not None and future.set_running_or_notify_cancel():
                future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it, whatever it is
            if future is not None:
                future.set_exception(error)
        finally:
            del work, future


@dataclass(order=True, slots=True)
class _Job:
    """The lowest goes first."""

    rank: int
    number: int
    run: Callable[[], None] | None = field(compare=False)
    """None: the thread is to end."""


class Threads:
    """A few of them, which take work in order, the urgent first."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        with deep_stacks():
            for thread in self._threads:
                thread.start()

    def submit(self, work: Callable[[], T], *, urgent: bool = True) -> Future[T]:
        """Run ``work`` as soon as a thread is free. Cancelled before that, it is not run. Any thread."""
        future: Future[T] = Future()
        self._put(0 if urgent else 1, _Task(work, future).run)
        return future

    def close(self) -> None:
        """Take no more work; what runs is left to itself. Does not wait."""
        for _ in self._threads:
            self._put(2, None)

    def _put(self, rank: int, run: Callable[[], None] | None) -> None:
        self._jobs.put(_Job(rank, next(self._numbers), run))

    def _work(self) -> None:
        while (run := self._jobs.get().run) is not None:
            run()
