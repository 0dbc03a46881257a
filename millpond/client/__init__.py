"""The front end's handle on the engine, one process or several ranks: submit, stream, cancel, supervise, restart.

Runs on the front end's event loop; nothing here imports mlx.
"""

from __future__ import annotations

from millpond.client.engine import ENGINE_COMMAND, EngineClient
from millpond.client.state import EngineState
from millpond.client.stream import EngineError, EngineUnavailable, Stream

__all__ = ["ENGINE_COMMAND", "EngineClient", "EngineError", "EngineState", "EngineUnavailable", "Stream"]
