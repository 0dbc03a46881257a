"""The engine's side of the prefix cache: what to offer, restore and keep of each sequence. Engine thread only.

Blocks are cut at the end of every prompt chunk, at the step in which a row fills one, when a prompt is adopted and when
an answer ends. A block is in the cache as soon as the step that filled it has been read.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from msgspec import structs

from millpond.engine.group import ALONE, Group
from millpond.engine.sequence import Sequence
from millpond.kv.arena import AT_ONCE_BYTES
from millpond.kv.format import KvFormat
from millpond.memory.allocator import take_ahead
from millpond.memory.budget import PREFILL_STEP, capacity_bucket
from millpond.model.assembly import Assembly
from millpond.model.blocks import BlockFormat, Stored, block_grid, cut_prompt, evaluated, finite
from millpond.model.lanes import Lane
from millpond.model.prompt import Prompt, new_prompt
from millpond.observe.log import fields
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Loaded, Opened, SsdEvent
from millpond.prefix.match import Part
from millpond.prefix.query import End, Offer, PrefixQuery
from millpond.prefix.records import BLOCK, Kind
from millpond.types import PrefixLoad, PrefixReport

if TYPE_CHECKING:
    from millpond.prefix.disk.stats import SsdStats
    from millpond.prefix.disk.tier import SsdTier

log = logging.getLogger(__name__)

READ_COPIES = 2
"""What is read from disk exists twice in memory when it is used: as blocks, and in a row."""
FLUSH_SECONDS = 5.0
"""How long an orderly stop may write."""

MOST_APART = 4096
"""Snapshots of recurrent layers are at most this many tokens apart."""
PURE_APART = 512
"""Their distance in models that have nothing but recurrent layers."""
SNAPSHOT_SHARE = 2
"""A snapshot may take one such part of the bytes that the tokens since the last one take."""


class Cut(NamedTuple):
    """A block that a decode step fills: scheduled with the step, kept once the step has been read."""

    name: str
    end: int
    records: dict[Kind, Stored]
    """Empty where they can be taken only then."""
    sound: mx.array
    """Whether all of it is finite."""

    def arrays(self) -> list[mx.array]:
        return [self.sound, *(array for record in self.records.values() for array in record.arrays)]


class Made(NamedTuple):
    """The records of the block [begin, end), lazily."""

    begin: int
    end: int
    records: dict[Kind, Stored]

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())


class _Assembling:
    """What the disk has given of the prefix of a request that waits for more, with nobody else there."""

    def __init__(self, name: str, parts: Many[Part], assembly: Assembly) -> None:
        self.name = name
        self.assembly = assembly
        self._parts = deque(parts)

    def go_on(self) -> None:
        """Put into place what has come, in order, but no more than a step may take."""
        room = AT_ONCE_BYTES
        while self._parts and room > 0 and (record := self._parts[0].node.records.get(Kind.KV)) is not None:
            self.assembly.put(self._parts.popleft())
            room -= record.nbytes


class Events(Protocol):
    """A queue in which the SSD tier's events come, and perhaps other things."""

    def get(self, *, timeout: float) -> object:
        """The next one. Raises queue.Empty."""


class Waiting(Protocol):
    """Who waits, and who wants to know what can be restored for them: the scheduler, or a follower's list."""

    @property
    def queue(self) -> Iterable[tuple[str, int]]:
        """Requests without a row and how many of their tokens have been read, in order of arrival."""

    def offer(
        self, name: str, cached: int, wants: bytes | None, held: bool = False, stops: tuple[int, ...] = ()
    ) -> None:
        """See Scheduler.offer."""


class Prefixes:
    """What the engine loop calls. Without a format nothing is cached and every method does the plain thing."""

    def __init__(
        self,
        network: nn.Module,
        kept_as: KvFormat,
        form: BlockFormat | None,
        cache: PrefixCache | None,
        ssd: SsdTier | None = None,
    ) -> None:
        self._network = network
        self._kept_as = kept_as
        self._form = form
        self._cache = cache
        self._ssd = ssd
        self._ends: Counter[bytes] = Counter()
        """Keys of the blocks with which the prompts of waiting requests end, and how many of them."""
        self._assembly: _Assembling | None = None
        self._not_assembled = ""
        """A request for which that has failed."""
        self._patient_until: float | None = None
        """Moment of the monotonic clock at which the first of those told to wait for the disk goes on without it."""

    @property
    def assembling_bytes(self) -> int:
        """Held for a request that has no row and no prompt yet."""
        return 0 if self._assembly is None else self._assembly.assembly.nbytes

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of records that are kept of this model."""
        return self._form.layout.kinds if self._form is not None else ()

    def load(self) -> PrefixLoad:
        """How the cache is doing."""
        cache = self._cache
        if cache is None:
            return PrefixLoad()
        saving_records, saving_bytes = cache.saving_load
        return PrefixLoad(
            ram_bytes=cache.nbytes,
            ram_blocks=cache.blocks,
            ram_snapshots=cache.snapshots,
            ram_snapshot_bytes=cache.snapshot_bytes,
            ram_limit=cache.limit_bytes,
            saving_records=saving_records,
            saving_bytes=saving_bytes,
            ssd=_figures(self._ssd.stats) if self._ssd is not None else {},
            counters=structs.replace(cache.counters),
        )

    def explain(self, tokens: Many[int], salt: str) -> PrefixReport:
        """What the cache would do for a prompt, without doing it."""
        if self._cache is None or not tokens:
            return PrefixReport()
        query = self._cache.query(tokens, salt)
        memory, both = self._cache.plan(query, disk=False), self._cache.plan(query, disk=True)
        end, known = self._cache.explain(query, both.position)
        return PrefixReport(memory.position, both.position - memory.position, end.value, known)

    # --- the disk ---------------------------------------------------------------------------------------------

    def on_event(self, event: SsdEvent) -> None:
        """The SSD tier has something to say."""
        if self._cache is not None:
            self._cache.on_event(event)
        if isinstance(event, Loaded) and self._ssd is not None:
            self._ssd.taken()
        if isinstance(event, Opened):
            take_ahead(READ_COPIES * sum(entry.nbytes for entry in event.entries))

    def patience(self, now: float) -> float | None:
        """Seconds after which a request that waits for the disk goes on without it; None: nobody waits."""
        return None if self._patient_until is None else max(0.0, self._patient_until - now)

    def close(self, inbox: Events) -> None:
        """Save what an orderly stop should keep, within FLUSH_SECONDS; ``inbox`` has what the SSD tier says of it."""
        if self._cache is None or self._ssd is None:
            return
        ends = time.monotonic() + FLUSH_SECONDS
        self._cache.save_live()
        self._cache.housekeep()
        while self._cache.saving and (left := ends - time.monotonic()) > 0:
            try:
                event = inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(event, SsdEvent):
                self.on_event(event)
                self._cache.housekeep()
        if not self._ssd.close(max(0.1, ends - time.monotonic())) or self._cache.saving:
            log.warning("stopped before everything was written", extra=fields(seconds=FLUSH_SECONDS))

    # --- waiting ----------------------------------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """A new request."""
        if self._cache is not None:
            sequence.query = self._cache.query(sequence.tokens, sequence.request.cache_salt)

    def lost(self, sequence: Sequence) -> None:
        """What was computed of it is gone; it begins again with all its tokens."""
        if sequence.query is not None:
            sequence.query.restart(sequence.tokens)
            if self._cache is not None:
                self._cache.will_return(sequence.query)

    def cap(self, sequence: Sequence, ceiling: int) -> None:
        """Restore at most so much of a waiting request, until told otherwise."""
        if sequence.query is not None:
            sequence.query.cap(ceiling)

    def restorable(self, sequence: Sequence, most: int, check: bool) -> int:
        """How much of a waiting request can be restored now, up to ``most``, as rank 0 has planned it. ``check``: what
        it computes is to be compared."""
        if self._cache is None or sequence.query is None:
            return 0
        sequence.query.cap(most)
        sequence.query.check = check
        return self._cache.plan(sequence.query, disk=False).position if most else 0

    def offer(
        self, waiting: Waiting, sequences: dict[str, Sequence], now: float, group: Group = ALONE, room_bytes: int = 0
    ) -> None:
        """Tell the scheduler what can be restored for whom, by the whole ``group``. Call it right before each plan.
        ``room_bytes``: memory for keys and values where nobody has a row; else 0."""
        if self._cache is None or self._form is None:
            return
        self._cache.housekeep()
        self._ends.clear()
        for name, done in waiting.queue:
            query = sequences[name].query
            if query is None:
                waiting.offer(name, 0, None)
                continue
            self._ends[query.last_key] += 1
            if done:
                waiting.offer(name, 0, self._cache.wants(query, done), stops=sequences[name].stops)
            else:
                offer = self._offer_by_all(name, query, now, group)
                step = self._form.layout.step
                if self._form.layout.state:
                    shared = (place // BLOCK * BLOCK for place in sequences[name].request.shared)
                    places = {query.match.depth, *shared}
                    sequences[name].stops = tuple(sorted({place // step * step for place in places}))
                waiting.offer(name, offer.position, offer.wants, offer.held, sequences[name].stops)
        # Of the very moment for which they were told to wait: one a little later would miss a deadline in between.
        self._assemble(waiting, sequences, room_bytes if group.world == 1 else 0)
        patience = self._cache.patience(now)
        self._patient_until = None if patience is None else now + patience

    def _assemble(self, waiting: Waiting, sequences: dict[str, Sequence], room_bytes: int) -> None:
        """Put what a lone request waits for into place while the disk reads on, if there is memory for it."""
        found, self._assembly = self._assembly, None
        queue = list(waiting.queue)
        if not room_bytes or len(queue) != 1 or queue[0][1] or queue[0][0] == self._not_assembled:
            return
        try:
            if found is None or found.name != queue[0][0]:
                found = self._assembling(sequences[queue[0][0]], room_bytes)
            if found is not None:
                found.go_on()
        except Exception:  # it is put together when it begins, and what goes wrong there is its own affair
            log.exception("a prefix could not be put together ahead of its request")
            self._not_assembled, found = queue[0][0], None
        self._assembly = found

    def _assembling(self, sequence: Sequence, room_bytes: int) -> _Assembling | None:
        """What a request that waits for the disk can be put together in; None where there is no such, or no room."""
        cache, form, query = self._cache, self._form, sequence.query
        if cache is None or form is None or query is None or query.load is None:
            return None
        plan = query.target
        columns = max(plan.position, _room(len(sequence.tokens) - 1, plan.position, alone=True))
        if columns * form.token_bytes + cache.nbytes + query.fetched_bytes > room_bytes:
            return None
        return _Assembling(sequence.request.id, plan.parts, Assembly(form, plan.position, columns))

    def _offer_by_all(self, name: str, query: PrefixQuery, now: float, group: Group) -> Offer:
        """What all ranks can restore: no more than the one that has least, which may still be reading."""
        assert self._cache is not None
        ceiling, held = group.ceiling(name)
        if ceiling is None:
            return self._cache.offer(query, now)
        if ceiling > query.match.ceiling:
            query.cap(ceiling)
        offer = self._cache.offer(query, now)
        if offer.held or offer.position <= ceiling:
            return offer
        if held:
            return replace(offer, held=True)
        query.cap(ceiling)
        return self._cache.offer(query, now)

    # --- reading a prompt -------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence, position: int, alone: bool) -> Prompt:
        """The prompt to go on with, ``position`` of its tokens restored. ``alone``: there is no row."""
        found, self._assembly = self._assembly, None
        total = len(sequence.tokens) - 1
        if self._cache is None or self._form is None or sequence.query is None:
            unwanted = self._cache is not None and sequence.apart
            sequence.report = sequence.report or PrefixReport(end=(End.UNWANTED if unwanted else End.OFF).value)
            return new_prompt(self._network, self._kept_as, total)
        end, known = self._cache.explain(sequence.query, position)
        plan = self._cache.take(sequence.query, position)
        if sequence.report is None:
            disk = sum(part.used for part in plan.parts if part.node.key in sequence.query.loaded)
            sequence.report = PrefixReport(position - disk, disk, end.value, known)
        sequence.snapshot_at = position
        if position == 0:
            return new_prompt(self._network, self._kept_as, total)
        if found is not None and (found.name, found.assembly.position, alone) == (sequence.request.id, position, True):
            for part in plan.parts:
                found.assembly.put(part)
            return found.assembly.finished(self._network, plan, whole=position == total)
        capacity = _room(total, position, alone=alone)
        return self._form.restored(self._network, plan, capacity, whole=position == total)

    def fit(self, room_bytes: int) -> None:
        """Keep at most this many bytes of blocks: rows and prompts come first."""
        if self._cache is not None:
            self._cache.fit(room_bytes)

    def chunk_done(self, sequence: Sequence, start: int, end: int) -> None:
        """Keep the blocks that a chunk has completed."""
        cache, form, query = self._cache, self._form, sequence.query
        if cache is None or form is None or query is None or sequence.prompt is None:
            return
        cache.counters.computed_tokens += end - start
        if end % form.layout.step:
            return  # read in a shorter forward than those that will look for it
        made: list[Made] = []
        lasting = tuple(kind for kind in form.layout.kinds if kind is not Kind.STATE)
        for begin, stop in block_grid(start, end):
            kinds = cache.missing(query, begin, stop, lasting, behind_new=bool(made))
            records = {kind: cut_prompt(form, sequence.prompt, begin, stop, kind) for kind in kinds}
            if form.layout.state and stop == end and self._snapshot_due(sequence, end):
                records[Kind.STATE] = cut_prompt(form, sequence.prompt, begin, stop, Kind.STATE)
                sequence.snapshot_at = end
            if records:
                made.append(Made(begin, stop, records))
            if sum(block.nbytes for block in made) > AT_ONCE_BYTES:
                self._keep(sequence, made)
                made = []
        self._keep(sequence, made)

    def prompt_done(self, sequence: Sequence, end: int) -> None:
        """The prompt is about to be adopted: keep its tail, and a snapshot at its end."""
        cache, form, query = self._cache, self._form, sequence.query
        if cache is None or form is None or query is None or sequence.prompt is None:
            return
        cache.counters.computed_tokens += 1  # the last token, in the coming step
        end -= end % form.layout.step
        if end == 0:
            return
        begin = (end - 1) // BLOCK * BLOCK
        if form.layout.step == 1 and (form.layout.exact or self._ends[query.last_key] > 1):
            # Otherwise the block that the answer fills, or its tail, will hold these tokens too.
            kinds = cache.missing(query, begin, end, form.layout.kinds)
            records = {kind: cut_prompt(form, sequence.prompt, begin, end, kind) for kind in kinds}
            self._keep(sequence, [Made(begin, end, records)])
        cache.end_at(query, end, last=False)

    def _snapshot_due(self, sequence: Sequence, end: int) -> bool:
        assert self._form is not None
        if end in sequence.stops:
            return True
        per_token = self._form.token_bytes
        apart = SNAPSHOT_SHARE * self._form.state_bytes // per_token if per_token else PURE_APART
        return end - sequence.snapshot_at >= min(apart, MOST_APART)

    def _keep(self, sequence: Sequence, made: Many[Made], sound: Many[bool] = ()) -> None:
        """Keep the blocks, in their order, of which everything is finite. ``sound``: whether, where it is known."""
        assert self._cache is not None
        assert sequence.query is not None
        made = [block for block in made if block.records]
        if not made:
            return
        sequence.query.match.chain.extend(sequence.processed)
        for block, good in zip(made, sound or evaluated([block.records for block in made]), strict=True):
            if good:
                self._cache.keep(sequence.query, block.begin, block.end, block.records)

    @property
    def _keeps_answers(self) -> bool:
        """Not where what is restored must be what reading it again would give: drawing rounds in another way."""
        return self._form is not None and self._form.layout.step == 1

    # --- drawing tokens ---------------------------------------------------------------------------------------

    def cuts(self, lane: Lane) -> list[Cut]:
        """Lazy copies of the blocks that the forward just dispatched fills."""
        if not self._keeps_answers:
            return []
        made = []
        for name, length in zip(lane.batch.names, lane.batch.lengths, strict=True):
            if length % BLOCK == 0:
                records = {} if lane.deferred else self._cut_row(lane, name, length - BLOCK, length)
                made.append(Cut(name, length, records, finite(records)))
        return made

    def filled(self, before: Many[int], lane: Lane) -> list[Cut]:
        """The blocks that rows have filled since they had the lengths ``before``, at most one each; nothing may be in
        flight, and they are cut when ``step_read`` is told of them."""
        if not self._keeps_answers:
            return []
        rows = zip(lane.batch.names, lane.batch.lengths, before, strict=True)
        grown = [(name, length // BLOCK * BLOCK, was) for name, length, was in rows]
        return [Cut(name, end, {}, finite({})) for name, end, was in grown if end > was]

    def _cut_row(self, lane: Lane, name: str, begin: int, end: int) -> dict[Kind, Stored]:
        assert self._form is not None
        records = {Kind.KV: self._form.spans(lane.spans(name, begin, end, Kind.KV), Kind.KV)}
        if self._form.layout.window:
            first = self._form.window_start(begin, end)
            records[Kind.WINDOW] = self._form.spans(lane.spans(name, first, end, Kind.WINDOW), Kind.WINDOW)
        return records

    def step_read(self, cuts: Many[Cut], sequences: dict[str, Sequence], lane: Lane) -> None:
        """The step that filled these blocks has been read; those of rows that went wrong are thrown away."""
        for cut in cuts:
            sequence = sequences[cut.name]
            if sequence.query is None or sequence.poisoned or len(sequence.processed) < cut.end:
                continue
            begin = cut.end - BLOCK
            if cut.records:
                self._keep(sequence, [Made(begin, cut.end, cut.records)], [bool(cut.sound.item())])
            else:
                self._keep(sequence, [Made(begin, cut.end, self._cut_row(lane, cut.name, begin, cut.end))])

    def row_done(self, sequence: Sequence, lane: Lane) -> None:
        """A request leaves its row: keep the tail of its answer, and a snapshot at its end. Nothing is in flight."""
        cache, form, query = self._cache, self._form, sequence.query
        if cache is None or form is None or query is None or sequence.poisoned or not self._keeps_answers:
            return
        name, processed = sequence.request.id, sequence.processed
        length = lane.batch.lengths[lane.batch.row(name)]
        end = min(length, len(processed))
        if end == 0:
            return
        query.match.chain.extend(processed)
        begin = (end - 1) // BLOCK * BLOCK
        kinds = cache.missing(query, begin, end, form.layout.kinds)
        records = self._cut_row(lane, name, begin, end) if Kind.KV in kinds or Kind.WINDOW in kinds else {}
        if Kind.STATE in kinds and length == end:
            records[Kind.STATE] = form.spans(lane.spans(name, begin, end, Kind.STATE), Kind.STATE)
        records = {kind: record for kind, record in records.items() if kind in kinds}
        self._keep(sequence, [Made(begin, end, records)])
        cache.end_at(query, end, last=True)


def _room(total: int, position: int, *, alone: bool) -> int:
    """Columns of a prompt of which ``position`` of ``total`` tokens are restored."""
    if position < total:
        return -(-total // PREFILL_STEP) * PREFILL_STEP
    return capacity_bucket(total + 1) if alone else 0  # becomes the arena as it is, or is copied into it


def _figures(stats: SsdStats) -> dict[str, int]:
    plain = {name: int(value) for name, value in structs.asdict(stats).items() if isinstance(value, int)}
    return plain | {"damaged": sum(stats.damaged.values())}
