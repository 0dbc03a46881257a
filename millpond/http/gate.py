"""Who is let in: length announced, Host, Origin and API key, in that order, before a request's body is read.

The probes are open to everybody who may connect. Whose key a request showed is in its context when it passes.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from millpond.http.body import check_declared
from millpond.http.context import context_of
from millpond.http.errors import ApiError, shown
from millpond.http.keys import Keys

OPEN = ("/livez", "/readyz", "/health")
"""Paths that need no key."""
ANY_HOST = ("/livez", "/readyz")
"""Paths that answer whatever the Host: orchestrators ask by address, and there is nothing in them worth stealing."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing; a page of another origin cannot read what they answer."""
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")


class Gate:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        hosts: Collection[str],
        origins: Collection[str],
        most_bytes: int,
        apart: bool,
    ) -> None:
        """``hosts``: the names served, lower case; empty: any. A name that begins with *. stands for all below it.
        ``origins``: web pages that may call, * for any. ``most_bytes``: of a body.
        ``apart``: several owners of keys do not share cached prefixes."""
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._origins = origins
        self._most_bytes = most_bytes
        self._apart = apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            context = context_of(scope)
            try:
                check_declared(_header(scope, b"content-length"), self._most_bytes)
                self._check_host(scope)
                self._check_origin(scope)
                context.owner = self._owner(scope)
                context.tenant = context.owner if self._apart and self._keys.several else ""
            except ApiError as error:
                context.refused = error.code
                await context.refuse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        if not self._hosts or scope["path"] in ANY_HOST:
            return
        host = host_name(_header(scope, b"host").decode("latin-1"))
        if host not in self._hosts and not any(_below(host, allowed) for allowed in self._hosts):
            message = f"host: {shown(host)} is not served here; --allowed-hosts says what is"
            raise ApiError(403, message, param="host", code="host_not_allowed")

    def _check_origin(self, scope: Scope) -> None:
        """A browser sends a page's plain POST anywhere, without asking first: the page could not read the answer, but
        the work would be done. What is no browser says nothing about origins and passes."""
        origin = _header(scope, b"origin").decode("latin-1")
        if scope["method"] in SAFE or not origin or "*" in self._origins or origin.lower() in self._origins:
            return
        host = _header(scope, b"host").decode("latin-1")
        same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        if not same and _header(scope, b"sec-fetch-site") not in (b"same-origin", b"none"):
            message = f"origin: {shown(origin)} may not call this server; --cors-origins says what may"
            raise ApiError(403, message, param="origin", code="origin_not_allowed")

    def _owner(self, scope: Scope) -> str:
        if not self._keys or scope["path"] in OPEN:
            return ""
        words = _header(scope, b"authorization").split(None, 1)
        bearer = words[1].rstrip() if len(words) == 2 and words[0].lower() == b"bearer" else b""
        key = bearer or _header(scope, b"x-api-key")
        owner = self._keys.owner(key) if key else None
        if owner is None:
            said = "the API key is not valid" if key else "an API key is required: Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner


def served_hosts(allowed: Collection[str], bound: str, loopback: bool) -> frozenset[str]:
    """The hosts to serve: those given, else the local names when only this machine can connect, else any."""
    if "*" in allowed:
        return frozenset()
    if allowed:
        return frozenset(host_name(host) for host in allowed)
    return LOCAL_HOSTS | {host_name(bound)} if loopback else frozenset()


def host_name(text: str) -> str:
    """What a Host header names: without its port, lower case, without the dot that may end a name. What makes no sense
    stays as it is: it is nobody's name."""
    whole = text.strip().lower()
    match = _HOST.fullmatch(whole)
    return (match["address"] or match["name"] or "").removesuffix(".") if match else whole


def _header(scope: Scope, name: bytes) -> bytes:
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found


def _below(host: str, allowed: str) -> bool:
    return allowed.startswith("*.") and host.endswith(allowed[1:])
