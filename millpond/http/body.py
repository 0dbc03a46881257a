"""Reading a request's body within a limit on the bytes that really arrive.

Chunked bodies and forged lengths are counted like any other. What is beyond the limit is never kept.
"""

from __future__ import annotations

import asyncio
import codecs

from starlette.requests import Request

from millpond.http.errors import ApiError, shown

DISCARDED = 8
"""So many times what is allowed is read and thrown away, so that a client that is still sending gets to see its 413."""


async def read_body(request: Request, most: int, seconds: float) -> bytearray:
    """The body, of at most ``most`` bytes and within ``seconds`` (0: no limit), without a byte order mark.

    Raises ApiError 413, 408 or 415, ClientDisconnect.
    """
    _check_encoding(request.headers.get("content-encoding", ""))
    try:
        async with asyncio.timeout(seconds or None):
            body = await _read(request, most)
    except TimeoutError:
        message = f"body_timeout: the body did not arrive within {seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
    if body.startswith(codecs.BOM_UTF8):
        del body[: len(codecs.BOM_UTF8)]
    return body


def check_declared(length: bytes, most: int) -> None:
    """Refuse at once a Content-Length beyond what would even be thrown away. Raises ApiError 413."""
    if length.isdigit() and int(length) > DISCARDED * most:
        raise _too_large(most)


def _check_encoding(encoding: str) -> None:
    if encoding.strip().lower() not in ("", "identity"):
        message = f"content-encoding: {shown(encoding)} is not read here; send the body as it is, without compression"
        headers = {"Accept-Encoding": "identity"}
        raise ApiError(415, message, param="content-encoding", code="unsupported_encoding", headers=headers)


async def _read(request: Request, most: int) -> bytearray:
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
    return kept


def _too_large(most: int) -> ApiError:
    message = f"the request's body is larger than the {most} bytes allowed"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
