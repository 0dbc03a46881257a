"""From a Start message to a model that this rank can run: load, probe, warm up, plan memory, open the cache."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from millpond.engine.boot_speculation import open_draft
from millpond.engine.chunk import measured, unmeasured
from millpond.engine.group import Group, RankReport
from millpond.engine.prefixes import Prefixes
from millpond.engine.steady import CHUNK as STEADY_CHUNK
from millpond.engine.steady import check_chunk, made_by, steadied
from millpond.engine.warm_up import first_costs, warm_up, warm_up_all
from millpond.grammar.lexicon import Lexicon, LexiconError
from millpond.hub.cache import NoCache, prefix_folder
from millpond.hub.errors import SourceError
from millpond.hub.fingerprint import folder_fingerprint
from millpond.hub.progress import SilentProgress
from millpond.memory.budget import MemoryBudget
from millpond.memory.machine import free_memory, total_memory
from millpond.memory.shares import blocks_limit, draft_limit, kv_limit, scores_limit, wired_limit
from millpond.model.blocks import BlockFormat, ReadRecord, agree
from millpond.model.load import LoadedModel, ModelError
from millpond.model.opened import OpenModel, open_model
from millpond.model.probe import Capabilities
from millpond.native import device
from millpond.observe.log import fields
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Opened, SsdEvent
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.keys import Namespace
from millpond.schedule.costs import CostModel
from millpond.settings import PrefixSettings
from millpond.text.tokenizer import Tokenizer, TokenizerError
from millpond.types import SpecMode
from millpond.wire import Start

log = logging.getLogger(__name__)

LEAST_CONTEXT = 256
"""A server that cannot hold one request of this many tokens is of no use."""
OPEN_SECONDS = 10.0
"""How long the start waits for the SSD tier's index."""
OTHERS_SECONDS = 1.0
"""Longer than rank 0 another rank may read from its disk."""
BUFFER_CACHE_BYTES = 512 * 1024 * 1024
"""Freed buffers MLX may keep for reuse; without a limit they grow to the largest prompt ever read."""
LONGEST_TOLD = 1 << 21
"""Tokens of a request that fit into one message to another rank."""


@dataclass(frozen=True)
class Prepared:
    """This rank, ready to run."""

    model: LoadedModel
    capabilities: Capabilities
    costs: CostModel
    budget: MemoryBudget
    prefixes: Prefixes
    uncached: str = ""
    """Why prefixes are not cached; empty when they are."""
    content: str = ""
    """Digest of weights and config."""
    mlx_group: mx.distributed.Group | None = None
    draft: OpenModel | None = None
    draft_bytes: int = 0
    vocabulary: Lexicon | None = None
    """What grammars are followed with, on the rank that draws; None where that cannot be."""
    unguided: str = ""
    """Why it cannot be."""
    steady: int = 0
    """Tokens of each chunk of a prompt where answers are to be the same whatever the load; else 0."""
    steady_costs: str = ""
    """What is done for that and what it costs, for people."""


def prepare(
    start: Start,
    folder: Path,
    progress: Callable[[str, float], None],
    deliver: Callable[[SsdEvent], None],
    group: Group,
    blas: str = "",
) -> Prepared:
    """Load the model, or this rank's share of it, and run a forward. ``progress`` gets a stage and how far it has come,
    in [0, 1]; ``deliver`` gets what the SSD tier has to say, on its threads. ``blas``: what a CPU multiplies with.

    Raises ModelError when the model cannot be served.
    """
    mx.set_cache_limit(BUFFER_CACHE_BYTES)
    room = _device_room(group.neighbours)
    drafter = Path(start.spec.draft_path) if start.spec.draft_path and group.rank == 0 else None
    with ThreadPoolExecutor(max_workers=2) as pool:  # they read files only, beside the load
        digest = pool.submit(_digest, folder)
        tokenizer = pool.submit(Tokenizer.load, folder) if group.rank == 0 else None
        draft_digest = pool.submit(_digest, drafter) if drafter is not None else None
        mlx_group = group.join(digest.result()) if group.world > 1 else None
        opened = open_model(
            folder,
            digest.result,
            context_length=start.context_length,
            packing=start.packing,
            group=mlx_group,
            progress=progress,
            share=(group.rank, group.world),
            unanimous=group.unanimous,
            head=start.spec.head and not start.deterministic,
        )
        if start.spec.default.mode is SpecMode.MTP and opened.model.headless:
            raise ModelError(
                f"spec: mtp cannot be used with this model, whose MTP head is not in use: {opened.model.headless}. "
                "Leave spec out to serve it"
            )
        steady = min(start.prefill_chunk or STEADY_CHUNK, STEADY_CHUNK) if start.deterministic else 0
        costs_of_it = ""
        if steady:
            opened, costs_of_it = steadied(opened, start.max_batch, steady, group.world)
        model, capabilities, content = opened.model, opened.capabilities, opened.content
        warm_up(model, capabilities)
        costs = CostModel()
        chunk = start.prefill_chunk or unmeasured(model)
        try:
            warm_up_all(model, capabilities)
            first_costs(model, costs)
            if not start.prefill_chunk and group.world == 1:
                chunk = measured(model, content)
        except Exception:  # model code and kernels raise what they like, and most requests need none of it
            if group.world > 1:
                raise  # nobody knows how far the others have come
            log.exception("not everything could be tried before the first request")
        vocabulary, unguided = _vocabulary(tokenizer, model) if tokenizer is not None else (None, "")
        draft = None
        if drafter is not None and draft_digest is not None and capabilities.slots:
            draft = open_draft(drafter, folder, draft_digest.result())
    budget, draft_bytes = _budget(model, start.kv_memory_bytes, chunk, draft, room, group.neighbours)
    wired = None if start.wired_bytes is None else start.wired_bytes // group.neighbours
    _wire(wired, model.weight_bytes + (draft.model.weight_bytes if draft is not None else 0), budget)
    layers = tuple(model.blocks.layers) if isinstance(model.blocks, BlockFormat) else (repr(model.form), *model.kinds)
    found = group.settle(RankReport(capabilities=capabilities, limit_bytes=budget.limit_bytes, layers=layers))
    capabilities, budget = found.capabilities, replace(budget, limit_bytes=found.limit_bytes)
    model = _within_memory(model, budget, model.context_length if mlx_group is None else LONGEST_TOLD)
    check_chunk(steady, budget, model.context_length)
    uncached = capabilities.uncached or ("cache_ram: 0 bytes" if start.prefix.cache_ram == 0 else "")
    prefixes = Prefixes(model.network, model.form, None, None)
    if not uncached and isinstance(model.blocks, BlockFormat):
        free = None if start.kv_memory_bytes else _free()
        kept_as = f"{model.blocks.kept_as} by {made_by(blas)}" if steady else model.blocks.kept_as
        prefixes = _prefixes(start.prefix, model, model.blocks, budget, content, kept_as, costs, deliver, group, free)
    return Prepared(
        model=model,
        capabilities=capabilities,
        content=content,
        mlx_group=mlx_group,
        costs=costs,
        budget=budget,
        prefixes=prefixes,
        uncached=uncached,
        draft=draft,
        draft_bytes=draft_bytes,
        vocabulary=vocabulary,
        unguided=unguided,
        steady=steady,
        steady_costs=costs_of_it,
    )


def _vocabulary(loading: Future[Tokenizer], model: LoadedModel) -> tuple[Lexicon | None, str]:
    """What grammars are followed with, or why none can be."""
    try:
        tokenizer = loading.result()
        ends, tokens = tokenizer.eos_token_ids, tokenizer.vocab_size
        return Lexicon(tokenizer.to_json(), tokens, model.vocab_size, ends, tokenizer.token_bytes), ""
    except (TokenizerError, LexiconError) as error:
        return None, str(error)


def _digest(folder: Path) -> str:
    try:
        return folder_fingerprint(folder, SilentProgress())
    except (SourceError, OSError) as error:
        raise ModelError(f"cannot read the model in {str(folder)!r}: {error}") from error


def _prefixes(
    settings: PrefixSettings,
    model: LoadedModel,
    blocks: BlockFormat,
    budget: MemoryBudget,
    content: str,
    kept_as: str,
    costs: CostModel,
    deliver: Callable[[SsdEvent], None],
    group: Group,
    free: int | None,
) -> Prefixes:
    namespace = Namespace(
        weights=content, kv_format=kept_as, layers=list(blocks.layers), rank=group.rank, world=group.world
    ).digest
    limit = blocks_limit(settings.cache_ram, budget.limit_bytes, group.neighbours, free)
    selfcheck = settings.cache_selfcheck if group.rank == 0 else 0
    same = partial(agree, blocks.form, loose=blocks.loose)
    cache = PrefixCache(namespace, blocks.layout, limit, ReadRecord, same, selfcheck)
    folder = _ssd_folder(settings) if settings.cache_ssd else None
    if folder is None:
        return Prefixes(model.network, model.form, blocks, cache)
    opened = threading.Event()

    def notify(event: SsdEvent) -> None:
        deliver(event)
        if isinstance(event, Opened):
            opened.set()

    ssd = SsdTier(folder, namespace, settings, notify)

    def prefill_seconds(start: int, tokens: int) -> float:
        seconds = costs.prefill_ms(start, tokens) / 1000
        # Rank 0 decides whether reading pays; the others read, unless it takes far too long.
        return seconds if group.rank == 0 else OTHERS_SECONDS + 2 * seconds

    cache.attach(ssd, settings.ssd_policy, prefill_seconds)
    ssd.start()
    if not opened.wait(OPEN_SECONDS):  # so that the first requests find what is on disk
        log.warning("the SSD tier is still opening", extra=fields(seconds=OPEN_SECONDS))
    return Prefixes(model.network, model.form, blocks, cache, ssd)


def _ssd_folder(settings: PrefixSettings) -> Path | None:
    """Where the SSD tier is on this machine; None, and said so, where there is no folder for it."""
    try:
        return Path(settings.cache_dir) if settings.cache_dir else prefix_folder()
    except NoCache as error:
        log.warning("prefixes are kept in memory only", extra=fields(reason=error))
        return None


def _device_room(neighbours: int) -> int | None:
    """Bytes on the GPU for us, before anything is loaded; None on a CPU, and where that is not told. What other
    programs hold is theirs, but of ``neighbours`` that load at the same time each would count the others' weights."""
    found = device.memory()
    if found is None or found.free is None or neighbours > 1:
        return None if found is None else found.total
    return min(found.total, found.free)


def _free() -> int | None:
    """Bytes that nobody uses now, of the machine and of the GPU; None where neither is told (Macs)."""
    found = device.memory()
    both = free_memory(), None if found is None else found.free  # what was read from disk is in the machine's
    return min((free for free in both if free is not None), default=None)


def _budget(
    model: LoadedModel, asked: int, chunk: int, draft: OpenModel | None, room: int | None, neighbours: int
) -> tuple[MemoryBudget, int]:
    """That of the served model, and how many bytes the draft model may use besides. ``asked``, the ``room`` on the GPU
    and the machine's memory are for so many ``neighbours`` together."""
    weights = model.weight_bytes + (draft.model.weight_bytes if draft is not None else 0)
    limit = kv_limit(asked, weights, room, total_memory(), neighbours)
    draft_bytes = draft_limit(limit, model.sizes, draft.model.sizes) if draft is not None else 0
    scores = scores_limit(room, total_memory(), neighbours)
    return MemoryBudget(model.sizes, limit - draft_bytes, chunk, model.score_bytes, scores), draft_bytes


def _wire(asked: int | None, weight_bytes: int, budget: MemoryBudget) -> None:
    """Keep weights, keys and values from being swapped out, where a GPU's memory is the machine's. ``asked``: so many
    bytes, None where it is for us to choose. Raises ModelError."""
    most = device.wirable()
    if asked and asked > most:
        what = f"{most >> 20} MiB" if most else "none of a CPU's or a CUDA card's memory"
        raise ModelError(f"wired_memory_mb: {asked >> 20} is more than can be wired: {what}")
    wired = wired_limit(asked, weight_bytes, budget.limit_bytes, most, total_memory())
    if wired:
        mx.set_wired_limit(wired)
        log.info("memory is wired", extra=fields(mb=wired >> 20))


def _within_memory(model: LoadedModel, budget: MemoryBudget, most: int) -> LoadedModel:
    """The model with a context that one request can really fill, of at most ``most`` tokens. Raises ModelError when not
    even a short one fits."""
    longest = min(budget.longest(model.context_length), most)
    if longest < min(LEAST_CONTEXT, model.context_length):
        raise ModelError(
            f"kv_memory_mb: {budget.limit_bytes >> 20} MiB hold a request of {longest} tokens; "
            f"at least {LEAST_CONTEXT} must fit"
        )
    if longest < model.context_length:
        told = fields(context=longest, model_context=model.context_length, kv_memory_mb=budget.limit_bytes >> 20)
        log.warning("memory for keys and values allows a shorter context than the model's", extra=told)
    return replace(model, context_length=longest)
