"""Reading a request's body within a limit on the bytes that really arrive.

Chunked bodies and forged lengths are counted like any other. What is beyond the limit is never kept.
"""

from __future__ import annotations

import pydantic_core
from starlette.requests import Request

from kvarn.http.errors import ApiError, bad_value

BODY_LIMIT = 8 * 1024 * 1024
"""Most bytes of a request's body."""
DISCARD_LIMIT = 64 * 1024 * 1024
"""Most bytes read and thrown away so that a client that is still sending gets to see its 413."""


async def read_json(request: Request) -> dict[str, object]:
    """The body as a JSON object. Raises ApiError 413 or 400, ClientDisconnect."""
    body = await _read(request)
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad_value("body", value, "a JSON object", code="invalid_json")
    return value


async def _read(request: Request) -> bytes:
    if _declared(request) > DISCARD_LIMIT:
        raise _too_large()
    kept = bytearray()
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > DISCARD_LIMIT:
            break
        if size <= BODY_LIMIT:
            kept += part
        else:
            kept.clear()
    if size > BODY_LIMIT:
        raise _too_large()
    return bytes(kept)


def _declared(request: Request) -> int:
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _too_large() -> ApiError:
    message = f"the request's body is larger than the {BODY_LIMIT} bytes allowed"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
