"""GET /livez (this process answers), /readyz (requests are welcome) and /health (how it goes, with numbers)."""

from __future__ import annotations

import asyncio
import threading

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from millpond.client.state import EngineSnapshot
from millpond.http.errors import RETRY_AFTER
from millpond.http.front_end import front_end_of
from millpond.http.snapshot import Snapshot

SERVING = ("ok", "degraded", "overloaded")


async def livez(_request: Request) -> Response:
    """Always 200."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """200, or 503 with the reasons."""
    reasons = front_end_of(request).model.not_ready()
    if reasons:
        return JSONResponse({"status": "not ready", "reasons": reasons}, 503, RETRY_AFTER)
    return JSONResponse({"status": "ready"})


async def health(request: Request) -> Response:
    """200 while requests are served, 503 otherwise; the body has the numbers either way."""
    now = front_end_of(request).snapshot()
    serving = now.status in SERVING
    beat = now.model.engine.beat
    body = {
        "status": now.status,
        "reasons": now.reasons,
        "engine": _engine(now.model.engine),
        "requests": _requests(now),
        "process": {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count()},
        "prefix_cache": msgspec.to_builtins(beat.prefix) if beat else None,
    }
    return JSONResponse(body, 200 if serving else 503, None if serving else RETRY_AFTER)


def _engine(now: EngineSnapshot) -> dict[str, object]:
    beat, stage, age = now.beat, now.stage, now.beat_age
    return {
        "state": now.state.value,
        "stage": stage.stage if stage else None,
        "fraction": stage.fraction if stage else None,
        "restarts": now.counts.restarts,
        "beat_age_seconds": round(age, 3) if age is not None else None,
        "step": beat.step if beat else None,
        "stuck_seconds": round(now.stuck_seconds, 3) if beat else None,
        "wait_seconds": round(beat.wait_seconds, 3) if beat else None,
        "running": beat.running if beat else None,
        "waiting": beat.waiting if beat else None,
        "kv_bytes": beat.kv_bytes if beat else None,
    }


def _requests(now: Snapshot) -> dict[str, object]:
    counts = now.model.engine.counts
    return {
        "held": now.held,
        "submitted": counts.submitted,
        "finished": counts.finished,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "running": now.model.engine.open_requests,
        "unknown_fields": now.unknown_fields,
    }
