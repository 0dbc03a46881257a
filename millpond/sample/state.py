"""What sampling knows of one request: made when it arrives, kept with it, moved on token by token.

Everything that parameters can get wrong goes wrong here, while the request is alone: what the batch does with it later
(sampler.py) is to stack numbers. A change of the batch's rows replays nothing. On the thread that owns MLX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from enum import Enum, auto

import msgspec.structs

from millpond.grammar.constraint import Bits, Constraint, DeadEnd
from millpond.sample.edits import RowEdits, Table, without
from millpond.sample.weights import fraction_words, inverse_temperature, min_weight
from millpond.types import SamplingParams

_NUMBERS = tuple(field.name for field in msgspec.structs.fields(SamplingParams) if field.type is float)


class Filter(Enum):
    """How a sampled row's cut is found: each kind has its own, cheapest graph."""

    NONE = auto()
    TOP_P = auto()
    TOP_K = auto()


class SamplingState:
    """Of one request, after the tokens it has so far."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """``constraint``: what the answer has to look like. Raises ValueError for numbers that nothing can be drawn
        with."""
        for name in _NUMBERS:
            if not math.isfinite(getattr(params, name)):
                raise ValueError(f"{name} is {getattr(params, name)}; allowed: finite numbers")
        if params.repetition_penalty <= 0.0:
            raise ValueError(f"repetition_penalty is {params.repetition_penalty}; allowed: above 0")
        for token, bias in params.logit_bias.items():
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias of token {token} is {bias}; allowed: finite numbers")
        self.params = params
        self.filter = Filter.TOP_P if params.top_p < 1.0 else Filter.NONE
        if 0 < params.top_k < vocab_size:
            self.filter = Filter.TOP_K
        self.ranks = max(0, min(params.top_k, vocab_size))
        self.fraction = fraction_words(max(0.0, min(params.top_p, 1.0)))
        self.least = min_weight(params.min_p)
        self.inverse = 1.0 if params.greedy else inverse_temperature(params.temperature)
        self._edits = RowEdits(params, vocab_size, prompt) if params.needs_history or params.logit_bias else None
        self._constraint = constraint
        self._taken = 0
        self._ends = [token for token in dict.fromkeys(params.stop_token_ids) if 0 <= token < vocab_size]

    @property
    def needs_history(self) -> bool:
        """Whether its next draw depends on the tokens drawn before it."""
        return self.params.needs_history or self._constraint is not None or self._taken < self.params.min_tokens

    @property
    def table(self) -> Table | None:
        """Its changes to single logits; good until the next ``take``."""
        table = None if self._edits is None else self._edits.table
        constraint = self._constraint
        too_short = self._taken < self.params.min_tokens and (constraint is None or not constraint.bound)
        if self._ends and (too_short or (constraint is not None and constraint.endless)):
            return without(table, self._ends)
        return table

    @property
    def allowed(self) -> Bits | None:
        """The tokens that may come next; None: all."""
        return None if self._constraint is None else self._constraint.allowed()

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._constraint is not None and self._constraint.complete

    def forced(self) -> list[int]:
        """Tokens that are as good as drawn."""
        return [] if self._constraint is None else self._constraint.forced()

    def admitted(self, draft: Sequence[int]) -> int:
        """How many draft tokens could be drawn at all."""
        return len(draft) if self._constraint is None else self._constraint.admitted(draft)

    def check(self, token: int) -> None:
        """Raises DeadEnd where the last draw had no token to choose, and so chose this one."""
        constraint = self._constraint
        if constraint is not None and constraint.stuck:
            raise DeadEnd(constraint.stuck)
        if constraint is not None and token in self._ends and constraint.bound and not constraint.permits(token):
            raise DeadEnd("no token of the vocabulary can follow")

    def take(self, token: int) -> None:
        """The answer has one more token. Raises DeadEnd where it cannot be one."""
        self._taken += 1
        if self._edits is not None and self.params.needs_history:
            self._edits.take(token)
        if self._constraint is not None:
            self._constraint.take(token)

    def ahead(self, draft: Sequence[int]) -> list[SamplingState]:
        """The states before each of ``draft`` and behind its last, as if those before had been drawn; the first is
        this one itself."""
        states = [self]
        for token in draft:
            states.append(states[-1]._after(token))
        return states

    def _after(self, token: int) -> SamplingState:
        if not self.needs_history:
            return self
        state = copy(self)
        state._edits = None if self._edits is None else self._edits.copy()
        state._constraint = None if self._constraint is None else self._constraint.copy()
        state.take(token)
        return state
