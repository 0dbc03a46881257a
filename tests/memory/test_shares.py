"""Who gets how much of the memory, and who decides about float32."""

from __future__ import annotations

from millpond.memory.budget import CacheSizes
from millpond.memory.shares import (
    LEAST_KV_BYTES,
    blocks_limit,
    draft_limit,
    fitting_kv,
    held_in_float32,
    kv_limit,
    scores_limit,
    wired_limit,
)

GIB = 2**30


def test_keys_and_values_get_what_the_weights_leave() -> None:
    """Of a GPU's memory where it is known, else of the machine's; what is asked for is given."""
    assert kv_limit(0, 2 * GIB, None, 10 * GIB) == 5 * GIB
    assert kv_limit(0, 2 * GIB, 10 * GIB, 100 * GIB) == 7 * GIB
    assert kv_limit(0, 20 * GIB, None, 10 * GIB) == LEAST_KV_BYTES
    assert kv_limit(3 * GIB, 20 * GIB, None, 10 * GIB) == 3 * GIB


def test_processes_of_one_machine_share_it() -> None:
    """The machine and what was asked for; each has its own part of the weights."""
    assert kv_limit(0, GIB, None, 10 * GIB, 2) == 5 * GIB // 2
    assert kv_limit(3 * GIB, GIB, None, 10 * GIB, 2) == 3 * GIB // 2
    assert blocks_limit(3 * GIB, 2 * GIB, 2) == 3 * GIB // 2


def test_blocks_are_a_part_of_keys_and_values() -> None:
    assert [blocks_limit(asked, 1000) for asked in (None, 0, 300, 5000)] == [500, 0, 300, 1000]


def test_cached_blocks_leave_other_programs_their_memory() -> None:
    """Half of what is free, where that is less than half of what keys and values may take, unless more is asked for."""
    assert blocks_limit(None, 10 * GIB, free=30 * GIB) == 5 * GIB
    assert blocks_limit(None, 10 * GIB, free=4 * GIB) == 2 * GIB
    assert blocks_limit(None, 10 * GIB, 2, free=4 * GIB) == GIB
    assert blocks_limit(None, 10 * GIB, free=0) == LEAST_KV_BYTES // 2
    assert blocks_limit(3 * GIB, 10 * GIB, free=0) == 3 * GIB


def test_a_draft_model_has_room_for_as_many_tokens() -> None:
    assert draft_limit(1000, CacheSizes(30), CacheSizes(10)) == 250
    assert draft_limit(1000, CacheSizes(0), CacheSizes(0)) == 0


def test_scores_have_a_part_of_what_is_left() -> None:
    assert scores_limit(None, 100 * GIB) == scores_limit(100 * GIB, GIB) == 4 * GIB
    assert scores_limit(100 * GIB, GIB, 2) == 2 * GIB


def test_what_is_kept_from_being_swapped_out() -> None:
    """Large weights and what goes with them, as far as there is memory for it; whatever is asked for."""
    assert wired_limit(None, 59 * GIB, 10 * GIB, 75 * GIB, 100 * GIB) == 0
    assert wired_limit(None, 61 * GIB, 10 * GIB, 75 * GIB, 100 * GIB) == 71 * GIB
    assert wired_limit(None, 61 * GIB, 20 * GIB, 75 * GIB, 100 * GIB) == 75 * GIB
    assert wired_limit(None, 61 * GIB, 20 * GIB, 0, 100 * GIB) == 0, "nothing is swapped there"
    assert wired_limit(0, 61 * GIB, 20 * GIB, 75 * GIB, 100 * GIB) == 0
    assert wired_limit(GIB, 1, 1, 75 * GIB, 100 * GIB) == GIB


def test_what_fits() -> None:
    assert held_in_float32(8, 10)
    assert not held_in_float32(9, 10)
    assert (fitting_kv(110, 10), fitting_kv(10, 20)) == (90, 0)
