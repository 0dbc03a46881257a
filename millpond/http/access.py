"""The outermost layer: request ids, one log line per request, and the last resort for unexpected exceptions.

An id comes from the client's x-request-id when it is short and printable, else it is made here, and goes back in the
response either way, also under the name that Anthropic's clients know. What else the log line says, whoever served the
request noted in its context.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millpond.client import EngineError
from millpond.http.context import RequestContext, context_of
from millpond.http.errors import ApiError
from millpond.http.front_end import FrontEnd
from millpond.http.rendering import Rendering
from millpond.observe.log import fields

log = logging.getLogger("millpond.http")

LONGEST_ID = 128
QUIET = ("/livez", "/readyz", "/health", "/metrics")


class AccessLayer:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, renderings: Mapping[str, Rendering]) -> None:
        """``renderings``: the APIs by their paths."""
        self._app = app
        self._renderings = renderings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _leave_out_the_host(scope)
        _single_slashes(scope)
        _single_version(scope)
        context = context_of(scope)
        context.id = _request_id(scope)
        if (rendering := self._renderings.get(scope["path"])) is not None:
            context.render_error = rendering.refuse
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name, context.id.encode()) for name in (b"x-request-id", b"request-id")]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        start = time.monotonic()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            context.left = context.left or "gone"
        except asyncio.CancelledError:
            context.left = "cut off"
            raise
        except Exception:
            # Nothing above would answer in the API's error shape; the trace goes to the log, never to the client.
            log.exception("unexpected error", extra=fields(request=context.id))
            if not status:
                error = ApiError(500, "internal error; the server's log says more", code="internal_error")
                await context.refuse(error)(scope, receive, send_with_id)
        finally:
            _count(scope, context)
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            base = {"id": context.id, "method": scope["method"], "path": scope["path"], "status": status or None}
            elapsed = round(time.monotonic() - start, 4)
            log.log(level, "request", extra=fields(**base, seconds=elapsed, **context.log_fields()))


def _count(scope: Scope, context: RequestContext) -> None:
    """Count a refusal. What the engine failed was submitted, and is counted there."""
    error, context.error = context.error, None  # a connection keeps its last scope
    if error is not None and not isinstance(error.__cause__, EngineError):
        front: FrontEnd = scope["app"].state.front_end
        front.refusals[error.status, error.code or "other"] += 1


def _leave_out_the_host(scope: Scope) -> None:
    """A client may ask for a whole URI, as it would ask a proxy (RFC 9112, 3.2.2)."""
    if scope["path"].lower().startswith(("http://", "https://")):
        with suppress(ValueError):  # brackets that do not match: nothing is found there
            scope["path"] = urlsplit(scope["path"]).path or "/"


def _single_slashes(scope: Scope) -> None:
    """A client's base address may end with a slash, and what is put behind it begin with one."""
    while "//" in scope["path"]:
        scope["path"] = scope["path"].replace("//", "/")


def _single_version(scope: Scope) -> None:
    """A client's base address may end with what it puts before each path itself."""
    while scope["path"].startswith("/v1/v1/"):
        scope["path"] = scope["path"].removeprefix("/v1")


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= LONGEST_ID and all(32 < byte < 127 for byte in value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex
