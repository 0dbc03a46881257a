"""A model whose MTP head reads along: whatever the model reads, the head has its own keys and values of.

They are one more leaf behind the model's, and the hidden state that the head goes on from is another (``Carry`` in
``leaves``), so that rows, packing, the prefix cache and steps that are kept in part need know nothing of a head. Draft
tokens are made from the rows as they are: what the head writes for that lies behind their ends, where the next step
writes. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from millpond.kv.slots import KvSlot
from millpond.model.lanes import SlotsLane
from millpond.model.leaves import Carry, leaves_of
from millpond.model.mtp import Head, HeadCache, HeadCarry, body_of, embeddings_of
from millpond.model.upstream import KVCache, LayerCache, PromptCache, new_cache
from millpond.prefix.records import Kind

KEYS, CARRY = -2, -1
"""The head's leaves, behind the model's."""
Draw = Callable[[mx.array, int], mx.array]
"""(logits of all rows [n, vocab], how many guesses are before it) -> the tokens to go on with, int32 [n]."""


class WithHead(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """A model and its head, as one."""

    def __init__(self, trunk: nn.Module, head: Head) -> None:
        """``trunk``: the model alone."""
        super().__init__()
        self.trunk = trunk
        self.head = head

    def make_cache(self) -> PromptCache:
        """Fresh caches of one sequence: the model's, the head's keys and values, and what it goes on from."""
        caches = new_cache(self.trunk)
        recorded = any(leaf.kind is Kind.STATE for leaf in leaves_of(caches))
        return [*caches, cast(LayerCache, KVCache()), cast(LayerCache, Carry(recorded))]

    def __call__(self, tokens: mx.array, cache: Sequence[object] | None = None) -> mx.array:
        """Logits [n, L, vocab] of the model."""
        if cache is None:
            alone: mx.array = self.trunk(tokens)
            return alone
        *below, keys, held = cache
        carry = cast(HeadCarry, held)
        hidden = body_of(self.trunk)(tokens, cache=below)
        followed = self.head.follow(carry.shift(hidden), self.embedded(tokens), cast(HeadCache, keys))
        # Who evaluates logits has the head follow. Who reads a prompt evaluates its caches, and this is not computed.
        logits: mx.array = mx.depends(self.logits(hidden), [followed, *carry.arrays])
        return logits

    def embedded(self, tokens: mx.array) -> mx.array:
        """Of tokens int [n, L]: [n, L, D]."""
        found: mx.array = embeddings_of(self.trunk)(tokens)
        return found

    def logits(self, hidden: mx.array) -> mx.array:
        """What the model's output layer makes of hidden states [n, L, D]."""
        text = getattr(self.trunk, "language_model", self.trunk)
        found: mx.array = text.lm_head(hidden) if "lm_head" in text else text.model.embed_tokens.as_linear(hidden)
        return found

    @property
    def share(self) -> float:
        """Of the bytes that a forward reads, those that one guess reads: the head's and the output layer's. Of experts
        all count, which is about right, as the model's do, too."""
        text = getattr(self.trunk, "language_model", self.trunk)
        output = text.lm_head if "lm_head" in text else text.model.embed_tokens
        return (_bytes(self.head) + _bytes(output)) / max(1, _bytes(self))

    def over(self, trunk: nn.Module) -> WithHead:
        """Another model with the same head."""
        return WithHead(trunk, self.head)


def _bytes(module: nn.Module) -> int:
    return sum(int(array.nbytes) for _, array in tree_flatten(module.parameters()))


def guess(network: WithHead, lane: SlotsLane, newest: mx.array, count: int, draw: Draw) -> None:
    """Guess ``count`` tokens behind the newest of each row, int32 [n], which no forward has read. The first guess goes
    on from what the model knows, each other from the one before it."""
    lane.room(count)
    hidden, token = lane.slots[CARRY].arrays[0][: len(lane.batch)], newest
    for place in range(count):
        slot = cast(KvSlot, lane.beyond(KEYS, place))
        hidden = network.head(hidden, network.embedded(token[:, None]), slot)
        slot.keep(())
        token = draw(network.logits(hidden)[:, -1], place)
