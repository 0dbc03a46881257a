"""How a row's numbers depend on how many rows its forward has: kernels, and with them rounding, differ by that.

Differences are as small as rounding is, and now and then one of them makes another token the likeliest. Engine thread
only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx

from millpond.kv.arena import NO_LIMIT
from millpond.memory.budget import capacity_bucket
from millpond.model.forwards import decode
from millpond.model.lanes import SlotsLane
from millpond.model.load import LoadedModel
from millpond.model.prompt import new_prompt

TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 32)
"""Numbers of rows that are compared: kernels change within the first few, and where matrices begin to pay."""
CONTEXT = 16
"""Tokens of a row that is compared. They are zeros: rounding is about shapes."""
NEIGHBOURS = (3, 40, 300)
"""The same of rows beside it, in turn: shorter, longer, and beyond what a row has room for at first."""
MOST_BYTES = 1 << 30
"""Of the rows that are tried."""
TOKENS = (7919, 104_729)
"""Behind which logits are compared."""
NEAR = 0.05
"""Largest difference of two logits that is rounding, as a share of the row's spread."""
TIMED = 3


def alike(model: LoadedModel, tried: Iterable[int] = TRIED) -> list[list[int]]:
    """Numbers of rows, of those ``tried``, grouped by what a row's forward gives: the same bits within a group, other
    ones elsewhere. Left out are those whose rows would take too much memory."""
    groups: list[tuple[mx.array, list[int]]] = []
    for rows in tried:
        if rows > fitting(model, rows):
            continue
        logits = _logits(model.slots_lane(), model, [CONTEXT] * rows, 0, TOKENS[0])
        for known, members in groups:
            if same(known, logits):
                members.append(rows)
                break
        else:
            groups.append((logits, [rows]))
    return [members for _, members in groups]


def steady_rows(model: LoadedModel, max_batch: int, world: int = 1) -> tuple[int, ...] | str:
    """Numbers of rows, ascending, the last one ``max_batch``: filled up to one of them, with each row attending alone,
    a decode forward gives a row the same bits whoever is beside it. Or why that cannot be had. Ranks of a ``world`` of
    several have one number, and run the same forwards whatever each of them finds: they compute them together."""
    usual = [_logits(model.slots_lane(), model, [CONTEXT], 0, token) for token in TOKENS]
    target = _filled(model, max_batch)
    wrong = "" if all(map(_near, target, usual)) else "rows that attend on their own get other numbers than usual"
    tried = [rows for rows in TRIED if rows < max_batch] if world == 1 else []
    widths = (*(rows for rows in tried if all(map(same, _filled(model, rows), target))), max_batch)
    for rows in dict.fromkeys((min(2, max_batch), min(5, max_batch), fitting(model, max_batch))):
        lengths = [NEIGHBOURS[number % len(NEIGHBOURS)] for number in range(rows - 1)]
        beside = [min(length, max(1, model.context_length - 2)) for length in lengths]
        for place in sorted({0, rows // 2, rows - 1}):
            crowd = [*beside[:place], CONTEXT, *beside[place:]]
            found = [_logits(_steady(model, widths), model, crowd, place, token) for token in TOKENS]
            if not all(map(same, found, target)):
                wrong = (
                    wrong or f"what a row gets depends on the {rows - 1} beside it even where all forwards are alike"
                )
    return wrong or widths


def slower(model: LoadedModel, widths: Sequence[int], rows: int) -> float:
    """How many times as long a step of so many rows takes where forwards are filled up and rows attend alone."""
    usual, steady = (_seconds(lane, model, rows) for lane in (model.slots_lane(), _steady(model, widths)))
    return steady / usual


def fitting(model: LoadedModel, rows: int) -> int:
    """So many rows, or fewer where they would take too much memory."""
    return max(1, min(rows, MOST_BYTES // _row_bytes(model)))


def same(one: mx.array, other: mx.array) -> bool:
    """Whether two rows of logits are equal, bit by bit but for the sign of zeros."""
    return bool(mx.array_equal(one, other, equal_nan=True).item())


def _near(one: mx.array, other: mx.array) -> bool:
    """Whether nothing but rounding parts two rows of logits."""
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool((mx.abs(one - other).max() <= NEAR * (other.max() - other.min())).item())


def _row_bytes(model: LoadedModel) -> int:
    assert not isinstance(model.specs, str)
    grown = sum(spec.row_bytes(capacity_bucket(max(NEIGHBOURS) + 1)) for spec in model.specs)
    return max(1, grown + model.sizes.state_bytes)


def _steady(model: LoadedModel, widths: Sequence[int]) -> SlotsLane:
    return replace(model, steady=tuple(widths)).slots_lane(NO_LIMIT)


def _filled(model: LoadedModel, rows: int) -> list[mx.array]:
    """Logits of a single row whose forward has so many, of each of TOKENS."""
    return [_logits(_steady(model, (rows,)), model, [CONTEXT], 0, token) for token in TOKENS]


def _logits(lane: SlotsLane, model: LoadedModel, lengths: Sequence[int], place: int, token: int) -> mx.array:
    """Of rows of these lengths, those of the one at ``place`` behind a token, [vocab]. Its neighbours have others."""
    for row in range(len(lengths)):
        lane.adopt(str(row), new_prompt(model.network, model.form))
    lane.advance(lengths)
    tokens = [token if row == place else token + 1 + row for row in range(len(lengths))]
    logits = decode(model.network, lane, mx.array(tokens, dtype=mx.int32) % model.vocab_size)[place]
    mx.eval(logits)
    return logits


def _tokens(model: LoadedModel, rows: int) -> mx.array:
    return (mx.arange(1, rows + 1, dtype=mx.int32) * 7919) % model.vocab_size


def _seconds(lane: SlotsLane, model: LoadedModel, rows: int) -> float:
    for row in range(rows):
        lane.adopt(str(row), new_prompt(model.network, model.form))
    lane.advance([CONTEXT + row for row in range(rows)])
    times = []
    for _ in range(1 + TIMED):
        begun = time.monotonic()
        mx.eval(mx.argmax(decode(model.network, lane, _tokens(model, rows)), axis=-1))
        times.append(time.monotonic() - begun)
    return min(times[1:])
