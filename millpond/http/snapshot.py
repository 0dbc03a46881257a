"""The state of a serving process at one moment, for health, metrics and whoever else shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.client.state import EngineSnapshot
from millpond.http.meters import Meters


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """What is the model's own."""

    name: str
    engine: EngineSnapshot
    meters: Meters


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the process has once, and its model."""

    status: str
    """One word: ok, degraded, overloaded, starting, restarting, stopped, failed or shutting_down."""
    reasons: Sequence[str]
    """Why requests are refused now; empty when they are welcome."""
    held: int
    """Answers that hold a place."""
    most_held: int
    """How many may."""
    unknown_fields: int
    refusals: Mapping[tuple[int, str], int]
    """HTTP requests turned away before anything was submitted, by status and error code."""
    model: ModelSnapshot
