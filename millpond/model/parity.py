"""Rows in slots beside mlx-lm's own caches, a sequence each: whatever its neighbours do, a row's logits are its own.

A story with everything that rows go through: ragged prompts of up to some hundred tokens, one of none among them,
others that join later, a row that leaves, draft tokens that are refused, kept, and kept in part. Engine thread only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from millpond.kv.format import KvFormat
from millpond.model.forwards import prefill
from millpond.model.lanes import Lane
from millpond.model.leaves import rounded
from millpond.model.load import LoadedModel
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.upstream import PromptCache, new_cache

AT_FIRST = (5, 130, 0, 17)
"""Tokens of the prompts that are there from the beginning."""
TO_THE_END = 126
"""Instead of 130 where tiles are packed: some steps later one is."""
LATER = (200, 1)
"""Of those that join two steps later."""
COLUMNS = 4
"""Of a forward that verifies draft tokens."""
KEPT = (0, 1, 2, 3, 4, 2)
"""Of these, what each row keeps of it; then the other way round."""
ANSWER = 24
"""More tokens than any row is given."""

STRICT = 0.0005
"""Largest difference of two logits, as a share of their spread, where nothing rounds: a position that is off by one
moves them by 0.007."""
WHOLE = 0.003
"""The same where vectors become whole numbers before they are multiplied (native/whole_rows): 0.001 was seen."""
LOOSE = 0.05
"""The same for kernels of different shapes in half precision."""
NOISES = 5.0
"""Times as far as shapes alone have moved them, they may be apart."""
COARSE_NOISES = 10.0
"""Times as far in half precision, where a story has many more shapes than what moves logits is measured with."""
COARSE = 0.3
"""Nobody's logits are moved that far by rounding."""
PACKED = 0.3
"""The same where keys and values are packed: between attention over packed numbers and over the same ones unpacked to
half precision, which rounds them once more, up to 0.16 in models of random weights; and in float32, where of a number
half-way between two steps the last bit decides, 0.07. What a neighbour does to a row is held to the other one even
then."""


class ParityError(Exception):
    """Rows are not what they should be; the message says where."""


class _Row:
    """A row of the story, and the same sequence alone."""

    def __init__(self, model: LoadedModel, name: str, prompt: list[int], answer: list[int]) -> None:
        """``answer``: what it is going to hold behind its prompt, and more."""
        self.name = name
        self.length = len(prompt)
        self._model = model
        self._answer = answer
        self._place = 0
        """Tokens of the answer that it holds."""
        apart_from_slots = Prompt(new_cache(model.network), KvFormat())
        prefill(model.network, apart_from_slots, prompt)
        self._caches = rounded(apart_from_slots.caches, model.form)
        self._lane: Lane | None = None
        """Its own, where slots round in a way that nothing else does."""
        if model.form.packs and model.dtype != "float32":
            self._lane = model.slots_lane()
            self._lane.adopt(name, read(model, prompt))

    def tokens(self, columns: int, right: int) -> list[int]:
        """Those of a forward of so many columns, of which the first are ``right``."""
        coming = self._answer[self._place : self._place + columns]
        return [*coming[:right], *((token + 1) % self._model.vocab_size for token in coming[right:])]

    def next(self) -> mx.array:
        """Logits behind its next token, [vocab]."""
        token = self._answer[self._place]
        self._place += 1
        logits = behind(self._model, self._caches, [token])
        if self._lane is None:
            return logits
        in_slots = self._lane.forward(self._model.network, mx.array([[token]], dtype=mx.int32))[0, -1]
        mx.eval(in_slots)
        self._lane.advance([1])
        if not apart(in_slots, logits) <= PACKED:
            raise ParityError(f"logits over packed keys differ from those over unpacked ones (prompt of {self.length})")
        return in_slots


@dataclass(frozen=True)
class _Event:
    """A forward, or rows that come and go."""

    columns: int = 0
    kept: Sequence[int] = ()
    """Of each row, in turn."""
    join: Sequence[int] = ()
    """Lengths of prompts."""
    leave: str = ""


def _story(*, in_part: bool) -> Iterator[_Event]:
    """``in_part``: some forwards are kept in part."""
    yield _Event(join=AT_FIRST)
    yield _Event(1, [1])
    yield _Event(COLUMNS, [0])
    yield _Event(1, [1])
    yield _Event(join=LATER)
    yield _Event(1, [1])
    if in_part:
        yield _Event(COLUMNS, KEPT)
        yield _Event(COLUMNS, KEPT[::-1])
    yield _Event(COLUMNS, [COLUMNS])
    yield _Event(leave="1")
    yield _Event(1, [1])
    yield _Event(COLUMNS, [0])
    yield _Event(1, [1])


def check(model: LoadedModel, tolerance: float, *, in_part: bool) -> None:
    """Run the story; ``in_part``: with forwards that are kept in part. Raises ParityError, and what the model's code
    raises."""
    chooser = random.Random(0)  # noqa: S311 - any tokens do
    lane, rows = model.slots_lane(), dict[str, _Row]()
    usual = {130: TO_THE_END} if model.form.rotated else {}
    for event in _story(in_part=in_part):
        for length in event.join:
            prompt, answer = (
                [chooser.randrange(model.vocab_size) for _ in range(count)]
                for count in (min(usual.get(length, length), model.context_length // 2), ANSWER)
            )
            row = _Row(model, str(len(rows)), prompt, answer)
            rows[row.name] = row
            lane.adopt(row.name, read(model, prompt))
        if event.leave:
            lane.release(event.leave)
        if event.columns:
            _forward(model, lane, [rows[name] for name in lane.batch.names], event, tolerance)


def _forward(model: LoadedModel, lane: Lane, rows: Sequence[_Row], event: _Event, tolerance: float) -> None:
    kept = [event.kept[number % len(event.kept)] for number in range(len(rows))]
    tokens = [row.tokens(event.columns, right) for row, right in zip(rows, kept, strict=True)]
    logits = lane.forward(model.network, mx.array(tokens, dtype=mx.int32))
    mx.eval(logits)
    lane.advance(kept)
    mx.eval(lane.arrays())
    for number, (row, count) in enumerate(zip(rows, kept, strict=True)):
        for column in range(count):
            if not apart(logits[number, column], row.next()) <= tolerance:
                place = f"column {column} of {event.columns}, a prompt of {row.length}"
                raise ParityError(f"logits differ from the single-sequence ones ({place})")


def read(model: LoadedModel, tokens: Sequence[int]) -> Prompt:
    """A prompt of these tokens, in one chunk."""
    prompt = new_prompt(model.network, model.form)
    prefill(model.network, prompt, tokens)
    return prompt


def behind(model: LoadedModel, caches: PromptCache, tokens: Sequence[int]) -> mx.array:
    """Logits of the first sequence, [vocab]."""
    logits: mx.array = model.network(mx.array(list(tokens), dtype=mx.int32)[:, None], cache=caches)[0, -1]
    mx.eval(logits)
    return logits


def noise(model: LoadedModel) -> float:
    """How far logits are moved by nothing but the number of sequences in a forward, or of forwards for a sequence, as a
    share of their spread."""
    tokens, answer = list(range(1, 19)), list(range(20, 24))
    found: list[list[mx.array]] = []
    for count, pieces in ((1, 1), (1, 3), (2, 1), (len(AT_FIRST), 1), (len(AT_FIRST) + len(LATER), 1)):
        caches = new_cache(model.network)
        for piece in mx.split(mx.array([tokens] * count, dtype=mx.int32) % model.vocab_size, pieces, axis=1):
            model.network(piece, cache=caches)
        found.append([behind(model, caches, [token % model.vocab_size] * count) for token in answer])
    alone, *beside = found
    return max(apart(one, other) for others in beside for one, other in zip(others, alone, strict=True))


def apart(ours: mx.array, reference: mx.array) -> float:
    """How far two rows of logits, [vocab], are from each other, as a share of the second one's spread."""
    ours, reference = ours.astype(mx.float32), reference.astype(mx.float32)
    share = mx.abs(ours - reference).max() / (reference.max() - reference.min())
    return float(np.array(share))
