"""Carries out what the loop decides: the part of the engine that every rank of a group runs. Decides nothing itself.

Each method tells the other ranks first and then does its work, so they take part in its collectives. What must be equal
on all ranks before a forward (which rows, how long, which tokens) has a digest that travels with it. Engine thread
only.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Many
from functools import partial

from msgspec.structs import replace

from millpond.engine.group import ALONE, Group, GroupBroken
from millpond.engine.inflight import InflightStep, Steps
from millpond.engine.orders import (
    Arrive,
    Begin,
    Close,
    Decode,
    Depart,
    Fit,
    Launch,
    Order,
    Prefill,
    SetAside,
    Took,
    Trim,
)
from millpond.engine.prepare import Prepared
from millpond.engine.sequence import Sequence
from millpond.grammar.constraint import Constraint
from millpond.kv.batch import Batch
from millpond.model.forwards import prefill, prefill_together
from millpond.model.pooling import Embedder, Pooled
from millpond.model.scoring import score
from millpond.model.shard import agreement
from millpond.sample.state import SamplingState
from millpond.types import PrefillChunk, Request


class Executor:
    """Sequences, rows, forwards and cached blocks of one rank."""

    def __init__(self, ready: Prepared, group: Group = ALONE) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.group = group
        self.prefixes = ready.prefixes
        self._model = ready.model
        self._new_lane = partial(ready.capabilities.lane, ready.model, ready.budget.limit_bytes)
        self._unread: deque[InflightStep] = deque()
        """Forwards that have not been read, oldest first."""
        agree = agreement(ready.mlx_group) if ready.mlx_group is not None else None
        self._steps = Steps(ready.model.network, ready.model.vocab_size, agree)
        self.lane = self._new_lane()

    @property
    def batch(self) -> Batch:
        """Who has which row."""
        return self.lane.batch

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states of rows and prompts."""
        prompts = (sequence.prompt for sequence in self.sequences.values())
        held = sum(prompt.nbytes for prompt in prompts if prompt is not None)
        return self.lane.nbytes + held + self.prefixes.assembling_bytes

    @property
    def state(self) -> int:
        """crc32 over the rows: whose they are, how long, and their newest tokens."""
        batch = self.batch
        newest = [self.sequences[name].tokens[-1] for name in batch.names]
        named = zlib.crc32("\0".join(batch.names).encode())
        return zlib.crc32(array("q", [*batch.lengths, *newest]).tobytes(), named)

    # --- requests ---------------------------------------------------------------------------------------------

    def arrive(self, request: Request, constraint: Constraint | None = None) -> Sequence:
        """A new request waits, whose answer has to satisfy ``constraint``: that is the business of the rank that draws.
        What is its own is made now, where it fails alone: raises what that raises, and nothing has happened then."""
        sampling = SamplingState(request.params, self._model.vocab_size, request.tokens, constraint)
        embedder = self._model.embedder
        pooled = Pooled(embedder) if request.pooled and isinstance(embedder, Embedder) else None
        sequence = Sequence(request, sampling, pooled=pooled)
        if not sequence.apart:
            self.prefixes.arrive(sequence)
        self.group.tell(Arrive(replace(request, prediction=[], grammar=None)))
        self.sequences[request.id] = sequence
        return sequence

    def begin(self, name: str, position: int) -> bool:
        """Give a prompt its caches, restored up to ``position``. False: some rank cannot restore as much, and the
        prompt has to be begun again with less. Raises what restoring raises."""
        sequence = self.sequences[name]
        check = sequence.query is not None and sequence.query.check
        least = self.group.restorable(Begin(name, position, check))
        if least < position:
            self.set_aside(name)
            self.prefixes.cap(sequence, least)
            return False
        sequence.read_into(self.prefixes.begin(sequence, position, alone=not len(self.batch)))
        return True

    def read(self, chunks: Many[PrefillChunk]) -> None:
        """Read chunks of different prompts in one forward. ``chunk_read`` goes on with each. Raises what the model's
        code raises; what its prompts hold is of no use then."""
        self.group.tell(Prefill(tuple(chunks)))
        if any(self.sequences[chunk.id].apart for chunk in chunks):
            for chunk in chunks:
                self._read_alone(self.sequences[chunk.id], chunk)
            return
        prompts, parts = [], []
        for chunk in chunks:
            sequence = self.sequences[chunk.id]
            assert sequence.prompt is not None
            prompts.append(sequence.prompt)
            parts.append(sequence.tokens[chunk.start : chunk.end])
        if len(prompts) == 1:
            prefill(self._model.network, prompts[0], parts[0])
        else:
            prefill_together(self._model.network, prompts, parts)

    def _read_alone(self, sequence: Sequence, chunk: PrefillChunk) -> None:
        """Read a chunk for a vector; or, of what has not been measured of its prompt before, what the model thinks of
        it, too."""
        assert sequence.prompt is not None
        if sequence.pooled is not None:
            sequence.pooled.read(sequence.prompt, sequence.tokens[chunk.start : chunk.end])
            return
        network, count = self._model.network, sequence.request.params.prompt_logprobs
        begin, end = chunk.start, chunk.end
        if count is not None:
            begin = min(end, max(begin, sequence.scored))
            end = max(begin, min(end, sequence.prompt_length - 1))
            prefill(network, sequence.prompt, sequence.tokens[chunk.start : begin])
            following = sequence.tokens[begin + 1 : end + 1]
            sequence.scores += score(network, sequence.prompt, sequence.tokens[begin:end], following, count)
            sequence.scored = max(sequence.scored, end)
            begin = end
        prefill(network, sequence.prompt, sequence.tokens[begin : chunk.end])

    def chunk_read(self, chunk: PrefillChunk) -> None:
        """Keep the blocks that a chunk fills; after its last one a prompt gets the next row, if an answer is wanted.
        Raises what MLX raises."""
        sequence = self.sequences[chunk.id]
        assert sequence.prompt is not None
        if sequence.pooled is not None:
            return
        self.prefixes.chunk_done(sequence, chunk.start, chunk.end)
        self.lane.reserve(len(sequence.tokens) - 1, chunk.end / len(sequence.tokens))
        if chunk.last:
            self.prefixes.prompt_done(sequence, chunk.end)
            self.lane.adopt(chunk.id, sequence.prompt)
            sequence.joined()

    def set_aside(self, name: str, *, kept: bool = False) -> None:
        """Take a request's row, or what has been read of its prompt. Nothing may be in flight. ``kept``: what its row
        holds is sound, and stays in the prefix cache, from where the request will go on."""
        sequence = self.sequences[name]
        self.group.tell(SetAside(name, sequence.dirty, kept))
        if kept and name in self.batch:
            self.prefixes.row_done(sequence, self.lane)
        self._free(sequence)
        self._lost(sequence)

    def depart(self, name: str) -> Sequence:
        """Give back everything that a request holds; its answer's blocks stay unless it is poisoned. Nothing may be in
        flight."""
        sequence = self.sequences.pop(name)
        self.group.tell(Depart(name, sequence.dirty, sequence.poisoned))
        if name in self.batch:
            self.prefixes.row_done(sequence, self.lane)
        self._free(sequence)
        return sequence

    def _free(self, sequence: Sequence) -> None:
        """Its row, or what has been read of its prompt and the room that was made for that."""
        name = sequence.request.id
        if sequence.prompt is not None:
            sequence.prompt = None
            self.lane.unreserve()
        if name in self.batch:
            assert not self._unread, "what a step draws belongs to the rows it was built for"
            self.lane.release(name, sequence.dirty)

    def _lost(self, sequence: Sequence) -> None:
        sequence.back_to_waiting()
        self.prefixes.lost(sequence)

    # --- forwards ---------------------------------------------------------------------------------------------

    def decode(self, drafts: Mapping[str, Many[int]], begun: float) -> InflightStep:
        """Build a forward over all rows, behind the unread one if there is one. ``drafts``: draft tokens of some of
        them; none at all for a plain step. Raises what the model's code raises."""
        ahead = self._unread[-1] if self._unread else None
        names = self.batch.names
        verified = tuple(tuple(drafts.get(name, ())) for name in names) if drafts else ()
        if self.group.world > 1:
            self.group.tell(Decode(verified, ahead is not None, self.state))
        sequences = [self.sequences[name] for name in names]
        if verified:
            step = self._steps.verifying(self.lane, sequences, verified, begun)
        else:
            step = self._steps.plain(self.lane, sequences, ahead, begun, self.prefixes.cuts)
        self._unread.append(step)
        return step

    def launch(self, step: InflightStep) -> None:
        """Start the computation of the newest forward, with its draws if nothing ahead of it is unread. Raises what
        the model's code raises."""
        if step is self._unread[0]:
            step.draw()
        if step.waiting:
            self.group.tell(Launch())
            step.launch()

    def took(self, step: InflightStep, tokens: tuple[tuple[int, ...], ...], kept: tuple[int, ...]) -> None:
        """The oldest forward has been read, and of what it drew for each row so much was taken."""
        if self.group.world > 1:
            poisoned = tuple(name for name in step.rows if self.sequences[name].poisoned)
            self.group.tell(Took(tokens, kept, poisoned))
        self._unread.popleft()
        cuts = step.cuts
        if step.drafts:
            before = self.batch.lengths
            self.lane.advance([max(1, count) for count in kept])
            cuts = self.prefixes.filled(before, self.lane)
        self.prefixes.step_read(cuts, self.sequences, self.lane)

    def rebuild(self) -> tuple[str, ...]:
        """A forward has failed: no row holds anything any more. Returns who had one, in row order. Raises GroupBroken
        where there are other ranks."""
        if self.group.world > 1:
            raise GroupBroken("a forward failed on rank 0, and nobody knows how far the others have come")
        rows = self.batch.names
        self._unread.clear()
        self._steps.forget()
        self.lane = self._new_lane()
        for name in rows:
            self._lost(self.sequences[name])
        return rows

    # --- memory -----------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Give back memory that the rows do not need."""
        self.group.tell(Trim())
        self.lane.trim()

    def fit(self, room_bytes: int) -> None:
        """Keep at most so many bytes of cached blocks."""
        self.group.tell(Fit(room_bytes))
        self.prefixes.fit(room_bytes)

    def close(self) -> None:
        """The other ranks save what they have, and go."""
        self.group.tell(Close())

    # --- what another rank decides ----------------------------------------------------------------------------

    def obey(self, order: Order) -> None:
        """Do what the rank that decides has told; Begin and Close are the follower's own business. Raises GroupBroken
        when the ranks have come apart, and what the model's code raises."""
        match order:
            case Arrive(request):
                self.arrive(request)
            case Prefill(chunks):
                self.read(chunks)
                for chunk in chunks:
                    self.chunk_read(chunk)
            case SetAside(name, scrub, kept):
                if scrub:
                    self.sequences[name].not_finite(guessed=True)
                self.set_aside(name, kept=kept)
            case Depart(name, scrub, poisoned):
                if scrub:
                    self.sequences[name].not_finite(guessed=not poisoned)
                self.depart(name)
            case Decode(drafts, behind, state):
                if behind != bool(self._unread) or state != self.state:
                    raise GroupBroken(f"rank 0 is in state {state:08x} with its rows, this rank in {self.state:08x}")
                self.decode(dict(zip(self.batch.names, drafts, strict=True)) if drafts else {}, 0.0)
            case Launch():
                self.launch(self._unread[-1])
            case Took(tokens, kept, poisoned):
                self._take(tokens, kept, poisoned)
            case Fit(room_bytes):
                self.fit(room_bytes)
            case Trim():
                self.trim()
            case _:
                raise GroupBroken(f"rank 0 told something that cannot be done now: {type(order).__name__}")

    def _take(self, tokens: tuple[tuple[int, ...], ...], kept: tuple[int, ...], poisoned: tuple[str, ...]) -> None:
        if not self._unread:
            raise GroupBroken("rank 0 has read a forward that this rank has not made")
        step = self._unread[0]
        drawn = step.drawn()
        mine = tuple(tuple(row.tokens) for row in drawn)
        if mine != tokens or len(kept) != len(tokens):
            raise GroupBroken(f"rank 0 drew {tokens}, this rank {mine}")
        for row, count in zip(drawn, kept, strict=True):
            sequence = self.sequences[row.name]
            if row.name in poisoned:
                sequence.not_finite(guessed=False)
            for token in row.tokens[:count]:
                sequence.commit(token)
        self.took(step, tokens, kept)
