"""The address to serve on: is it free, who has it, and who may come in?"""

from __future__ import annotations

import errno
import ipaddress
import sys
from collections.abc import Iterator

import httpx

from millpond.cli.doctor.finding import Finding, fail, ok, warn
from millpond.cli.given import StartError, read_keys
from millpond.cli.listen import addresses, listen_on, local
from millpond.config import ServeConfig

ASK_SECONDS = 3.0
SHARED = 0o077
"""Permissions of others than the owner."""


def port(config: ServeConfig) -> Finding:
    """Whether the server could listen there."""
    where = f"{config.host} port {config.port}"
    try:
        wanted = addresses(config)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return fail("port", f"{where}: {reason}", "give --host an address or name of this machine")
    try:
        for listener in listen_on(wanted):
            listener.close()
    except OSError as error:
        return _not_free(config, where, str(wanted[0][1][0]), error)
    return ok("port", f"{config.host}: any free port" if config.port == 0 else f"{where} is free")


def _not_free(config: ServeConfig, where: str, host: str, error: OSError) -> Finding:
    if error.errno == errno.EADDRINUSE:
        scheme = "https" if config.tls_certificate else "http"
        status = _millpond_at(f"{scheme}://{_reachable(host)}:{config.port}")
        if status:
            return warn("port", f"{where} is taken by a running Millpond: {status}", "give a second one another --port")
        who = f"ss -ltnp 'sport = :{config.port}'"
        if sys.platform == "darwin":
            who = f"lsof -nP -iTCP:{config.port} -sTCP:LISTEN"
        return fail("port", f"{where} is taken by another program", f"give another --port, or find it: {who}")
    if error.errno == errno.EACCES:
        remedy = "give a --port from 1024, or let millpond service systemd --system make a unit that may"
        return fail("port", f"{where} is not for this account", remedy)
    return fail("port", f"{where}: {error.strerror}", "give --host an address of this machine")


def _reachable(host: str) -> str:
    """The address in a URL; the one that stands for all of them is asked at home."""
    parsed = ipaddress.ip_address(host.partition("%")[0])
    if parsed.is_unspecified:
        return "127.0.0.1" if parsed.version == 4 else "[::1]"
    return f"[{host}]" if parsed.version == 6 else host


def _millpond_at(url: str) -> str:
    """How the Millpond there is doing; empty when there is none."""
    try:
        with httpx.Client(base_url=url, timeout=ASK_SECONDS, verify=False, trust_env=False) as client:  # noqa: S501
            if client.get("/livez").json() != {"status": "ok"}:  # nothing secret is sent, so anybody may answer
                return ""
            health = client.get("/health").json()
            return str(health["status"]) if "engine" in health else ""
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError, KeyError):  # not HTTP, no JSON, other JSON
        return ""


def access(config: ServeConfig) -> Iterator[Finding]:
    """The API keys, and whether anybody can do without."""
    try:
        keys = read_keys(config)
    except StartError as error:
        yield fail("keys", str(error), "write one key per line, or a name and a key, readable for this account")
        return
    file = config.api_key_file
    if file is not None and file.stat().st_mode & SHARED:
        yield warn("keys", f"{file} can be read by other accounts", f"chmod 600 {file}")
    elif keys:
        yield ok("keys", "clients must show one")
    if keys or _loopback(config):
        return
    yield warn("keys", f"none, and {config.host} can be reached by others: they may use it", "give --api-key-file")


def _loopback(config: ServeConfig) -> bool:
    try:
        return all(local(str(address[0])) for _, address in addresses(config))
    except (OSError, UnicodeError):  # the port's finding tells
        return True
