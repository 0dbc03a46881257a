"""Reading a request's body within a limit on the bytes that really arrive.

Chunked bodies and forged lengths are counted like any other. What is beyond the limit is never kept.
"""

from __future__ import annotations

import asyncio

import pydantic_core
from starlette.requests import Request

from kvarn.http.errors import ApiError, bad_value

DISCARDED = 8
"""So many times what is allowed is read and thrown away, so that a client that is still sending gets to see its 413."""


async def read_json(request: Request, most: int, seconds: float) -> dict[str, object]:
    """The body, of at most ``most`` bytes and within ``seconds`` (0: no limit), as a JSON object.

    Raises ApiError 413, 408 or 400, ClientDisconnect.
    """
    try:
        async with asyncio.timeout(seconds or None):
            body = await _read(request, most)
    except TimeoutError:
        message = f"body_timeout: the body did not arrive within {seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad_value("body", value, "a JSON object", code="invalid_json")
    return value


def check_declared(length: bytes, most: int) -> None:
    """Refuse at once a Content-Length beyond what would even be thrown away. Raises ApiError 413."""
    if length.isdigit() and int(length) > DISCARDED * most:
        raise _too_large(most)


async def _read(request: Request, most: int) -> bytes:
    """What really arrives, whatever was announced."""
    kept = bytearray()
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > DISCARDED * most:
            break
        if size <= most:
            kept += part
        else:
            kept.clear()
    if size > most:
        raise _too_large(most)
    return bytes(kept)


def _too_large(most: int) -> ApiError:
    message = f"the request's body is larger than the {most} bytes allowed"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
