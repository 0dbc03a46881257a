"""One schema for everything a user can set: it makes the flags, reads the environment and explains itself.

A value comes from the flag, else from the environment variable KVARN_<NAME>, else from the default below. A bad one is
refused at start with its name, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvarn.types import GRID


class ConfigError(Exception):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class ServeConfig(BaseModel):
    """Settings of ``kvarn serve``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    model_name: str = Field("", description="Name clients use for the model; default: the name given to serve.")
    context_length: int = Field(
        0, ge=0, description="Most tokens of prompt and answer together; 0: what the model was made for."
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
        0, ge=0, description="Most memory for keys and values, in MiB; 0: chosen from the machine's memory."
    )
    max_waiting: int = Field(512, ge=1, description="Most requests waiting for the engine; further ones get a 429.")
    drain_seconds: float = Field(
        10.0, ge=0, le=3600, description="How long running requests may go on after a stop is asked for, in seconds."
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="One of debug, info, warning, error."
    )

    @field_validator("prefill_chunk")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % GRID:
            raise ValueError(f"must be 0 or a multiple of {GRID}")
        return value


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting; none has a default, so that the environment can speak where the flag is absent."""
    for name, field in ServeConfig.model_fields.items():
        shown = "" if field.default == "" else f" Default: {field.default}."
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=None,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description}{shown}",
        )


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
        raise ConfigError(f"{source.get(name, name)}: {first['msg']} (got {given.get(name)!r})") from error
