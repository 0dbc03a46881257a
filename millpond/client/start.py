"""An engine as ``millpond serve`` is set to run it: what it is told first, and how it is watched."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from millpond import wire
from millpond.client.engine import ENGINE_COMMAND, EngineClient
from millpond.config import ServeConfig
from millpond.launch.followers import RANK_COMMAND, GroupPlan
from millpond.observe.log import fields
from millpond.types import ModelInfo

log = logging.getLogger("millpond.serve")


def start_message(config: ServeConfig, model_path: str, draft_path: str, label: str) -> wire.Start:
    """What to load and within which limits. ``draft_path`` is empty without a draft model; ``label`` is what
    the SSD tier calls the model."""
    return wire.Start(
        model_path=model_path,
        context_length=config.context_length,
        max_batch=config.max_batch,
        max_itl_ms=config.max_itl_ms,
        prefill_chunk=config.prefill_chunk,
        kv_memory_bytes=config.kv_memory_mb * 2**20,
        wired_bytes=None if config.wired_memory_mb is None else config.wired_memory_mb * 2**20,
        packing=config.packing,
        deterministic=config.deterministic == "on",
        prefix=config.prefix_settings(label),
        spec=config.spec_settings(draft_path),
    )


def engine_client(
    config: ServeConfig, start: wire.Start, group: GroupPlan | None = None, command: Sequence[str] = ()
) -> EngineClient:
    """The client of an engine yet to be started. With ``group`` it is rank 0 of a group of ranks; ``command`` is what
    it runs, unless it is Millpond's own."""
    return EngineClient(
        start,
        command=command or (RANK_COMMAND if group is not None else ENGINE_COMMAND),
        environment=config.log_environment,
        on_ready=_log_ready,
        stall_timeout=config.stall_timeout,
        max_restarts=config.max_restarts,
        group=group,
    )


def _log_ready(info: ModelInfo) -> None:
    told = fields(
        lane=info.lane,
        lane_reason=info.lane_reason or None,
        device=info.device,
        blas=info.blas or None,
        dtype=info.dtype,
        context=info.context_length,
        rows=info.max_batch,
        fingerprint=info.fingerprint[:12],
        prefix_cache=info.prefix_cache or None,
        prefix_cache_reason=info.prefix_cache_reason or None,
        speculation="+".join(info.speculation) or None,
        speculation_reason=info.speculation_reason or None,
    )
    log.info("engine ready", extra=told)
