"""Values as people write them: durations, sizes, lists, host names."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field

from millpond.paths import expanded

MOST_BYTES = 10**18
MOST_COUNT = 10**9
"""Larger numbers are slips, and would not fit into the messages to the engine."""
SIZE = re.compile(r"\s*(?:[0-9]+|[0-9]*\.[0-9]+\s*(?=[a-z]))\s*(?:[kmgtp]?b?|[kmgtp]ib)\s*", re.IGNORECASE)
WORDS = "must be words separated by commas, none of them empty"
HOST = re.compile(r"\*|(\*\.)?[^\s*/:\[\]]+(:[0-9]+)?|\[?[0-9a-f:.]*:[0-9a-f:.]*\]?", re.IGNORECASE)
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/*]+", re.IGNORECASE)
SIZES = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "KB": 10**3, "KiB": 2**10}
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def seconds(value: object) -> object:
    """A duration such as 90s, 30m, 12h or 7d in seconds; what is not a text is left for pydantic to judge."""
    if not isinstance(value, str):
        return value
    unit = SECONDS.get(value[-1:])
    try:
        found = float(value if unit is None else value[:-1]) * (unit or 1.0)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError("must be a number of seconds from 0, or such a number with one of s, m, h, d, w behind it")
    return found


def size(value: object) -> object:
    """Refuses texts that are no size such as 8GB, 512MiB or 0, in words; pydantic reads the others."""
    if isinstance(value, str) and not SIZE.fullmatch(value):
        raise ValueError("must be a size such as 8GB, 512MiB or 0")
    return value


def words(value: object) -> object:
    """The parts of a text between its commas; what is not a text is left for pydantic to judge."""
    if not isinstance(value, str):
        return value
    found = tuple(part.strip() for part in value.split(","))
    if not all(found):
        raise ValueError(WORDS)
    return found


def full(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses empty words, however they were given."""
    if not all(word.strip() for word in value):
        raise ValueError(WORDS)
    return value


def hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what no Host header could be."""
    if not all(HOST.fullmatch(host) for host in value):
        raise ValueError("must be host names such as example.org, addresses, *.example.org, or *; no URLs")
    return value


def origins(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what no Origin header could be; lower case, as browsers write them."""
    if not all(ORIGIN.fullmatch(origin) for origin in value):
        raise ValueError("must be origins such as https://example.org, without anything behind the host, or *")
    return tuple(origin.lower() for origin in value)


def real_path(value: object) -> object:
    """A path without ``~``; what is not a text is left for pydantic to judge."""
    if isinstance(value, str):
        if not value.strip() or "\0" in value:
            raise ValueError("must be a path")
        try:
            return expanded(value)
        except ValueError as error:
            raise ValueError(f"must be a path; {error}") from None
    return value


def command(value: str) -> str:
    """Refuses what a shell could not take apart into words."""
    try:
        found = shlex.split(value)
    except ValueError:
        found = []
    if not found or "\0" in value:
        raise ValueError("must be a command, with its options if you like, quoted as for a shell")
    return value


Duration = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(seconds)]
"""Seconds; texts may carry a unit."""
Silence = Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False), BeforeValidator(seconds)]
"""Seconds between words of somebody who speaks twice a second; texts may carry a unit."""
Words = Annotated[tuple[str, ...], BeforeValidator(words), AfterValidator(full)]
"""Texts; given as one, they are separated by commas."""
Size = Annotated[ByteSize, Field(le=MOST_BYTES), BeforeValidator(size)]
"""Bytes; texts may carry a unit."""
Hosts = Annotated[Words, AfterValidator(hosts)]
Origins = Annotated[Words, AfterValidator(origins)]
RealPath = Annotated[Path, BeforeValidator(real_path)]
Command = Annotated[str, AfterValidator(command)]
"""Words as for a shell: a program and its first arguments."""
