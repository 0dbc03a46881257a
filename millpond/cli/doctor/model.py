"""How a model would be served: whether it fits, how it runs, and how many tokens there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from millpond import wire
from millpond.cli.doctor.engine import Probe
from millpond.cli.doctor.finding import Finding, fail, ok, shown, warn
from millpond.cli.doctor.results import rounding
from millpond.client import EngineClient, EngineUnavailable
from millpond.client.start import start_message
from millpond.config import ServeConfig
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress, TerminalProgress
from millpond.hub.source import ResolvedModel, resolve
from millpond.hub.weights import weight_bytes
from millpond.memory.machine import free_memory, total_memory
from millpond.memory.shares import fitting_kv
from millpond.text.tokenizer import Tokenizer, TokenizerError
from millpond.types import ModelInfo, SpecMode

REMARKED = "nothing, if the answers are what they should be; else remove what is named, or take another model"
SMALLER = "take a smaller or more strongly quantised model"


def findings(name: str, config: ServeConfig, probed: Probe, quiet: bool) -> Iterator[Finding]:
    """Load the model in an engine of its own, unless its weights alone are too much."""
    progress = SilentProgress() if quiet else TerminalProgress()
    try:
        source = resolve(name, progress)
    except SourceError as error:
        yield fail("model", str(error), "give one of these")
        return
    try:
        draft = resolve(config.draft_model, progress).path if config.draft_model else None
    except SourceError as error:
        yield fail("draft", f"draft_model: {error}", "give one of these, or another --spec and no --draft-model")
        return
    free = free_memory()
    if wrong := cannot_be_loaded(source, draft, probed):
        yield wrong
        return
    try:
        start = start_message(config, str(source.path), str(draft or ""), source.name)
        # A running server may be using the SSD tier.
        info = asyncio.run(_loaded(replace(start, prefix=replace(start.prefix, cache_ssd=0))))
    except EngineUnavailable as error:
        yield fail("model", error.whole, "correct what it says, or take another model")
        return
    yield ok("model", f"{source.name}: {info.dtype}, context {info.context_length}, weights {shown(info.weight_bytes)}")
    for remark in info.remarks:
        yield warn("files", remark, REMARKED)
    yield _room(info, free if info.device.startswith("cpu") else None)
    if info.lane == "slots":
        yield ok("batching", "; ".join(filter(None, ("requests share one forward", rounding(info.alike)))))
    else:
        text = f"one request at a time in turn: {info.lane_reason}"
        yield warn("batching", text, "nothing to do but to take another model, if many requests come at once")
    if info.prefix_cache:
        yield ok("prefixes", f"cached and restored: {info.prefix_cache}, in RAM and on SSD")
    else:
        text = f"not cached: {info.prefix_cache_reason}"
        yield warn(
            "prefixes", text, "a --cache-ram above 0" if config.cache_ram == 0 else "take another model if it matters"
        )
    yield _speculation(info, config)
    yield _writing(source.path, info, config)


def cannot_be_loaded(source: ResolvedModel, draft: Path | None, probed: Probe) -> Finding | None:
    """Why the weights, with those of a draft model in folder ``draft``, are not worth the try; None when they are."""
    free, total = free_memory(), probed.memory or total_memory()
    try:
        weights = sum(weight_bytes(path) for path in (source.path, draft) if path is not None)
    except SourceError as error:
        return fail("model", str(error), "correct what it says, or fetch the model again")
    room = free if probed.on_cpu and free is not None else total
    if weights <= room:
        return None
    whose = "its weights" if draft is None else "its weights and the draft model's"
    text = f"{source.name}: {whose} take {shown(weights)}, more than the {shown(room)} there are"
    return fail("model", text, f"{SMALLER}, or close other programs")


def _speculation(info: ModelInfo, config: ServeConfig) -> Finding:
    """Whether tokens can be guessed ahead, and how."""
    if info.speculation:
        usual = SpecMode(config.spec).among(info.speculation)
        usual = usual if usual in info.speculation else SpecMode.OFF
        return ok("guessing", f"{', '.join(info.speculation)}; {usual.value} unless a request says otherwise")
    text = f"tokens cannot be guessed ahead: {info.speculation_reason}"
    if config.spec == "off":
        return ok("guessing", text)
    return warn("guessing", text, "--spec off, or take another model if it matters")


def _writing(folder: Path, info: ModelInfo, config: ServeConfig) -> Finding:
    """How its answers are read: calls of tools, thoughts, and whether they can be made to have a form."""
    try:
        family = Tokenizer.load(folder, config.tool_format).family
    except TokenizerError as error:
        return warn("answers", f"its tokenizer cannot be read: {error}", "take another model")
    dialect = family.dialect
    calls = (
        f"calls as {dialect.name} writes them, by {family.how}"
        if dialect.calls_tools
        else "no tools in its chat template"
    )
    channels = "thoughts in a channel of their own" if dialect.messages else "no thoughts"
    thoughts = f"thoughts between {' and '.join(dialect.thoughts)}" if dialect.thoughts else channels
    vectors = f"; vectors of {info.embedding_size} numbers" if info.embedding_size else ""
    told = f"{calls}; {thoughts}{vectors}"
    if dialect.calls_tools and not family.read:
        return warn(
            "answers", f"{told}; its chat template writes calls in another way", "--tool-format, or another model"
        )
    if info.grammars:
        return warn("answers", f"{told}; no forms and forced calls: {info.grammars}", "another model, if it matters")
    return ok("answers", f"{told}; forms and forced calls")


def _room(info: ModelInfo, free: int | None) -> Finding:
    """Memory for keys and values, in bytes and in tokens. ``free`` was measured before the model was loaded."""
    limit, each = info.kv_limit_bytes, info.kv_bytes_per_token
    if not each:
        return ok("tokens", f"{shown(limit)} for states that do not grow with the prompt")
    count = limit // each
    text = (
        f"{shown(each)} per token ({info.kv_format}); {shown(limit)} hold {count} tokens, "
        f"{count / info.context_length:.3g} full contexts"
    )
    if free is not None and info.weight_bytes + limit > free:
        most = fitting_kv(free, info.weight_bytes) >> 20
        text += f", but with the weights that is more than the {shown(free)} free now"
        return warn("tokens", text, f"close other programs, or --kv-memory-mb {most}")
    return ok("tokens", text)


async def _loaded(start: wire.Start) -> ModelInfo:
    """What an engine finds out about the model. Raises EngineUnavailable."""
    # What goes wrong comes back as an exception; the engine's log would stand between the findings.
    client = EngineClient(start, environment={"MILLPOND_LOG_LEVEL": "critical"})
    await client.start()
    try:
        await client.settled()
        assert client.info is not None
        return client.info
    finally:
        await client.stop()
