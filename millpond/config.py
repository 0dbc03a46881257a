"""One schema for everything a user can set: it makes the flags, reads the environment and explains itself.

A value comes from the flag, else from the environment variable MILLPOND_<NAME>, else from the TOML file given with
--config or MILLPOND_CONFIG, else from the default below. A bad one is refused at start with its name, the value and
what is allowed. docs/configuration.md is made from here (``make reference``).
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_origin

from msgspec import convert
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from millpond.dialects.families import BY_NAME
from millpond.hub.cache import NoCache, prefix_folder
from millpond.paths import expanded
from millpond.reference import allowed, default, page
from millpond.settings import PrefixSettings
from millpond.types import (
    GRID,
    GROUP_SIZES,
    MOST_DRAFT_TOKENS,
    KvPacking,
    SpecChoice,
    SpecMode,
    SpecSettings,
    Speculation,
)
from millpond.values import MOST_COUNT, Command, Duration, Hosts, Origins, RealPath, Silence, Size, Words


class ConfigError(Exception):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


LEAST_BODY = 1024
ROTATED_BITS = 4
MOST_RANKS = 64
MOST_TP_PORT = 65535 - 1024
"""The ports of the backend come behind it."""

OF_THE_ENGINE = (
    *("context_length", "max_batch", "max_itl_ms", "prefill_chunk", "kv_memory_mb", "kv_bits", "kv_group_size"),
    *("wired_memory_mb", "kv_quant_start", "kv_quant_mode", "cache_ram", "cache_selfcheck", "cache_ssd"),
    *("ssd_policy", "ssd_durability", "ssd_ttl", "ssd_daily_writes", "ssd_min_free", "deterministic"),
    *("spec", "spec_tokens", "spec_adaptive", "spec_shared", "tp_silence"),
)
"""What all ranks of a group go by. Folders may differ from machine to machine, and HTTP is rank 0's business."""


class ServeConfig(BaseModel):
    """Settings of ``millpond serve``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    model_name: str = Field("", description="Name clients use for the model; default: the name given to serve.")
    sampling_defaults: Literal["model", "api"] = Field(
        "model",
        description="How requests that do not say are sampled: as the model's generation_config.json recommends "
        "(model), or at temperature 1 without limits, as OpenAI's API has it (api).",
    )
    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = Field(
        "reasoning_content",
        description="What chat completions call a model's thoughts; both: under either name, with twice the bytes.",
    )
    tool_format: str = Field(
        "auto",
        description="How the model writes calls of tools, for one whose folder does not tell: the name of a family, "
        f"of {', '.join(BY_NAME)}. auto: as its chat template writes them (millpond doctor says which).",
    )
    context_length: int = Field(
        0, ge=0, le=MOST_COUNT, description="Most tokens of prompt and answer together; 0: what the model was made for."
    )
    max_batch: int = Field(32, ge=1, le=256, description="Most requests decoded together.")
    max_itl_ms: float = Field(
        200.0,
        ge=10,
        le=60_000,
        description="Target for the pause between two tokens of a running answer while prompts are being read, in ms.",
    )
    prefill_chunk: int = Field(
        0,
        ge=0,
        le=65536,
        description="Most prompt tokens in one forward, a multiple of 64; 0: measured on a GPU, 256 on a CPU.",
    )
    kv_memory_mb: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Most memory for keys and values, in MiB; 0: chosen from the machine's memory.",
    )
    wired_memory_mb: int | None = Field(
        None,
        ge=0,
        le=MOST_COUNT,
        description="On Macs: memory that is never swapped out, in MiB; 0: none. Default: weights, keys and values "
        "where the weights take more than 60 % of the machine's memory, else none.",
    )
    kv_bits: int = Field(
        0,
        description="Keep keys and values of what has been read in so many bits, 8 or 4: two to seven times as many "
        "tokens fit into memory and on the SSD. 0: as computed.",
    )
    kv_group_size: int = Field(
        64,
        description="With kv_bits: numbers that share a scale, 32, 64 or 128. Smaller groups are more exact and larger "
        "in memory; must divide the model's head dimension.",
    )
    kv_quant_start: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="With kv_bits: tokens from the start of a sequence that are kept as computed, a multiple of 64. "
        "Rotated: 64 at least.",
    )
    kv_quant_mode: Literal["affine", "rotated"] = Field(
        "affine",
        description="With kv_bits 4: rotated packs keys 64 tokens at a time, turned so that what stands out is spread "
        "over all dimensions, and keeps the newest tokens as computed: far closer to the model's own answers. Sliding "
        "windows take 8 bits.",
    )
    deterministic: Literal["off", "on"] = Field(
        "off",
        description="on: an answer never depends on what else the server does, down to the last bit of its logprobs. "
        "Costs speed, how much is said at start; no tokens are guessed ahead.",
    )
    cache_ram: Size | None = Field(
        None,
        description="Most memory for cached prefixes, such as 8GB; 0 turns the prefix cache off. "
        "Default: half of the memory for keys and values, or half of what other programs leave, if that is less.",
    )
    share_prefixes: Literal["off", "on"] = Field(
        "off",
        description="off: where API keys have several owners, none finds what was cached of another's prompts. on: all "
        "share, which is faster, and tells each how far others' prompts agree with its own.",
    )
    cache_selfcheck: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Compute one in so many cache hits afresh and compare; 0: never. For the distrustful.",
    )
    cache_dir: RealPath | None = Field(
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
    spec: SpecChoice = Field(
        "auto",
        description="How tokens are guessed ahead, which makes answers faster and never changes them: from the text so "
        "far (ngram), with draft_model (draft), with a head of the model for multi-token prediction (mtp), or not at "
        "all (off). auto: mtp where the model has such a head, else ngram. A request may choose for itself.",
    )
    spec_tokens: int = Field(
        0,
        ge=0,
        le=MOST_DRAFT_TOKENS,
        description="Most tokens guessed ahead for each answer in a step; 0: chosen by device.",
    )
    spec_adaptive: Literal["on", "off"] = Field(
        "on",
        description="on: guess only as much as pays, by what has been measured; off: always as much as allowed.",
    )
    spec_shared: Literal["on", "off"] = Field(
        "off",
        description="on: guesses may also come from past answers, to requests of the same owner and cache_salt (see "
        "share_prefixes). How fast an answer comes may then tell what others with both were answered.",
    )
    draft_model: str = Field(
        "",
        validate_default=True,
        description="A smaller model with the same tokens, named like MODEL: guesses for spec draft, and on request.",
    )
    tp: int = Field(
        0,
        ge=0,
        le=MOST_RANKS,
        description="Processes, called ranks, that share the model, each with its part of the weights (tensor "
        "parallel); 0: as many as the hostfile or mlx.launch says, else 1.",
    )
    hostfile: RealPath | None = Field(
        None,
        description="JSON file with the machines that share the model, one rank each, in the format of mlx.launch; "
        "the first is this one. Default: all ranks are on this machine.",
    )
    tp_backend: Literal["auto", "ring", "jaccl", "jaccl-ring", "nccl", "mpi"] = Field(
        "auto",
        description="What the ranks exchange tensors with; auto: what the hostfile or mlx.launch says, else ring.",
    )
    tp_host: str = Field(
        "",
        description="Address at which the other ranks find rank 0. Default: its first address in the hostfile, else "
        "127.0.0.1.",
    )
    tp_port: int = Field(
        0,
        ge=0,
        le=MOST_TP_PORT,
        description="Port at which the other ranks find rank 0; the ports of the backend follow it. 0: free ones "
        "where all ranks are on this machine, else 32322.",
    )
    tp_secret_file: RealPath | None = Field(
        None,
        description="File with a secret of at least 16 characters, the same on all machines, for ranks that "
        "mlx.launch or mpirun started. MILLPOND_TP_SECRET may have it instead. Default: a new one at every start.",
    )
    tp_silence: Silence = Field(
        5.0,
        description="A rank that has not been heard of for so long is given up: all are killed and started again.",
    )
    tp_python: str = Field(
        "", description="Python that has Millpond on the other machines. Default: where it is on this one."
    )
    tp_ssh: Command = Field(
        "ssh", description="How the other machines are reached, such as ssh -F FILE; the rest is added to it."
    )
    max_waiting: int = Field(
        512, ge=1, le=MOST_COUNT, description="Most answers waiting for the engine; further ones get a 429."
    )
    max_per_client: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Most answers of one client running or waiting, further ones get a 429; 0: no limit. A client is "
        "an API key, or without keys the user field or else the address.",
    )
    queue_timeout: Duration = Field(
        600.0, description="How long a request may wait before its prompt is begun; 0: for ever."
    )
    first_token_timeout: Duration = Field(
        3600.0, description="How long reading a prompt may take, from its begin to the first token; 0: no limit."
    )
    token_timeout: Duration = Field(300.0, description="How long an answer may pause between two tokens; 0: no limit.")
    request_timeout: Duration = Field(0.0, description="How long a whole request may take; 0: no limit.")
    body_timeout: Duration = Field(60.0, description="How long a client may take to send a request; 0: no limit.")
    write_timeout: Duration = Field(
        60.0, description="How long a client may leave an answer unread before its connection is cut; 0: no limit."
    )
    stream_buffer: int = Field(
        1024,
        ge=1,
        le=MOST_COUNT,
        description="Most steps of a streamed answer kept for a client that reads slowly; beyond it the answer ends "
        "with an error.",
    )
    keepalive: Duration = Field(
        15.0,
        description="A stream without text gets a comment after so long, if the engine makes progress; 0: never.",
    )
    stall_timeout: Duration = Field(
        120.0, description="An engine with work that makes no step for so long is killed and restarted; 0: never."
    )
    max_restarts: int = Field(
        5,
        ge=0,
        le=MOST_COUNT,
        description="Engine deaths within ten minutes after which the server gives up and exits with an error.",
    )
    max_body: Size = Field(
        ByteSize(8 * 1024 * 1024), ge=LEAST_BODY, description="Most bytes of a request's body, such as 16MB."
    )
    max_values: int = Field(
        300_000,
        ge=1000,
        le=MOST_COUNT,
        description="Most values and names in the JSON of a request's body, token ids of prompts included; further "
        "ones get a 413.",
    )
    max_connections: int = Field(1024, ge=1, le=MOST_COUNT, description="Most open connections; further ones are cut.")
    api_key: Words = Field(
        (),
        repr=False,
        description="Keys that clients must show one of, separated by commas. A file or MILLPOND_API_KEY hides them.",
    )
    api_key_file: RealPath | None = Field(
        None, description="File with one key per line, a name before it if you like. Read again on SIGHUP."
    )
    allowed_hosts: Hosts = Field(
        (),
        description="Host headers that are served, separated by commas, * for any. Default: this machine's own names "
        "when listening on loopback, else any.",
    )
    cors_origins: Origins = Field(
        (),
        description="Web pages that may call the server, separated by commas, such as https://example.org; * for any.",
    )
    tls_certificate: RealPath | None = Field(None, description="PEM file with the certificate chain: serve HTTPS.")
    tls_key: RealPath | None = Field(
        None, validate_default=True, description="PEM file with the certificate's private key."
    )
    responses_size: Size = Field(
        ByteSize(256 * 10**6),
        description="Most space for answers from /v1/responses and what was asked, which clients may go on from by "
        "their ids; 0 keeps none. They are beside the SSD tier, in memory where there is none.",
    )
    responses_ttl: Duration = Field(
        30 * 86400.0,
        description="Such answers are kept for so long after their last use, such as 12h; 0: no limit.",
    )
    drain_seconds: float = Field(
        10.0, ge=0, le=3600, description="How long running requests may go on after a stop is asked for, in seconds."
    )
    log_format: Literal["text", "json"] = Field("text", description="How log lines look.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lines from this level up are written."
    )

    @property
    def cache_folder(self) -> Path | None:
        """Where the SSD tier is; None where there is no folder for it."""
        if self.cache_dir is not None:
            return self.cache_dir
        try:
            return prefix_folder()
        except NoCache:
            return None

    @field_validator("tls_key")
    @classmethod
    def _both_or_none(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("tls_certificate") is None):
            raise ValueError("must be given if and only if tls_certificate is")
        return value

    @field_validator("prefill_chunk", "kv_quant_start")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % GRID:
            raise ValueError(f"must be 0 or a multiple of {GRID}")
        return value

    @field_validator("kv_bits", "kv_group_size")
    @classmethod
    def _one_of(cls, value: int, info: ValidationInfo) -> int:
        allowed = (0, 4, 8) if info.field_name == "kv_bits" else GROUP_SIZES
        if value not in allowed:
            raise ValueError(f"must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
        return value

    @field_validator("kv_quant_mode")
    @classmethod
    def _four_bits(cls, value: str, info: ValidationInfo) -> str:
        if value == "rotated" and info.data.get("kv_bits", ROTATED_BITS) != ROTATED_BITS:
            raise ValueError(f"rotated needs kv_bits: {ROTATED_BITS}")
        return value

    @field_validator("tool_format")
    @classmethod
    def _known_family(cls, value: str) -> str:
        if value != "auto" and value not in BY_NAME:
            raise ValueError(f"must be auto or one of {', '.join(BY_NAME)}")
        return value

    @field_validator("draft_model")
    @classmethod
    def _something_to_guess_with(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("deterministic") == "on":
            raise ValueError("must be left out when deterministic is on, for nothing is guessed then")
        if not value.strip() and (value or info.data.get("spec") == SpecMode.DRAFT):
            raise ValueError(
                "must name a model when spec is draft" if not value else "must be a model, named like MODEL"
            )
        return value

    @property
    def thought_fields(self) -> tuple[str, ...]:
        """Names under which chats tell thoughts."""
        return ("reasoning_content", "reasoning") if self.reasoning_field == "both" else (self.reasoning_field,)

    @property
    def of_the_engine(self) -> dict[str, str]:
        """The settings that must be the same for all ranks, by name."""
        return {name: str(getattr(self, name)) for name in OF_THE_ENGINE}

    @property
    def speculation(self) -> Speculation:
        """How tokens are guessed ahead for requests that do not say."""
        return Speculation(mode=SpecMode(self.spec), tokens=self.spec_tokens, adaptive=self.spec_adaptive == "on")

    def spec_settings(self, draft_path: str) -> SpecSettings:
        """What the engine is told about it; ``draft_path`` is the folder of the draft model, if there is one."""
        return SpecSettings(default=self.speculation, draft_path=draft_path, shared=self.spec_shared == "on")

    @property
    def log_environment(self) -> dict[str, str]:
        """How engines and followers are told to log."""
        return {"MILLPOND_LOG_LEVEL": self.log_level, "MILLPOND_LOG_FORMAT": self.log_format}

    @property
    def packing(self) -> KvPacking:
        """How keys and values are kept."""
        rotated = self.kv_quant_mode == "rotated"
        start = max(self.kv_quant_start, GRID) if rotated else self.kv_quant_start
        return KvPacking(bits=self.kv_bits, group_size=self.kv_group_size, start=start, rotated=rotated)

    def prefix_settings(self, label: str) -> PrefixSettings:
        """How prefixes are cached. ``label``: what the SSD tier calls the model."""
        same = self.model_dump(include=set(PrefixSettings.__struct_fields__))
        return convert(same | {"cache_dir": str(self.cache_folder or ""), "label": label}, PrefixSettings)


def read_file(path: str) -> dict[str, object]:
    """The settings in a TOML file, named as in ``ServeConfig``, dashes allowed. Raises ConfigError."""
    try:
        found = tomllib.loads(expanded(path).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    settings: dict[str, object] = {}
    for given, value in found.items():
        name = given.replace("-", "_")
        if name not in ServeConfig.model_fields:
            close = difflib.get_close_matches(name, ServeConfig.model_fields, 1)
            raise ConfigError(f"{path}: {given}: there is no such setting" + (f"; is it {close[0]}?" if close else ""))
        if name in settings:
            raise ConfigError(f"{path}: {name}: is there twice")
        if isinstance(value, bool):  # which Python would take for the numbers 1 and 0
            raise ConfigError(f"{path}: {name}: no setting is true or false (got {value!r})")
        settings[name] = value
    return settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting; none has a default, so that the environment can speak where the flag is absent."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings, named like the flags.")
    for name, field in ServeConfig.model_fields.items():
        shown = f" Default: {default(field)}." if default(field) else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=None,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description}{shown}".replace("%", "%%"),
        )


def reference() -> str:
    """docs/configuration.md."""
    return page(ServeConfig.model_fields)


def read_config(
    flags: Mapping[str, str | None], environ: Mapping[str, str] = os.environ, file: str | None = None
) -> ServeConfig:
    """Merge flags, environment and file into a checked config. Raises ConfigError."""
    path = environ.get("MILLPOND_CONFIG") if file is None else file
    given = read_file(path) if path else {}
    source = {name: f"{path}: {name}" for name in given}
    for name in ServeConfig.model_fields:
        flag, variable = flags.get(name), f"MILLPOND_{name.upper()}"
        if flag is not None:
            given[name], source[name] = flag, f"--{name.replace('_', '-')}"
        elif variable in environ:
            given[name], source[name] = environ[variable], variable
    for name, value in given.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{source[name]}: must be UTF-8 text (got {value!r})") from None
    try:
        return ServeConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        wrong = str(first["msg"]).removeprefix("Value error, ")
        field = ServeConfig.model_fields[name]
        if allowed(field) and not wrong.startswith("must") and get_origin(field.annotation) is not Literal:
            wrong += f"; allowed is {allowed(field)}"
        got = repr(given.get(name)) if field.repr else "something that is not shown"
        raise ConfigError(f"{source.get(name, name)}: {wrong} (got {got})") from error
