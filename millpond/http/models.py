"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from millpond.client.public import public
from millpond.http.service import Service


async def list_models(request: Request) -> Response:
    """The one model there is, as a list."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def get_model(request: Request) -> Response:
    """One model by any of its names. Raises ApiError 404."""
    service: Service = request.app.state.service
    service.names.check(request.path_params["model"] or "/")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, object]:
    model: dict[str, object] = {
        "id": service.names.served,
        "object": "model",
        "created": service.created,
        "owned_by": "millpond",
    }
    info = service.client.info
    if info is not None:
        model["max_model_len"] = info.context_length
        model["millpond"] = {
            "lane": info.lane,
            "lane_reason": _told(info.lane_reason),
            "cache_kinds": info.cache_kinds,
            "dtype": info.dtype,
            "device": info.device,
            "blas": info.blas,
            "max_rows": info.max_rows,
            "ranks": info.ranks,
            "kv_bytes_per_token": info.kv_bytes_per_token,
            "kv_format": info.kv_format,
            "sampling_defaults": dict(service.sampling),
            "fingerprint": info.fingerprint,
            "prefix_cache": info.prefix_cache,
            "prefix_cache_reason": _told(info.prefix_cache_reason),
            "speculation": info.speculation,
            "speculation_reason": _told(info.speculation_reason),
            "remarks": [_told(remark) for remark in info.remarks],
        }
    return model


def _told(reason: str) -> str:
    return public(reason) if reason else ""
