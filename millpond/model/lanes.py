"""Two ways to run the rows of a batch: slots (one batched forward) and solo (upstream caches, one row at a time).

Both are driven by the same calls, so the engine has one path: adopt a finished prompt, forward, advance, release.
Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.arena import NO_LIMIT, Arena
from millpond.kv.batch import Batch
from millpond.kv.format import Arrays
from millpond.kv.slots import LeafSpec
from millpond.kv.states import NOTES
from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays
from millpond.prefix.records import Kind


class Lane(Protocol):
    """The running batch."""

    @property
    def batch(self) -> Batch:
        """Who has which row; only the lane lets anyone join or leave."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states held."""

    @property
    def deferred(self) -> bool:
        """Spans of what a step writes can be taken only once the step has been read."""

    def adopt(self, name: str, prompt: Prompt) -> None:
        """Take over a request's prompt, which has been read, as the next row."""

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """Run tokens [n, L] and return logits [n, L, vocab], lazily. Ends with advance()."""

    def advance(self, counts: Sequence[int]) -> None:
        """Keep the first counts[i] of the tokens just run in row i."""

    def rewind(self, counts: Sequence[int]) -> None:
        """Take the last counts[i] tokens of row i back; see Arena.rewind. Not while a forward is under way."""

    def release(self, name: str, scrub: bool = False) -> None:
        """Free a request's row; see Arena.release."""

    def reserve(self, length: int, share: float) -> None:
        """Make room for the adoption of ``length`` tokens, in the first ``share`` of the layers; see Arena.reserve."""

    def unreserve(self) -> None:
        """Forget what was reserved: its prompt will not come."""

    def trim(self) -> None:
        """Give back memory that the rows do not need now."""

    def spans(self, name: str, start: int, end: int, kind: Kind) -> list[Arrays]:
        """Positions [start, end) of a row, lazily, one entry per leaf; an empty one for leaves of other kinds."""

    def arrays(self) -> list[mx.array]:
        """All that the rows hold, to be evaluated where no results are."""


class SlotsLane(Arena):
    """All rows in one batched forward."""

    def __init__(
        self,
        specs: Sequence[LeafSpec],
        limit_bytes: int = NO_LIMIT,
        steady: Sequence[int] = (),
        width_step: int = 1,
        groups: Sequence[int] = (),
    ) -> None:
        """``steady``: numbers of rows that forwards are filled up to, ascending, where each row attends alone.
        ``width_step``: see Forward. ``groups``: see Arena."""
        super().__init__(specs, limit_bytes, width_step, groups)
        self._steady = steady

    def adopt(self, name: str, prompt: Prompt) -> None:
        self.put(name, prompt.rows() if prompt.length else (), prompt.length)

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        live, columns = tokens.shape
        filled_to = next((rows for rows in self._steady if rows >= live), 0)
        if filled_to > live:
            tokens = mx.concatenate([tokens, mx.zeros((filled_to - live, columns), tokens.dtype)])
        caches = self.begin(columns, filled_to)
        try:
            logits: mx.array = model(tokens, cache=caches)
        finally:
            NOTES.set(None)  # what is built next is none of this forward's
        return logits[:live] if filled_to > live else logits


class SoloLane:
    """Each row in its own forward, for caches that slots cannot hold. One token per row and step only."""

    def __init__(self) -> None:
        self.batch = Batch()
        self._prompts: dict[str, Prompt] = {}

    @property
    def nbytes(self) -> int:
        return sum(prompt.nbytes for prompt in self._prompts.values())

    @property
    def deferred(self) -> bool:
        return False

    def adopt(self, name: str, prompt: Prompt) -> None:
        self.batch.join(name, prompt.length)
        self._prompts[name] = prompt

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        prompts = enumerate(self._prompts[name] for name in self.batch.names)
        return mx.concatenate([model(tokens[row : row + 1], cache=prompt.caches) for row, prompt in prompts], axis=0)

    def advance(self, counts: Sequence[int]) -> None:
        if any(count != 1 for count in counts):
            raise ValueError(f"solo rows cannot roll back: advance({list(counts)})")
        self.batch.advance(counts)
        for prompt in self._prompts.values():
            prompt.length += 1

    def rewind(self, counts: Sequence[int]) -> None:
        if any(counts):
            raise ValueError(f"solo rows cannot roll back: rewind({list(counts)})")

    def release(self, name: str, scrub: bool = False) -> None:  # noqa: ARG002 - the row's arrays go with it
        self.batch.leave(name)
        del self._prompts[name]

    def reserve(self, length: int, share: float) -> None:
        """Nothing to make: a row brings its own arrays."""

    def unreserve(self) -> None:
        """Nothing was reserved."""

    def trim(self) -> None:
        """Nothing to give: each row holds its own."""

    def spans(self, name: str, start: int, end: int, kind: Kind) -> list[Arrays]:
        return self._prompts[name].spans(start, end, kind)

    def arrays(self) -> list[mx.array]:
        return [array for prompt in self._prompts.values() for array in cache_arrays(prompt.caches)]
