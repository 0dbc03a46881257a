"""A small model that guesses what the served one will draw: all its rows in one batch, kept in step by their tokens.

The committed tokens of a request are the only truth. What a row holds beyond them are this model's own guesses; before
it goes on, it goes back to where they and the truth part. Nothing here is lost when the served model loses a row.

A guess is drawn as the served model will draw: with the request's parameters and the noise of the same position. Two
models that agree then draw the same token, whatever the temperature. Engine thread only. Model code may raise anything,
in ``read`` and in ``propose``; afterwards the draft holds no rows and is as good as new.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from millpond.kv.batch import Batch
from millpond.memory.budget import MemoryBudget
from millpond.model.forwards import prefill
from millpond.model.load import LoadedModel
from millpond.model.prompt import Prompt
from millpond.prefix.query import PrefixQuery
from millpond.sample.sampler import Picks
from millpond.sample.state import SamplingState
from millpond.speculate.draft_picks import DraftPicks
from millpond.speculate.draft_prompts import DraftPrompts, prompt_of_row
from millpond.speculate.proposer import DraftOffer, Proposer, Source
from millpond.types import GRID, MOST_DRAFT_TOKENS, Request, SpecMode

log = logging.getLogger(__name__)

CATCH_UP = 16
"""Tokens that a row may be behind, the newest one not counted: more are read like a prompt."""
ROOM = CATCH_UP + 1 + MOST_DRAFT_TOKENS
"""Most tokens that one call of ``propose`` adds to a row."""
SOURCE = Source(SpecMode.DRAFT, first_chance=0.6)
TRIM_SHARE = 0.5
"""Above this share of the limit, memory that rows have left is given back before another prompt is read."""


@dataclass(slots=True)
class _Drafted:
    """What is known of one request. It has a prompt while it is being read, then a row, or neither."""

    sampling: SamplingState
    query: PrefixQuery | None
    tokens: Sequence[int]
    """The committed ones as of the last call."""
    prompt: Prompt | None = None
    joined_at: int = 0
    """How many tokens its row began with."""
    guesses: list[int] = field(default_factory=list)
    """The last tokens its row was fed: such as nobody had drawn yet."""
    unsound: bool = False
    """The draft's numbers overflow on it: it is left alone from then on."""


class Draft(Proposer):
    """Proposes tokens for the requests it has been told of and has read."""

    def __init__(
        self, model: LoadedModel, vocab_size: int, limit_bytes: int, cache_bytes: int, *, pipelined: bool = True
    ) -> None:
        """``model`` must fit slots. ``vocab_size``: the served model's logits, in whose range all proposals are.

        ``limit_bytes``: most memory for rows and prompts; requests beyond it get no proposals. ``cache_bytes``: the
        same for cached prefixes. ``pipelined``: see Capabilities.
        """
        self._model = model
        self._picks = DraftPicks(vocab_size)
        self._budget = MemoryBudget(model.sizes, limit_bytes)
        self._prompts = DraftPrompts(model, cache_bytes)
        self._evaluate = mx.async_eval if pipelined else mx.eval
        self._lane = model.slots_lane(limit_bytes)
        self._requests: dict[str, _Drafted] = {}

    @property
    def _batch(self) -> Batch:
        return self._lane.batch

    @property
    def nbytes(self) -> int:
        """Bytes of rows and prompts."""
        return self._lane.nbytes + sum(r.prompt.nbytes for r in self._requests.values() if r.prompt is not None)

    @property
    def cached_bytes(self) -> int:
        """Bytes of cached prefixes."""
        return self._prompts.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of a row."""
        return self._model.sizes.token_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, whatever its length."""
        return self._model.sizes.row_bytes

    # --- requests ---------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """A request for which there may be proposals. Raises ValueError for parameters that are none."""
        query = self._prompts.query(request.tokens, request.cache_salt)
        self._requests[request.id] = _Drafted(self._picks.state(request.params), query, request.tokens)

    def end(self, name: str) -> None:
        """The request is over. An unknown name is no mistake. Never raises."""
        if name not in self._requests:
            return
        try:
            self._let_go(name)
        except Exception:  # whatever it is, the request has had its answer
            log.exception("freeing the draft's row of request %s failed", name)
            self.clear()
        del self._requests[name]

    def clear(self) -> None:
        """Forget all rows and prompts. Requests may be read again."""
        with suppress(Exception):  # told when it was raised
            mx.synchronize()  # a step may still be writing into the rows that are given up here
        self._lane = self._model.slots_lane(self._budget.limit_bytes)
        for request in self._requests.values():
            request.prompt, request.guesses = None, []

    @contextmanager
    def _cleared_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # model code raises what it likes; what it leaves behind is of no use
            self.clear()
            raise

    def trim(self) -> None:
        """Give back the memory that rows have left behind."""
        self._lane.trim()

    # --- reading ----------------------------------------------------------------------------------------------

    def read(self, name: str, tokens: Sequence[int], most: int) -> bool:
        """Read on, all but the newest of ``tokens``: ``most`` of them, or up to the next multiple of GRID.

        A row that is far behind is read on like a prompt, so call it only for a request that is to have proposals.
        """
        with self._cleared_on_failure():
            self._read(name, tokens, most)
        return self._requests[name].prompt is not None or name in self._batch

    def _read(self, name: str, tokens: Sequence[int], most: int) -> None:
        request = self._requests[name]
        request.tokens = tokens
        if request.unsound or len(tokens) >= self._model.context_length:
            self._let_go(name)
            return
        if self.ready(name, tokens):
            return
        if request.prompt is None:
            if self.nbytes > self._budget.limit_bytes * TRIM_SHARE:
                self._lane.trim()
            if self._needed({name: len(tokens)}) > self._budget.limit_bytes:
                return
            request.prompt = self._lifted(name) if name in self._batch else self._prompts.begin(request.query, tokens)
        prompt, start, total = request.prompt, request.prompt.length, len(tokens) - 1
        end = total if total - start <= most else min(total, max((start + most) // GRID, start // GRID + 1) * GRID)
        prefill(self._model.network, prompt, self._known(tokens[start:end]))
        self._prompts.chunk_done(request.query, tokens, prompt, start)
        self._lane.reserve(total, end / max(1, total))
        if end < total:
            return
        self._lane.adopt(name, prompt)
        request.prompt, request.joined_at = None, total

    def ready(self, name: str, tokens: Sequence[int]) -> bool:
        """Whether ``propose`` would say something about it."""
        if name not in self._batch or len(tokens) >= self._model.context_length:
            return False
        return len(tokens) - self._agreed(name, tokens) <= CATCH_UP + 1

    def behind(self, name: str, tokens: Sequence[int]) -> Source | None:
        return None if self.ready(name, tokens) else SOURCE

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:  # noqa: ARG002
        return DraftOffer(name, most, SOURCE) if self.ready(name, tokens) else None

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that this model has none for are read as its last one: what is beyond its embeddings is not memory."""
        return [min(token, self._model.vocab_size - 1) for token in tokens]

    def _lifted(self, name: str) -> Prompt:
        """The row's tokens as a prompt; the row is freed."""
        prompt = prompt_of_row(self._model, self._lane, name, self._agreed(name, self._requests[name].tokens))
        self._let_go(name)
        return prompt

    def _let_go(self, name: str) -> None:
        """Free the request's row or prompt, if it has one."""
        request = self._requests[name]
        if request.prompt is not None:
            request.prompt = None
            self._lane.unreserve()
        if name in self._batch:
            held = request.tokens[: self._certain(name)]
            if not request.unsound:
                self._prompts.row_done(request.query, held, self._lane, name, request.joined_at)
            self._lane.release(name, scrub=request.unsound)
        request.guesses = []

    def _needed(self, more: Mapping[str, int]) -> int:
        """Bytes for all rows and prompts, ``more`` prompts (name to tokens) included, and for a call of ``propose``."""
        reading = {name: len(r.tokens) for name, r in self._requests.items() if r.prompt is not None} | dict(more)
        longest = max([*reading.values(), *self._batch.lengths], default=0) + ROOM
        rows = len(reading.keys() | set(self._batch.names))
        return self._budget.arena_bytes(rows, longest) + sum(map(self._budget.prefill_bytes, reading.values()))

    # --- proposing --------------------------------------------------------------------------------------------

    def propose(self, wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Guess how those of ``wanted`` go on that are ready: so many tokens each, 1 to MOST_DRAFT_TOKENS.

        ``tokens``: the committed ones, at least of those. Rows of others are fed what they lack on the way, as far as
        that costs nothing.
        """
        with self._cleared_on_failure():
            return self._propose(wanted, tokens)

    def _propose(self, wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        for name in tokens.keys() & self._requests.keys():
            self._requests[name].tokens = tokens[name]
        self._drop_what_does_not_fit()
        asked = tuple(name for name in self._batch.names if name in wanted and self.ready(name, tokens[name]))
        if not asked:
            return {}
        steps = [self._catch_up(asked, tokens)]
        for ahead in range(1, max(wanted[name] for name in asked)):
            positions = [len(tokens[name]) + ahead for name in asked]
            steps.append(self._go_on(asked, steps[-1].tokens, positions))
        drawn = np.array(mx.stack([picks.tokens for picks in steps], axis=1)).tolist()
        bad = np.array(mx.stack([picks.bad for picks in steps], axis=1)).tolist()
        proposals = {}
        for name, draft, unsound in zip(asked, drawn, bad, strict=True):
            request = self._requests[name]
            request.guesses, request.unsound = draft[:-1], any(unsound)
            if request.unsound:
                self._let_go(name)
            else:
                proposals[name] = draft[: min(wanted[name], self._model.context_length - len(tokens[name]))]
        return proposals

    def _drop_what_does_not_fit(self) -> None:
        """Requests grow; when that takes too much, the longest one goes without proposals."""
        while len(self._batch) and self._needed({}) > self._budget.limit_bytes:
            held = [name for name, r in self._requests.items() if r.prompt is not None or name in self._batch]
            self._let_go(max(held, key=lambda name: len(self._requests[name].tokens)))
            self._lane.trim()

    def _agreed(self, name: str, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` its row holds before the two part. The newest one does not count: it is fed again."""
        guesses = self._requests[name].guesses
        certain = self._certain(name)
        confirmed = 0
        for guess, token in zip(guesses, tokens[certain : certain + len(guesses)], strict=False):
            if guess != token:
                break
            confirmed += 1
        return min(certain + confirmed, len(tokens) - 1)

    def _certain(self, name: str) -> int:
        """How many tokens its row holds before its guesses."""
        return self._batch.lengths[self._batch.row(name)] - len(self._requests[name].guesses)

    def _catch_up(self, asked: tuple[str, ...], tokens: Mapping[str, Sequence[int]]) -> Picks:
        """Take wrong guesses back, feed what is new, and draw the first guess of each."""
        names, lengths = self._batch.names, self._batch.lengths
        kept = [self._agreed(name, tokens[name]) if name in tokens else self._certain(name) for name in names]
        self._lane.rewind([length - count for length, count in zip(lengths, kept, strict=True)])
        columns = max(len(tokens[name]) - kept[self._batch.row(name)] for name in asked)
        new = [
            self._known(tokens[name][count : count + columns]) if name in tokens else []
            for name, count in zip(names, kept, strict=True)
        ]
        for name in names:
            self._requests[name].guesses = []
        fed = mx.array([row + [0] * (columns - len(row)) for row in new], dtype=mx.int32)
        return self._forward(asked, fed, [len(row) for row in new], [len(tokens[name]) for name in asked])

    def _go_on(self, asked: tuple[str, ...], drawn: mx.array, positions: Sequence[int]) -> Picks:
        """Feed each of ``asked`` what was drawn for it, unread, and draw the next guess."""
        place = [asked.index(name) if name in asked else len(asked) for name in self._batch.names]
        known = mx.minimum(drawn, self._model.vocab_size - 1)
        fed = mx.concatenate([known, mx.zeros((1,), dtype=mx.int32)])[mx.array(place)]
        return self._forward(asked, fed[:, None], [int(name in asked) for name in self._batch.names], positions)

    def _forward(self, asked: tuple[str, ...], fed: mx.array, counts: Sequence[int], positions: Sequence[int]) -> Picks:
        """Run all rows, keep ``counts[i]`` of the tokens in row i, and draw behind those of ``asked``."""
        logits = self._lane.forward(self._model.network, fed)
        self._lane.advance(counts)
        rows = [self._batch.row(name) for name in asked]
        logits = logits[mx.array(rows), mx.array([counts[row] - 1 for row in rows])]
        picks = self._picks(logits, tuple(self._requests[name].sampling for name in asked), positions)
        self._evaluate(*picks.arrays())  # alone: see InflightStep.waiting
        return picks
