"""One schema for everything a user can set: it makes the flags, reads the environment and explains itself.

A value comes from the flag, else from the environment variable KVARN_<NAME>, else from the default below. A bad one is
refused at start with its name, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, field_validator

from kvarn.hub.cache import cache_root
from kvarn.types import GRID


class ConfigError(Exception):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


MOST_BYTES = 10**18
MOST_COUNT = 10**9
"""Larger numbers are slips, and would not fit into the messages to the engine."""
SIZE = re.compile(r"\s*(?:[0-9]+|[0-9]*\.[0-9]+\s*(?=[a-z]))\s*(?:[kmgtp]?b?|[kmgtp]ib)\s*", re.IGNORECASE)
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


Duration = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(seconds)]
"""Seconds; texts may carry a unit."""
Size = Annotated[ByteSize, Field(le=MOST_BYTES), BeforeValidator(size)]
"""Bytes; texts may carry a unit."""


class ServeConfig(BaseModel):
    """Settings of ``kvarn serve``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    model_name: str = Field("", description="Name clients use for the model; default: the name given to serve.")
    context_length: int = Field(
        0, ge=0, le=MOST_COUNT, description="Most tokens of prompt and answer together; 0: what the model was made for."
    )
    max_batch: int = Field(32, ge=1, le=256, description="Most requests decoded together.")
    max_itl_ms: float = Field(
        400.0,
        ge=10,
        le=60_000,
        description="Target for the pause between two tokens of a running answer while prompts are being read, in ms.",
    )
    prefill_chunk: int = Field(
        0, ge=0, le=65536, description="Most prompt tokens in one forward, a multiple of 64; 0: chosen by device."
    )
    kv_memory_mb: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Most memory for keys and values, in MiB; 0: chosen from the machine's memory.",
    )
    cache_ram: Size | None = Field(
        None,
        description="Most memory for cached prefixes, such as 8GB; 0 turns the prefix cache off. "
        "Default: half of the memory for keys and values.",
    )
    cache_selfcheck: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Compute one in so many cache hits afresh and compare; 0: never. For the distrustful.",
    )
    cache_dir: Path | None = Field(
        None, description="Folder of the SSD tier. Default: prefix in the folder where models are cached."
    )
    cache_ssd: Size = Field(
        ByteSize(20 * 10**9), description="Most space for cached prefixes on the SSD, such as 100GB; 0: no SSD tier."
    )
    ssd_policy: Literal["all", "second-use", "evicted", "off"] = Field(
        "second-use",
        description="What is written to the SSD: all blocks at once, those used by a second request (and live "
        "conversations at an orderly stop), those that leave memory, or none.",
    )
    ssd_durability: Literal["best-effort", "durable"] = Field(
        "best-effort",
        description="durable: a written block survives a loss of power; best-effort: a crash of the process.",
    )
    ssd_ttl: Duration = Field(
        30 * 86400.0,
        description="Blocks unused for longer are removed from the SSD, such as 12h or 30d; 0: never.",
    )
    ssd_daily_writes: Size = Field(
        ByteSize(100 * 10**9), description="Most bytes written to the SSD per day; 0: no limit."
    )
    ssd_min_free: Size = Field(ByteSize(5 * 10**9), description="Space that the SSD tier leaves free on its disk.")
    max_waiting: int = Field(512, ge=1, description="Most requests waiting for the engine; further ones get a 429.")
    drain_seconds: float = Field(
        10.0, ge=0, le=3600, description="How long running requests may go on after a stop is asked for, in seconds."
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="One of debug, info, warning, error."
    )

    @property
    def cache_folder(self) -> Path:
        """Where the SSD tier is."""
        return self.cache_dir if self.cache_dir is not None else default_cache_folder()

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _real_folder(cls, value: object) -> object:
        if isinstance(value, str):
            if not value.strip() or "\0" in value:
                raise ValueError("must be the path of a folder")
            try:
                return Path(value).expanduser()
            except RuntimeError:
                raise ValueError("must be the path of a folder; there is no such user") from None
        return value

    @field_validator("prefill_chunk")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % GRID:
            raise ValueError(f"must be 0 or a multiple of {GRID}")
        return value


def default_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the SSD tier is unless told otherwise."""
    return cache_root(environ) / "prefix"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting; none has a default, so that the environment can speak where the flag is absent."""
    for name, field in ServeConfig.model_fields.items():
        shown = "" if field.default in ("", None) else f" Default: {_shown(field.default)}."
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=None,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description}{shown}",
        )


def _shown(value: object) -> str:
    return value.human_readable(decimal=True) if isinstance(value, ByteSize) else str(value)


def read_config(flags: Mapping[str, str | None], environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """Merge flags and environment into a checked config. Raises ConfigError."""
    given: dict[str, str] = {}
    source: dict[str, str] = {}
    for name in ServeConfig.model_fields:
        flag, variable = flags.get(name), f"KVARN_{name.upper()}"
        if flag is not None:
            given[name], source[name] = flag, f"--{name.replace('_', '-')}"
        elif variable in environ:
            given[name], source[name] = environ[variable], variable
    try:
        return ServeConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        wrong = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{source.get(name, name)}: {wrong} (got {given.get(name)!r})") from error
