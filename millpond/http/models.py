"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from millpond.client.public import public
from millpond.http.front_end import front_end_of
from millpond.http.served_model import ServedModel

ANTHROPIC = "anthropic-version"
"""The header with which clients of that API say so."""


async def list_models(request: Request) -> Response:
    """The one model there is, as a list; as Anthropic's API has it where a client names that API's version."""
    model = front_end_of(request).model
    if ANTHROPIC in request.headers:
        name = model.names.served
        return JSONResponse({"data": [_named(model)], "has_more": False, "first_id": name, "last_id": name})
    return JSONResponse({"object": "list", "data": [_shown(model)]})


async def get_model(request: Request) -> Response:
    """One model by any of its names. Raises ApiError 404."""
    model = front_end_of(request).model_for(request.path_params["model"] or "/")
    return JSONResponse(_named(model) if ANTHROPIC in request.headers else _shown(model))


def _named(model: ServedModel) -> dict[str, object]:
    """As Anthropic's API has it."""
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": model.names.served, "display_name": model.names.served, "created_at": created}


def _shown(model: ServedModel) -> dict[str, object]:
    shown: dict[str, object] = {
        "id": model.names.served,
        "object": "model",
        "created": model.created,
        "owned_by": "millpond",
    }
    info = model.client.info
    if info is not None:
        shown["max_model_len"] = info.context_length
        shown["millpond"] = {
            "lane": info.lane,
            "lane_reason": _told(info.lane_reason),
            "cache_kinds": info.cache_kinds,
            "dtype": info.dtype,
            "device": info.device,
            "blas": info.blas,
            "max_rows": info.max_batch,
            "ranks": info.ranks,
            "kv_bytes_per_token": info.kv_bytes_per_token,
            "kv_format": info.kv_format,
            "sampling_defaults": dict(model.sampling),
            "fingerprint": info.fingerprint,
            "prefix_cache": info.prefix_cache,
            "prefix_cache_reason": _told(info.prefix_cache_reason),
            "speculation": info.speculation,
            "speculation_reason": _told(info.speculation_reason),
            "row_counts_alike": info.alike,
            "deterministic": info.deterministic,
            "grammars": _told(info.grammars),
            "embedding_size": info.embedding_size,
            "embedding_reason": _told(info.embedding_reason),
            "remarks": [_told(remark) for remark in info.remarks],
        }
    return shown


def _told(reason: str) -> str:
    return public(reason) if reason else ""
