"""What the engine counts and times of its own work, for /metrics. Engine thread only.

A step lasts from the begin of its plan's execution, or the end of the step before it if that came later, until its
tokens are read.
"""

from __future__ import annotations

from millpond.observe.histogram import ROWS, SECONDS, STEP_TOKENS, Histogram
from millpond.types import EngineCounters, PrefillChunk, SpecCounters


class EngineStats:
    """Since the engine's start."""

    def __init__(self) -> None:
        self._prefill_tokens = 0
        self._drawn_tokens = 0
        self._preemptions = 0
        self._failed_steps = 0
        self._seconds = Histogram(SECONDS)
        self._rows = Histogram(ROWS)
        self._tokens = Histogram(STEP_TOKENS)
        self._read_in_step = 0
        """Prompt tokens that the step under way has read besides those in its rows. A step with prompts is never
        dispatched before the one ahead of it is over, so they belong to the next step that ends."""

    def preempted(self, requests: int) -> None:
        """So many requests lost what was computed of them."""
        self._preemptions += requests

    def chunk(self, chunk: PrefillChunk) -> None:
        """A chunk of a prompt has been read. The prompt's last token is read in a row, by the step's decode forward."""
        self._read_in_step += chunk.end - chunk.start
        self._prefill_tokens += chunk.end - chunk.start + chunk.last

    def step(self, seconds: float, rows: int, drawn: int, drafts: int = 0) -> None:
        """A step is over; ``rows`` were in its decode forward, with so many ``drafts`` to verify, which drew ``drawn``
        tokens for requests still there."""
        self._drawn_tokens += drawn
        self._seconds.observe(seconds)
        self._rows.observe(rows)
        self._tokens.observe(self._read_in_step + rows + drafts)
        self._read_in_step = 0

    def failed(self) -> None:
        """A step's decode forward has failed."""
        self._failed_steps += 1
        self._read_in_step = 0

    def counters(self, spec: SpecCounters) -> EngineCounters:
        """What has been counted so far, with what guessing did; later events do not change it."""
        return EngineCounters(
            prefill_tokens=self._prefill_tokens,
            drawn_tokens=self._drawn_tokens,
            preemptions=self._preemptions,
            failed_steps=self._failed_steps,
            step_seconds=self._seconds.distribution(),
            step_rows=self._rows.distribution(),
            step_tokens=self._tokens.distribution(),
            spec=spec,
        )
