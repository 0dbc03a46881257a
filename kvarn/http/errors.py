"""The one shape in which every refusal and failure leaves the server.

``{"error": {"message", "type", "param", "code"}}`` with a real HTTP status. Messages about a field name it, its value
and what is allowed; none contains a file path or a stack trace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvarn.client import EngineError
from kvarn.types import ErrorKind

RETRY_AFTER = {"Retry-After": "1"}
LONGEST_SHOWN = 80
_PATH = re.compile(r"(?<![\w/])(?:/[\w.@+-]+){2,}/?")


class ApiError(Exception):
    """A request that gets an error status. ``param`` is the field at fault, ``code`` a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON body."""
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def shown(value: object) -> str:
    """A value as it may stand in a message: JSON, short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"


def bad_value(param: str, value: object, allowed: str, *, code: str = "invalid_value") -> ApiError:
    """400 for a value outside of what is allowed."""
    return ApiError(400, f"{param}: must be {allowed}, got {shown(value)}", param=param, code=code)


def missing(param: str, allowed: str) -> ApiError:
    """400 for a required field that is absent."""
    return ApiError(400, f"{param}: is required and must be {allowed}", param=param, code="missing_parameter")


def unsupported(param: str, value: object, allowed: str) -> ApiError:
    """400 for something with a meaning that this server does not implement."""
    message = f"{param}: {shown(value)} is not supported by this server; allowed is {allowed}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unavailable(reason: str) -> ApiError:
    """503: try again later."""
    return ApiError(503, reason, code="unavailable", headers=RETRY_AFTER)


def from_engine(error: EngineError) -> ApiError:
    """The status for a request that the engine did not answer."""
    match error.kind:
        case ErrorKind.INVALID:
            return ApiError(400, public(error.message), code=error.kind.value)
        case ErrorKind.UNAVAILABLE:
            return unavailable(public(error.message))
        case ErrorKind.ENGINE | ErrorKind.DIED:
            return ApiError(500, public(error.message), code=error.kind.value)


def public(message: str) -> str:
    """A message from inside, cut to its first line and freed of file paths."""
    lines = message.strip().splitlines()
    first = lines[0] if lines else "unknown error"
    return _PATH.sub("…", first)[:300]


async def on_api_error(_request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = shown(request.url.path)
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {path}", code="not_found").response()
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not allowed at {path}; allowed is {allow}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()
