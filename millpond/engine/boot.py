"""From a Start message to a running engine that has run a forward and reported readiness."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from millpond.engine.boot_speculation import open_speculator
from millpond.engine.executor import Executor
from millpond.engine.group import ALONE, Group
from millpond.engine.link import FrontEndLink
from millpond.engine.loop import Engine
from millpond.engine.prepare import prepare
from millpond.engine.steady import NO_GUESSES
from millpond.model.pooling import Embedder
from millpond.observe.log import fields
from millpond.schedule.scheduler import Limits, Scheduler
from millpond.types import ModelInfo, SpecMode
from millpond.wire import Loading, Ready, Start

log = logging.getLogger(__name__)


def boot(start: Start, blas: str, link: FrontEndLink, group: Group = ALONE) -> Engine:
    """Load the model and return an engine that has run a forward; progress and readiness go to ``link``.

    Raises ModelError when the model cannot be served.
    """
    began = time.monotonic()
    folder = Path(start.model_path)
    ready = prepare(start, folder, _percent_by_percent(link), link.inbox.put, group, blas)
    model, capabilities, budget = ready.model, ready.capabilities, ready.budget
    unguessed = NO_GUESSES if ready.steady else capabilities.forward_only
    executor = Executor(ready, group)
    speculator = open_speculator(
        start.spec,
        model,
        capabilities,
        ready.costs,
        ready.content,
        ready.draft,
        ready.draft_bytes,
        lambda: executor.lane,
        group,
        unguessed,
    )
    limits = Limits(
        start.max_batch, start.max_itl_ms, budget.chunk, together=capabilities.together, steady=ready.steady
    )
    scheduler = Scheduler(limits, budget, ready.costs)
    engine = Engine(ready, scheduler, executor, speculator, link.inbox, link)
    lane, elapsed = "slots" if capabilities.slots else "solo", round(time.monotonic() - began, 2)
    loaded = fields(folder=folder.name, kv_format=model.form.packing.described(model.dtype), seconds=elapsed)
    log.info("model loaded", extra=loaded)
    for remark in model.remarks:
        log.warning("the model's files are not followed to the letter", extra=fields(remark=remark))
    if capabilities.reason:
        log.warning("this model runs without a batched forward", extra=fields(reason=capabilities.reason))
    if ready.uncached:
        log.warning("prefixes of this model are not cached", extra=fields(reason=ready.uncached))
    if not capabilities.pipelined and not model.on_cpu:
        log.warning("steps in flight would copy the rows: each is launched once the one before it has been read")
    if not speculator.modes and start.spec.default.mode is not SpecMode.OFF:
        log.warning("tokens of this model are not guessed ahead", extra=fields(reason=unguessed))
    if ready.unguided:
        log.warning("answers of this model cannot follow a grammar", extra=fields(reason=ready.unguided))
    if ready.steady:
        log.info("answers are deterministic", extra=fields(costs=ready.steady_costs))
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
                kv_bytes_per_token=model.sizes.token_bytes,
                max_batch=start.max_batch,
                pipelined=capabilities.pipelined,
                fingerprint=ready.content,
                weight_bytes=model.weight_bytes,
                kv_limit_bytes=budget.limit_bytes,
                kv_format=model.form.packing.described(model.dtype),
                prefix_cache="" if ready.uncached else "+".join(ready.prefixes.kinds),
                prefix_cache_reason=ready.uncached,
                speculation=[mode.value for mode in speculator.modes],
                speculation_reason="" if speculator.modes else unguessed,
                deterministic=ready.steady_costs,
                alike=capabilities.alike,
                ranks=group.world,
                grammars=ready.unguided,
                remarks=list(model.remarks),
                embedding_size=model.embedder.size if isinstance(model.embedder, Embedder) else 0,
                embedding_reason=model.embedder if isinstance(model.embedder, str) else "",
            )
        )
    )
    return engine


def _percent_by_percent(link: FrontEndLink) -> Callable[[str, float], None]:
    told: tuple[str, int] = ("", -1)

    def tell(stage: str, fraction: float) -> None:
        nonlocal told
        if (stage, int(fraction * 100)) != told:
            told = stage, int(fraction * 100)
            link.send(Loading(stage, fraction))

    return tell
