"""Decode steps: built here, launched, and read when the loop wants their tokens.

With draft tokens a row has several columns: its newest token, then the drafts. Each column draws the token behind it as
plain decoding would, with the noise of that position; as long as a draw equals the draft in the next column, the next
column's draw is the one that plain decoding would have made. So what is taken is always the model's own, whoever
guessed. Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from millpond.engine.prefixes import Cut
from millpond.engine.sequence import Sequence
from millpond.model.forwards import decode
from millpond.model.lanes import Lane
from millpond.sample.sampler import BatchSampler, Picks
from millpond.sample.state import SamplingState
from millpond.types import SamplingParams

log = logging.getLogger(__name__)

Drafts = tuple[tuple[int, ...], ...]


class Drawn(NamedTuple):
    """One row's part of a step."""

    name: str
    tokens: list[int]
    """What it takes: the drafts that were right, and the token behind them."""
    first: int
    """Where its columns begin in the step's picks."""
    drafts: int
    """Draft tokens that were verified."""
    bad: bool
    """The logits from which the next token is drawn are not finite."""
    spoilt: bool
    """Those behind some draft token are not."""

    @property
    def agreed(self) -> int:
        """Draft tokens that were right."""
        return len(self.tokens) - 1


@dataclass
class InflightStep:
    """A decode step whose tokens have not been read yet."""

    rows: tuple[str, ...]
    drafts: Drafts
    """Of each row; nothing at all in a plain step, whose rows are a token longer already."""
    pick: Callable[[], Picks]
    """Draws behind what the rows have taken, when it is called."""
    cuts: list[Cut]
    """Blocks that a plain step fills."""
    context_tokens: int
    begun: float
    """When the execution of its plan began; seconds, monotonic."""
    dispatched: float
    waiting: list[mx.array]
    """What is to be evaluated, nothing once it has been launched. The rows' own arrays are not in it, although the
    forward writes them: MLX keeps what it is handed until the step's last operation is done, and the next step, built
    by then, would copy what somebody keeps instead of writing in place. Its logits come of all of them anyway."""
    _picks: Picks | None = None

    @property
    def picks(self) -> Picks:
        """What it draws."""
        assert self._picks is not None, "a step is read, and gone on from, once it has been drawn"
        return self._picks

    def draw(self) -> None:
        """Build what picks its tokens, at the latest when the step ahead of it has been read: what some rows draw
        depends on what they have drawn before. The forward may be running by then."""
        if self._picks is None:
            self._picks = self.pick()
            self.waiting += self._picks.arrays()

    def launch(self) -> None:
        """Start the computation. Raises what the model's code raises."""
        if self.waiting:
            mx.async_eval(*self.waiting)
            self.waiting.clear()

    @property
    def draft_tokens(self) -> int:
        return sum(map(len, self.drafts))

    @property
    def columns(self) -> int:
        return 1 + max(map(len, self.drafts), default=0)

    def drawn(self) -> list[Drawn]:
        """What it drew; waits for it. Raises what the model's code raises when it is evaluated."""
        self.launch()
        mx.eval(self.picks.arrays())
        tokens, bad = np.array(self.picks.tokens).tolist(), np.array(self.picks.bad).tolist()
        found, first = [], 0
        for name, draft in zip(self.rows, self.drafts or ((),) * len(self.rows), strict=True):
            end = first + len(draft) + 1
            taken = agreeing(tokens[first:end], draft)
            found.append(Drawn(name, taken, first, len(draft), bad[first], any(bad[first + 1 : end])))
            first = end
        return found


def agreeing(tokens: Many[int], draft: Many[int]) -> list[int]:
    """The first of ``tokens``, one more than ``draft``, and every further one whose predecessors are the draft's."""
    count = next((place for place, (drawn, guessed) in enumerate(zip(tokens, draft)) if drawn != guessed), len(draft))  # noqa: B905
    return list(tokens[: count + 1])


def columns_of(newest: Many[int], drafts: Drafts) -> mx.array:
    """The forward's tokens, int32 [n, columns]; short rows are filled with what they end with, which nobody reads."""
    width = 1 + max(map(len, drafts))
    rows = [(token, *draft) for token, draft in zip(newest, drafts, strict=True)]
    return mx.array([[*row, *row[-1:] * (width - len(row))] for row in rows], dtype=mx.int32)


def logits_of(logits: mx.array, places: Many[tuple[int, int]]) -> mx.array:
    """Of [n, columns, vocab] those at the given rows and columns: [m, vocab], lazily."""
    n, width, vocab = logits.shape
    flat = logits.reshape(n * width, vocab)
    if len(places) == n * width:
        return flat
    return flat[mx.array([row * width + column for row, column in places], dtype=mx.int32)]


class Steps:
    """Builds steps over the rows of a batch, in row order."""

    def __init__(
        self, network: nn.Module, vocab_size: int, agree: Callable[[mx.array], mx.array] | None = None
    ) -> None:
        """``agree`` turns drawn tokens, int32 [n], into those that all ranks of a group go on with; None: no group."""
        self._network = network
        self._vocab_size = vocab_size
        self._agree = agree
        self._anything = SamplingState(SamplingParams(max_tokens=1, temperature=0.0), vocab_size)
        self._sampler: BatchSampler | None = None

    def forget(self) -> None:
        """Nothing is known of the rows any more."""
        self._sampler = None

    def plain(
        self,
        lane: Lane,
        sequences: Many[Sequence],
        ahead: InflightStep | None,
        begun: float,
        cuts: Callable[[Lane], list[Cut]],
    ) -> InflightStep:
        """One token for every row, behind its newest or behind what the unread step ``ahead`` has drawn.

        ``cuts`` is asked for the blocks that the forward fills.
        """
        sampler = self._sampler_for(sequences, ((),) * len(sequences))
        later = ahead is not None and any(sequence.sampling.needs_history for sequence in sequences)
        context_tokens = sum(lane.batch.lengths)
        dispatched = time.monotonic()
        if ahead is not None:
            tokens, unread = ahead.picks.tokens, 1
        else:
            tokens, unread = mx.array([sequence.tokens[-1] for sequence in sequences], dtype=mx.int32), 0
        logits = decode(self._network, lane, tokens)
        positions = [len(sequence.tokens) + unread for sequence in sequences]
        cut = cuts(lane)
        waiting = [array for one in cut for array in one.arrays()]

        def pick() -> Picks:
            return self._agreed(sampler(logits, positions))

        step = InflightStep(lane.batch.names, (), pick, cut, context_tokens, begun, dispatched, waiting)
        if later:
            waiting.append(logits)
        else:
            step.draw()
        return step

    def verifying(self, lane: Lane, sequences: Many[Sequence], drafts: Drafts, begun: float) -> InflightStep:
        """Every row's newest token and its draft tokens. How far each row has come is known once that is read."""
        sampler = self._sampler_for(sequences, drafts)
        context_tokens = sum(lane.batch.lengths)
        dispatched = time.monotonic()
        logits = lane.forward(self._network, columns_of([sequence.tokens[-1] for sequence in sequences], drafts))
        places = [(row, place) for row, draft in enumerate(drafts) for place in range(len(draft) + 1)]
        positions = [len(sequences[row].tokens) + place for row, place in places]
        chosen = logits_of(logits, places)

        def pick() -> Picks:
            return self._agreed(sampler(chosen, positions))

        step = InflightStep(lane.batch.names, drafts, pick, [], context_tokens, begun, dispatched, [])
        step.draw()
        return step

    def _agreed(self, picks: Picks) -> Picks:
        return picks if self._agree is None else replace(picks, tokens=self._agree(picks.tokens))

    def _sampler_for(self, sequences: Many[Sequence], drafts: Drafts) -> BatchSampler:
        """For every row and column. A row whose own part cannot be made is at fault, and draws something."""
        states: list[SamplingState] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            try:
                states += sequence.sampling.ahead(draft)
            except Exception as error:  # whatever it is, it is about this request alone
                log.exception("sampling of request %s failed", sequence.request.id)
                sequence.fault = error
                states += [self._anything] * (len(draft) + 1)
        if self._sampler is None or self._sampler.states != tuple(states):
            self._sampler = BatchSampler(states, self._vocab_size)
        return self._sampler
