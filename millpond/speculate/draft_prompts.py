"""How a draft model's prompts begin and are kept: its own prefix cache, in memory only. Engine thread only.

A conversation comes back with everything said so far; the served model restores that, and so must the draft. Blocks are
kept as a prompt is read, and of an answer when its row ends, unless the model has sliding windows: those of an answer's
blocks have gone by then. Its few tokens are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx

from millpond.kv.arena import AT_ONCE_BYTES
from millpond.kv.format import Arrays
from millpond.memory.budget import PREFILL_STEP
from millpond.model.blocks import BlockFormat, ReadRecord, Stored, agree, block_grid, cut_prompt, evaluated
from millpond.model.lanes import Lane
from millpond.model.load import LoadedModel
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.upstream import cache_arrays
from millpond.prefix.cache import PrefixCache
from millpond.prefix.query import PrefixQuery
from millpond.prefix.records import Kind

NAMESPACE = "draft"
"""One model, one process: nothing has to be told apart."""


class DraftPrompts:
    """Without blocks, or without memory for them, nothing is kept and every prompt begins empty."""

    def __init__(self, model: LoadedModel, limit_bytes: int) -> None:
        self._model = model
        self._form: BlockFormat | None = None
        if limit_bytes > 0 and isinstance(model.blocks, BlockFormat):
            self._form = model.blocks
            same = partial(agree, model.form)
            self._cache = PrefixCache(NAMESPACE, model.blocks.layout, limit_bytes, ReadRecord, same)

    @property
    def nbytes(self) -> int:
        return 0 if self._form is None else self._cache.nbytes

    def query(self, tokens: Sequence[int], salt: str) -> PrefixQuery | None:
        """A new request's dealings with the cache."""
        return None if self._form is None else self._cache.query(tokens, salt)

    def begin(self, query: PrefixQuery | None, tokens: Sequence[int]) -> Prompt:
        """A prompt for all of ``tokens`` but the newest, the longest known prefix restored, lazily."""
        total = len(tokens) - 1
        if self._form is None or query is None:
            return new_prompt(self._model.network, self._model.form, total)
        query.restart(tokens)
        plan = self._cache.take(query, self._cache.plan(query, disk=False).position)
        if not plan.position:
            return new_prompt(self._model.network, self._model.form, total)
        capacity = -(-total // PREFILL_STEP) * PREFILL_STEP
        return self._form.restored(self._model.network, plan, capacity)

    def chunk_done(self, query: PrefixQuery | None, tokens: Sequence[int], prompt: Prompt, start: int) -> None:
        """Keep the blocks that the chunk from ``start`` on has completed."""
        if self._form is None or query is None:
            return
        query.match.chain.extend(tokens)
        form = self._form
        self._keep_all(query, start, prompt.length, form.layout.kinds, lambda *span: cut_prompt(form, prompt, *span))

    def row_done(self, query: PrefixQuery | None, tokens: Sequence[int], lane: Lane, name: str, start: int) -> None:
        """Keep the blocks that a row about to be freed, which holds ``tokens``, has filled since ``start``."""
        if self._form is None or query is None or self._form.layout.window:
            return
        query.match.chain.extend(tokens)
        form = self._form
        self._keep_all(
            query, start, len(tokens), (Kind.KV,), lambda *span: form.spans(lane.spans(name, *span), Kind.KV)
        )

    def _keep_all(
        self, query: PrefixQuery, start: int, end: int, kinds: Sequence[Kind], cut: Callable[[int, int, Kind], Stored]
    ) -> None:
        """Keep the blocks that [start, end) completes, many at a time."""
        made: dict[tuple[int, int], dict[Kind, Stored]] = {}
        for span in block_grid(start, end):
            if missing := self._cache.missing(query, *span, kinds, behind_new=bool(made)):
                made[span] = {kind: cut(*span, kind) for kind in missing}
            if sum(record.nbytes for records in made.values() for record in records.values()) > AT_ONCE_BYTES:
                self._keep(query, made)
                made = {}
        self._keep(query, made)

    def _keep(self, query: PrefixQuery, made: Mapping[tuple[int, int], Mapping[Kind, Stored]]) -> None:
        for (begin, end), sound in zip(made, evaluated(list(made.values())), strict=True):
            if sound:
                self._cache.keep(query, begin, end, made[begin, end])


def prompt_of_row(model: LoadedModel, lane: Lane, name: str, length: int) -> Prompt:
    """The first ``length`` tokens of a request's row as a prompt that can be read on. The row stays as it is."""
    prompt = new_prompt(model.network, model.form)
    if not length:
        return prompt
    plain = lane.spans(name, 0, length, Kind.KV)
    widest = max(leaf.window for leaf in prompt.leaves)
    sliding = lane.spans(name, max(0, length - widest), length, Kind.WINDOW)
    for leaf, *held in zip(prompt.leaves, plain, sliding, strict=True):
        leaf.put(_copied(held[0] or held[1], leaf.window or length), length)
    mx.eval(cache_arrays(prompt.caches))
    prompt.length = length
    return prompt


def _copied(held: Arrays, most: int) -> tuple[mx.array, mx.array]:
    """The last ``most`` positions in memory of their own: rows are not written in place while somebody views them."""
    keys, values = (mx.take(array[:, :, -most:], mx.array([0]), axis=0) for array in held)
    return keys, values
