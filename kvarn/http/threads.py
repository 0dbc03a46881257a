"""Threads for work that must not run on the event loop and that nothing can interrupt: templates and tokenizers.

The standard pool waits for its threads when the interpreter exits, so that one endless template would keep a stopped
server alive. These are daemons.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """A few of them, which take work in order."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` as soon as a thread is free. Cancelled before that, it is not run. Any thread."""
        future: Future[T] = Future()
        self._jobs.put(lambda: _run(work, future))
        return future

    def close(self) -> None:
        """Take no more work; what runs is left to itself. Does not wait."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _run(work: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it, whatever it is
            future.set_exception(error)
