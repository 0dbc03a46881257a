"""The addresses that ``millpond serve`` listens on, and the files that its connections need."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import resource
import socket
from collections.abc import Iterable, Sequence

from millpond.cli.given import StartError
from millpond.config import ServeConfig
from millpond.observe.log import fields

log = logging.getLogger("millpond.serve")

PORT_TRIES = 16
"""For a port that is free in every family, when any will do."""
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""A name may stand for addresses that this machine does not have, such as ::1 where IPv6 is off."""

Address = tuple[socket.AddressFamily, tuple[object, ...]]


def bind(config: ServeConfig) -> list[socket.socket]:
    """Take all addresses that the host has, before anything slow happens. Raises StartError.

    They listen from now on: a system lets two servers have one address as long as neither listens. Who connects before
    the server is up waits for it.
    """
    try:
        listeners = listen_on(addresses(config))
    except (OSError, UnicodeError) as error:  # the latter for names that no DNS could have
        reason = getattr(error, "strerror", None) or str(error)
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        raise StartError(
            f"--host {config.host} --port {config.port}: cannot listen there: "
            + (f"{reason}: another server has that port, give this one another --port" if taken else reason)
        ) from error
    if not loopback(listeners) and not config.api_key and config.api_key_file is None:
        log.warning(
            "listening beyond this machine, and anybody who can connect is served", extra=fields(host=config.host)
        )
    return listeners


def addresses(config: ServeConfig) -> list[Address]:
    """All that the host stands for. Raises OSError, or UnicodeError for a name that no DNS could have."""
    found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def listen_on(addresses: Sequence[Address]) -> list[socket.socket]:
    """A listener for each address that this machine has, all with one port. Raises OSError."""
    for tries_left in reversed(range(PORT_TRIES)):
        with contextlib.ExitStack() as opened:
            listeners: list[socket.socket] = []
            missing: OSError | None = None
            port = addresses[0][1][1]
            for family, (host, _, *scope) in addresses:
                try:
                    listener = opened.enter_context(_listener(family, (host, port, *scope), len(addresses) == 1))
                except OSError as error:
                    if error.errno in NOT_HERE:
                        missing = error
                        continue
                    if error.errno == errno.EADDRINUSE and port != addresses[0][1][1] and tries_left:
                        break  # the port that the system chose for one address is taken at another
                    raise
                listeners.append(listener)
                port = listener.getsockname()[1]
            else:
                if missing is not None and not listeners:
                    raise missing
                opened.pop_all()
                return listeners
    raise AssertionError("the last try returns or raises")


def _listener(family: socket.AddressFamily, address: tuple[object, ...], alone: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:  # IPv4 has an address of its own
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def url_of(listeners: Sequence[socket.socket], host: str, scheme: str) -> str:
    """Where clients find the server; ``host`` is what it was told to listen on."""
    address, port = listeners[0].getsockname()[:2]
    name = host if len(listeners) > 1 else f"[{address}]" if ":" in address else address
    return f"{scheme}://{name}:{port}"


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
        log.warning("few open files are allowed; lower --max-connections", extra=fields(allowed=granted, wanted=wanted))


def loopback(listeners: Iterable[socket.socket]) -> bool:
    """Whether only this machine can connect."""
    return all(local(str(listener.getsockname()[0])) for listener in listeners)


def local(address: str) -> bool:
    """Whether only this machine can connect there."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
