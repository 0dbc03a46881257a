"""How a server is reached: as the environment says of proxies, but this machine's own always directly.

A proxy would be shown prompts and keys, and could not reach a server on loopback anyway.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from typing import TypedDict

import httpx


class Unusable(Exception):  # noqa: N818 - it names what is wrong
    """The environment says something that cannot be used; the message names the variable, and shows no key."""


class ClientOptions(TypedDict):
    """Arguments of an httpx client."""

    base_url: str
    headers: dict[str, str]
    trust_env: bool
    verify: ssl.SSLContext | bool


def connection(url: str, key: str = "") -> ClientOptions:
    """To the server at ``url``, with or without its ``/v1``. Raises Unusable for proxies that cannot be used."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if is_local(base):
        # The environment may still name the certificates to trust.
        verify = httpx.create_ssl_context() if base.lower().startswith("https:") else True
        return ClientOptions(base_url=base, headers=headers, trust_env=False, verify=verify)
    try:
        httpx.Client(base_url=base).close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        why = str(error).partition(". ")[0]
        raise Unusable(f"the proxy that the environment names cannot be used: {why}") from error
    return ClientOptions(base_url=base, headers=headers, trust_env=True, verify=True)


def is_local(url: str) -> bool:
    """Whether an address is one of this machine's loopback, by its name or number alone."""
    host = httpx.URL(url).host.lower().removesuffix(".").partition("%")[0]
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):
        return False
    plain = getattr(address, "ipv4_mapped", None) or address
    return bool(plain.is_loopback or plain.is_unspecified)


def key_from(names: Sequence[str]) -> str:
    """The first API key in these environment variables; empty where there is none. Raises Unusable."""
    for name in names:
        key = os.environ.get(name, "").partition(",")[0].strip()
        if key and not (key.isascii() and key.isprintable()):
            raise Unusable(f"{name}: a key must be printable ASCII characters")
        if key:
            return key
    return ""
