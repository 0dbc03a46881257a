"""Two ways to run the rows of a batch: slots (one batched forward) and solo (upstream caches, one row at a time).

Both are driven by the same calls, so the engine has one path: adopt a finished prompt, forward, advance, release.
Rows are compact: releasing one moves the last into its place. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.arena import NO_LIMIT, Arena
from millpond.kv.format import Arrays
from millpond.kv.leaf import LeafSpec
from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays
from millpond.prefix.records import Kind


class Lane(Protocol):
    """The running batch."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens each row holds."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states held."""

    @property
    def deferred(self) -> bool:
        """Spans of what a step writes can be taken only once the step has been read."""

    def adopt(self, prompt: Prompt) -> None:
        """Take over a prompt that has been read as the last row."""

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """Run tokens [n, L] and return logits [n, L, vocab], lazily. Ends with advance()."""

    def advance(self, counts: Sequence[int]) -> None:
        """Keep the first counts[i] of the tokens just run in row i."""

    def rewind(self, counts: Sequence[int]) -> None:
        """Take the last counts[i] tokens of row i back; see Arena.rewind. Not while a forward is under way."""

    def release(self, row: int, scrub: bool = False) -> None:
        """Free a row, moving the last one into its place."""

    def reserve(self, length: int, share: float) -> None:
        """Make room for the adoption of ``length`` tokens, in the first ``share`` of the layers; see Arena.reserve."""

    def unreserve(self) -> None:
        """Forget what was reserved: its prompt will not come."""

    def trim(self) -> None:
        """Give back memory that the rows do not need now."""

    def spans(self, row: int, start: int, end: int, kind: Kind) -> list[Arrays]:
        """Positions [start, end) of a row, lazily, one entry per leaf; an empty one for leaves of other kinds."""

    def prompt(self, row: int) -> Prompt | None:
        """The row's own caches where it has such; they go on changing."""

    def arrays(self) -> list[mx.array]:
        """What a step must evaluate besides its own results."""


class SlotsLane:
    """All rows in one batched forward."""

    def __init__(self, specs: Sequence[LeafSpec], limit_bytes: int = NO_LIMIT) -> None:
        self._arena = Arena(specs, limit_bytes)
        self._deferred = any(spec.deferred for spec in specs)

    @property
    def lengths(self) -> Sequence[int]:
        return self._arena.lengths

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    @property
    def deferred(self) -> bool:
        return self._deferred

    def adopt(self, prompt: Prompt) -> None:
        self._arena.adopt(prompt.rows() if prompt.length else (), prompt.length)

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        logits: mx.array = model(tokens, cache=self._arena.begin(tokens.shape[1]))
        return logits

    def advance(self, counts: Sequence[int]) -> None:
        self._arena.advance(counts)

    def rewind(self, counts: Sequence[int]) -> None:
        self._arena.rewind(counts)

    def release(self, row: int, scrub: bool = False) -> None:
        self._arena.release(row, scrub)

    def reserve(self, length: int, share: float) -> None:
        self._arena.reserve(length, share)

    def unreserve(self) -> None:
        self._arena.unreserve()

    def trim(self) -> None:
        self._arena.trim()

    def spans(self, row: int, start: int, end: int, kind: Kind) -> list[Arrays]:
        return self._arena.spans(row, start, end, kind)

    def prompt(self, row: int) -> Prompt | None:  # noqa: ARG002 - rows share the arena
        return None

    def arrays(self) -> list[mx.array]:
        return self._arena.arrays()


class SoloLane:
    """Each row in its own forward, for caches that slots cannot hold. One token per row and step only."""

    def __init__(self) -> None:
        self._prompts: list[Prompt] = []

    @property
    def lengths(self) -> Sequence[int]:
        return [prompt.length for prompt in self._prompts]

    @property
    def nbytes(self) -> int:
        return sum(prompt.nbytes for prompt in self._prompts)

    @property
    def deferred(self) -> bool:
        return False

    def adopt(self, prompt: Prompt) -> None:
        self._prompts.append(prompt)

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        rows = [model(tokens[row : row + 1], cache=prompt.caches) for row, prompt in enumerate(self._prompts)]
        return mx.concatenate(rows, axis=0)

    def advance(self, counts: Sequence[int]) -> None:
        if any(count != 1 for count in counts):
            raise ValueError(f"solo rows cannot roll back: advance({list(counts)})")
        for prompt in self._prompts:
            prompt.length += 1

    def rewind(self, counts: Sequence[int]) -> None:
        if any(counts):
            raise ValueError(f"solo rows cannot roll back: rewind({list(counts)})")

    def release(self, row: int, scrub: bool = False) -> None:  # noqa: ARG002 - the row's arrays go with it
        self._prompts[row] = self._prompts[-1]
        self._prompts.pop()

    def reserve(self, length: int, share: float) -> None:
        """Nothing to make: a row brings its own arrays."""

    def unreserve(self) -> None:
        """Nothing was reserved."""

    def trim(self) -> None:
        """Nothing to give: each row holds its own."""

    def spans(self, row: int, start: int, end: int, kind: Kind) -> list[Arrays]:
        return self._prompts[row].spans(start, end, kind)

    def prompt(self, row: int) -> Prompt | None:
        return self._prompts[row]

    def arrays(self) -> list[mx.array]:
        return [array for prompt in self._prompts for array in cache_arrays(prompt.caches)]
