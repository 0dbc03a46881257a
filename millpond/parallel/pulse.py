"""A thread that tells the other side twice a second that we are alive, and one that notices when it no longer says so.

Two, because whoever speaks may have to wait for the very side that is gone. They go on while a collective blocks the
engine's thread, so what is noticed here is a process that is stopped or a machine that is gone; whether steps are made
is the front end's watchdog's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BEAT_SECONDS = 0.5


class Pulse:
    """``beat`` says that we are alive; ``silence`` is told who has been silent for too long."""

    def __init__(self, beat: Callable[[], None], patience: float, silence: Callable[[int, float], None]) -> None:
        """``patience``: seconds. ``silence``: gets the rank and the seconds, once."""
        self._beat = beat
        self._patience = patience
        self._silence = silence
        self._heard: dict[int, float] = {}
        self._armed = threading.Event()
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._speak, name="pulse", daemon=True).start()
        threading.Thread(target=self._watch, name="pulse-watch", daemon=True).start()

    def heard(self, rank: int) -> None:
        """This rank has just said something."""
        self._heard[rank] = time.monotonic()

    def arm(self) -> None:
        """Silence counts from now on: before, a library may have kept every thread of a rank waiting."""
        self._pardon()
        self._armed.set()

    def stop(self) -> None:
        """Say nothing more, and expect nothing."""
        self._stop.set()

    def _pardon(self) -> None:
        now = time.monotonic()
        for rank in list(self._heard):
            self._heard[rank] = now

    def _speak(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > 2 * BEAT_SECONDS:
                self._pardon()  # we stood still ourselves, and what they said meanwhile is unread
            before = now
            for rank, moment in list(self._heard.items()):
                if self._armed.is_set() and now - moment > self._patience and not self._stop.is_set():
                    self._silence(rank, now - moment)
                    return
