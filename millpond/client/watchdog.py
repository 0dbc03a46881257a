"""Tells a slow engine from one that hangs: work without a step, or no word at all, for too long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from millpond.wire import Beat

LEAST_SILENCE = 2.0
"""Seconds without a word that are never too many: beats come twice a second."""


@dataclass
class Watchdog:
    """Fed with every beat of one engine process, from its readiness on. ``clock`` gives monotonic seconds."""

    patience: float
    """Seconds of work without a step, and of silence unless ``silence`` says otherwise; 0: any number."""
    clock: Callable[[], float] = time.monotonic
    silence: float = 0.0
    """Seconds without a word; 0: as ``patience``."""
    _step: int = -1
    _beat_at: float = field(init=False)
    _progress_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._beat_at = self._progress_at = self.clock()

    def beat(self, beat: Beat, open_requests: int) -> None:
        """The engine has reported. ``open_requests`` is what we know it has to do: an engine that hangs in the first
        step of a request has not reported that one yet."""
        now = self._beat_at = self.clock()
        if beat.step != self._step or not beat.running + beat.waiting + open_requests:
            self._step, self._progress_at = beat.step, now

    def pardon(self) -> None:
        """We stood still ourselves: what the engine said meanwhile is still unread."""
        self._beat_at = self._progress_at = self.clock()

    @property
    def stuck_seconds(self) -> float:
        """For how long there has been work and no step."""
        return max(0.0, self.clock() - self._progress_at)

    def verdict(self) -> str:
        """What is wrong, in words; empty when nothing is."""
        now = self.clock()
        silence = self.silence or (max(self.patience, LEAST_SILENCE) if self.patience else 0.0)
        if silence and now - self._beat_at > silence:
            return f"it has not been heard of for {now - self._beat_at:.0f} s"
        if not self.patience:
            return ""
        # As of its last beat: a step made since then has not been told yet.
        without = self._beat_at - self._progress_at
        return f"it has work and made no step for {without:.0f} s" if without > self.patience else ""
