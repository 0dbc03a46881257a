"""The address that ``kvarn serve`` listens on, and the files that its connections need."""

from __future__ import annotations

import ipaddress
import logging
import resource
import socket

from kvarn.cli.given import StartError
from kvarn.config import ServeConfig
from kvarn.observe.log import kv

log = logging.getLogger("kvarn.serve")


def bind(config: ServeConfig) -> socket.socket:
    """Take the address before anything slow happens. Raises StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # the latter for names that no DNS could have
        reason = getattr(error, "strerror", None) or str(error)
        raise StartError(f"--host {config.host} --port {config.port}: cannot listen there: {reason}") from error
    if not loopback(listener) and not config.api_key and config.api_key_file is None:
        log.warning("listening beyond this machine, and anybody who can connect is served", extra=kv(host=config.host))
    return listener


def allow_files(wanted: int) -> None:
    """Ask the system for so many open files: with fewer, full connections would keep a dead engine from restarting."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    granted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    except (OSError, ValueError):  # macOS has a second limit, which nothing tells
        granted = soft
    if granted < wanted:
        log.warning("few open files are allowed; lower --max-connections", extra=kv(allowed=granted, wanted=wanted))


def loopback(listener: socket.socket) -> bool:
    address = str(listener.getsockname()[0])
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
