"""From a Start message to a running engine: load, probe, warm up, plan memory, report ready."""

from __future__ import annotations

import logging
import platform
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from kvarn.engine.boot_guessing import LoadedDraft, guessing
from kvarn.engine.executor import Executor
from kvarn.engine.link import Link
from kvarn.engine.loop import Engine
from kvarn.engine.prefixes import Prefixes
from kvarn.hub.fingerprint import folder_fingerprint
from kvarn.hub.progress import SilentProgress
from kvarn.model.blocks import BlockFormat, agree, stored
from kvarn.model.load import LoadedModel, ModelError, load
from kvarn.model.memory import total_memory
from kvarn.model.probe import remembered_probe, warm_up
from kvarn.observe.log import kv
from kvarn.prefix.cache import PrefixCache
from kvarn.prefix.disk.events import Opened, SsdLimits
from kvarn.prefix.disk.tier import SsdTier
from kvarn.prefix.keys import Namespace
from kvarn.prefix.policy import SavePolicy
from kvarn.schedule.budget import MemoryBudget
from kvarn.schedule.costs import CostModel
from kvarn.schedule.scheduler import Limits, Scheduler
from kvarn.types import ModelInfo, PrefixSettings, SpecMode
from kvarn.wire import Loading, Ready, Start

log = logging.getLogger(__name__)

CHUNK_CPU, CHUNK_GPU = 256, 2048
"""Most prompt tokens in one forward. On a CPU attention over a long chunk costs more than it saves in products."""
LEAST_CONTEXT = 256
"""A server that cannot hold one request of this many tokens is of no use."""
LEAST_KV_BYTES = 256 * 1024 * 1024
OPEN_SECONDS = 10.0
"""How long the start waits for the SSD tier's index."""
BUFFER_CACHE_BYTES = 512 * 1024 * 1024
"""Freed buffers MLX may keep for reuse; without a limit they grow to the largest prompt ever read."""


def boot(start: Start, blas: str, link: Link) -> Engine:
    """Load the model and return an engine that has run a forward; progress and readiness go to ``link``.

    Raises ModelError when the model cannot be served.
    """
    began = time.monotonic()
    mx.set_cache_limit(BUFFER_CACHE_BYTES)
    folder = Path(start.model_path)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(folder_fingerprint, folder, SilentProgress())  # reads files only: runs beside the load
        drafter = Path(start.spec.draft_path) if start.spec.draft_path else None
        draft_digest = pool.submit(folder_fingerprint, drafter, SilentProgress()) if drafter is not None else None
        model = load(folder, start.context_length, _percent_by_percent(link), start.packing)
        content = digest.result()
        link.send(Loading("probe", 1.0))
        capabilities = remembered_probe(model, content)
        model = capabilities.fitted(model)
        warm_up(model, capabilities)
        draft = None
        if drafter is not None and draft_digest is not None and capabilities.slots:
            draft = LoadedDraft(drafter, folder, draft_digest.result())
    chunk = start.prefill_chunk or (CHUNK_CPU if model.on_cpu else CHUNK_GPU)
    budget, draft_bytes = _budget(model, start.kv_budget_bytes, chunk, draft)
    model = _within_memory(model, budget)
    limits = Limits(max_rows=start.max_rows, max_itl_ms=start.max_itl_ms, max_chunk=chunk)
    costs = CostModel()
    uncached = capabilities.uncached or ("cache_ram: 0 bytes" if start.prefix.ram_bytes == 0 else "")
    prefixes = Prefixes(model.network, model.form, None, None)
    if not uncached and isinstance(model.blocks, BlockFormat):
        prefixes = _prefixes(start.prefix, model, model.blocks, budget, content, costs, link)
    scheduler = Scheduler(limits, budget, costs)
    guesses, modes = guessing(start.spec, model, capabilities, costs, content, draft, draft_bytes)
    executor = Executor(model, capabilities, budget.limit_bytes, prefixes)
    engine = Engine(model, capabilities, scheduler, costs, budget.limit_bytes, executor, guesses, link.inbox, link)
    lane, elapsed = "slots" if capabilities.slots else "solo", round(time.monotonic() - began, 2)
    loaded = kv(folder=folder.name, kv_format=model.form.packing.described(model.dtype), seconds=elapsed)
    log.info("model loaded", extra=loaded)
    if capabilities.reason:
        log.warning("this model runs without a batched forward", extra=kv(reason=capabilities.reason))
    if uncached:
        log.warning("prefixes of this model are not cached", extra=kv(reason=uncached))
    if not capabilities.pipelined:
        log.warning("cache writes are copied while a step is in flight; steps run one by one")
    if not modes and start.spec.default.mode is not SpecMode.OFF:
        log.warning("tokens of this model are not guessed ahead", extra=kv(reason=capabilities.reason))
    link.send(
        Ready(
            ModelInfo(
                context_length=model.context_length,
                vocab_size=model.vocab_size,
                lane=lane,
                lane_reason=capabilities.reason,
                cache_kinds=sorted(set(model.kinds)),
                dtype=model.dtype,
                device=f"{mx.default_device().type.name} ({platform.machine()})",
                blas=blas if model.on_cpu else "",
                kv_bytes_per_token=budget.kv_bytes_per_token,
                max_rows=start.max_rows,
                fingerprint=content,
                weight_bytes=model.weight_bytes,
                kv_limit_bytes=budget.limit_bytes,
                kv_format=model.form.packing.described(model.dtype),
                prefix_cache="" if uncached else "+".join(prefixes.kinds),
                prefix_cache_reason=uncached,
                speculation=[mode.value for mode in modes],
                speculation_reason="" if modes else capabilities.reason,
            )
        )
    )
    return engine


def _prefixes(
    settings: PrefixSettings,
    model: LoadedModel,
    blocks: BlockFormat,
    budget: MemoryBudget,
    content: str,
    costs: CostModel,
    link: Link,
) -> Prefixes:
    namespace = Namespace(weights=content, kv_format=blocks.kept_as, layers=list(blocks.layers)).digest
    limit = budget.limit_bytes // 2 if settings.ram_bytes is None else min(settings.ram_bytes, budget.limit_bytes)
    cache = PrefixCache(namespace, blocks.layout, limit, stored, partial(agree, blocks.form), settings.selfcheck)
    if not settings.ssd_bytes:
        return Prefixes(model.network, model.form, blocks, cache)
    limits = SsdLimits(
        cap_bytes=settings.ssd_bytes,
        least_free_bytes=settings.least_free_bytes,
        ttl_seconds=settings.ttl_seconds or None,
        daily_bytes=settings.daily_bytes or None,
        durable=settings.durable,
        writes=settings.ssd_policy != SavePolicy.OFF,
    )
    ssd = SsdTier(Path(settings.folder), namespace, settings.label, limits, link.inbox.put)
    cache.attach(ssd, SavePolicy(settings.ssd_policy), lambda start, tokens: costs.prefill_ms(start, tokens) / 1000)
    ssd.start()
    prefixes = Prefixes(model.network, model.form, blocks, cache, ssd)
    _wait_until_open(prefixes, link)
    return prefixes


def _wait_until_open(prefixes: Prefixes, link: Link) -> None:
    """Let the first requests find what is on disk; a disk that takes too long is not waited for."""
    ends, others = time.monotonic() + OPEN_SECONDS, []
    while (left := ends - time.monotonic()) > 0:
        try:
            message = link.inbox.get(timeout=left)
        except queue.Empty:
            log.warning("the SSD tier is still opening", extra=kv(seconds=OPEN_SECONDS))
            break
        if isinstance(message, Opened):
            prefixes.on_event(message)
            break
        others.append(message)
    for message in others:
        link.inbox.put(message)


def _percent_by_percent(link: Link) -> Callable[[float], None]:
    told = -1

    def tell(fraction: float) -> None:
        nonlocal told
        if int(fraction * 100) > told:
            told = int(fraction * 100)
            link.send(Loading("weights", fraction))

    return tell


def _budget(model: LoadedModel, asked: int, chunk: int, draft: LoadedDraft | None) -> tuple[MemoryBudget, int]:
    """That of the served model, and how many bytes the draft model may use besides."""
    usable = mx.device_info().get("max_recommended_working_set_size") if not model.on_cpu else None
    weights = model.weight_bytes + (draft.model.weight_bytes if draft is not None else 0)
    limit = int(usable * 0.9 if isinstance(usable, int) else total_memory() * 0.7) - weights
    limit = asked or max(limit, LEAST_KV_BYTES)
    draft_bytes = draft.share_of(limit, model) if draft is not None else 0
    budget = MemoryBudget(
        kv_bytes_per_token=model.token_bytes,
        window_bytes_per_row=model.row_bytes,
        limit_bytes=limit - draft_bytes,
        chunk_window_bytes=model.chunk_token_bytes * chunk,
        exact_bytes_per_token=model.exact_bytes if model.form.packs else 0,
        exact_window_bytes=model.exact_row_bytes if model.form.packs else 0,
        exact_tokens=model.form.packing.start if model.form.packs else 0,
    )
    return budget, draft_bytes


def _within_memory(model: LoadedModel, budget: MemoryBudget) -> LoadedModel:
    """The model with a context that one request can really fill. Raises ModelError when not even a short one fits."""
    longest = budget.longest(model.context_length)
    if longest < min(LEAST_CONTEXT, model.context_length):
        raise ModelError(
            f"kv_memory_mb: {budget.limit_bytes >> 20} MiB hold a request of {longest} tokens; "
            f"at least {LEAST_CONTEXT} must fit"
        )
    if longest < model.context_length:
        fields = kv(context=longest, model_context=model.context_length, kv_memory_mb=budget.limit_bytes >> 20)
        log.warning("memory for keys and values allows a shorter context than the model's", extra=fields)
    return replace(model, context_length=longest)
