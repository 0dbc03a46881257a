"""The shape in which OpenAI's API says what is wrong: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from millpond.http.errors import ApiError


def error_body(error: ApiError) -> bytes:
    shown = {"message": error.message, "type": _type(error.status), "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": shown})


def error_response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, "application/json")


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
