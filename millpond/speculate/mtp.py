"""What the model's own MTP head guesses, for all rows of the running batch together.

The head reads along in every forward (``model/headed``), so there is nothing to catch up with: a row can be guessed for
as soon as it is one. Where the text has come before, and for long, what followed then is better and costs nothing.
A guess is drawn as the model will draw, with the request's parameters and the noise of the same position. Engine thread
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from millpond.model.headed import WithHead, guess
from millpond.model.lanes import Lane, SlotsLane
from millpond.sample.sampler import Picks
from millpond.sample.state import SamplingState
from millpond.speculate.draft_picks import DraftPicks
from millpond.speculate.lookup import NgramProposer
from millpond.speculate.proposer import DraftOffer, Proposer, Source
from millpond.types import Request, SpecMode

SOURCE = Source(SpecMode.MTP, first_chance=0.75)
LONG = 0.8
"""First chance from which on what followed the same tokens before goes ahead of a guess."""


class MtpProposer(Proposer):
    """Has no rows of its own: guesses are made from those of the model."""

    def __init__(
        self,
        network: WithHead,
        vocab_size: int,
        rows: Callable[[], Lane],
        ngrams: NgramProposer,
        *,
        pipelined: bool = True,
    ) -> None:
        """``rows``: the running batch, in which nothing is under way while somebody proposes. ``ngrams``: what looks
        back. ``pipelined``: see Capabilities."""
        self._network = network
        self._rows = rows
        self._ngrams = ngrams
        self._evaluate = mx.async_eval if pipelined else mx.eval
        self._picks = DraftPicks(vocab_size)
        self._requests: dict[str, SamplingState] = {}

    def begin(self, request: Request) -> None:
        self._requests[request.id] = self._picks.state(request.params)
        self._ngrams.begin(request)

    def end(self, name: str) -> None:
        self._requests.pop(name, None)
        self._ngrams.end(name)

    def answered(self, salt: str, answer: Sequence[int]) -> None:
        self._ngrams.answered(salt, answer)

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:
        known = self._ngrams.offer(name, tokens, most, unread)
        guessed = name in self._requests and name in self._rows().batch
        if not guessed or (known is not None and known.source.first_chance >= LONG):
            return known
        return DraftOffer(name, most, SOURCE)

    def propose(self, wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        lane = cast(SlotsLane, self._rows())
        names, lengths = lane.batch.names, lane.batch.lengths
        asked = [name for name in wanted if name in names and lengths[names.index(name)] == len(tokens[name]) - 1]
        if not asked:
            return {}
        rows = mx.array([names.index(name) for name in asked])
        place = mx.array([asked.index(name) if name in asked else len(asked) for name in names])
        states = tuple(self._requests[name] for name in asked)
        steps: list[Picks] = []

        def draw(logits: mx.array, ahead: int) -> mx.array:
            steps.append(self._picks(logits[rows], states, [len(tokens[name]) + ahead for name in asked]))
            self._evaluate(*steps[-1].arrays())
            return mx.concatenate([steps[-1].tokens, mx.zeros((1,), dtype=mx.int32)])[place]

        newest = mx.array([tokens[name][-1] if name in asked else 0 for name in names], dtype=mx.int32)
        guess(self._network, lane, newest, max(wanted[name] for name in asked), draw)
        drawn = np.array(mx.stack([picks.tokens for picks in steps], axis=1)).tolist()
        bad = np.array(mx.stack([picks.bad for picks in steps], axis=1)).tolist()
        for name, unsound in zip(asked, bad, strict=True):
            if any(unsound):
                del self._requests[name]  # the head's numbers overflow on it: it is left alone from then on
        return {name: draft[: wanted[name]] for name, draft in zip(asked, drawn, strict=True) if name in self._requests}
