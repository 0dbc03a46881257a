"""What the front end knows of its engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from millpond import wire
from millpond.client.open_requests import Counts
from millpond.types import ModelInfo


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """All of it at one moment."""

    state: EngineState
    info: ModelInfo | None
    """Of the last engine that was ready."""
    stage: wire.Loading | None
    """Only while it loads."""
    beat: wire.Beat | None
    """The last one; None before the first of this process."""
    beat_age: float | None
    """Seconds."""
    stuck_seconds: float
    """For how long there has been work and no step, as far as beats have told."""
    open_requests: int
    counts: Counts
