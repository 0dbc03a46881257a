"""Breaks of section E: the prefix cache."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="E1-salts-do-not-count",
        file="millpond/prefix/keys.py",
        old='f"{namespace}\\0{salt}"',
        new='f"{namespace}\\0"',
        by=("test_salts_separate",),
    ),
    Break(
        name="E2-computed-twice",
        file="millpond/schedule/scheduler.py",
        old="                    computing[request.wants] = request.priority\n",
        new="                    pass\n",
        by=("test_nobody_waits_for_ever",),
    ),
    Break(
        name="E3-whole-blocks-only",
        file="millpond/prefix/match.py",
        old="            if closest is not None:\n",
        new="            if closest is not None and used == BLOCK:\n",
        by=("test_a_resume_in_the_middle_of_a_block",),
    ),
    Break(
        name="E4-keys-without-data",
        file="millpond/prefix/memory.py",
        old="            self._tree.prune(node)\n",
        new="",
        by=("test_beside_a_made_up_disk",),
    ),
    Break(
        name="E5-uses-do-not-count",
        file="millpond/prefix/memory.py",
        old="for node in reversed(path):",
        new="for node in path[:0]:",
        by=("test_what_was_used_last_goes_last",),
    ),
    Break(
        name="E6-a-view-for-one-layer",
        file="millpond/model/blocks.py",
        old="return mx.take(arrays[0], mx.array([0], dtype=mx.int32), axis=0)",
        new="return arrays[0]",
        by=("test_a_layer_of_its_own_shape_is_copied_too",),
    ),
    Break(
        name="E6-snapshots-are-views",
        file="millpond/model/blocks.py",
        old="arrays += [_stacked(list(alike)) for alike",
        new="arrays += [alike[0] if kind is Kind.STATE else _stacked(list(alike)) for alike",
        by=("test_blocks_hold_no_more_memory_than_they_say",),
    ),
    Break(
        name="E7-a-window-too-short",
        file="millpond/prefix/planner.py",
        old="return max(0, self.window - 1)",
        new="return max(0, self.window - 2)",
        by=("test_restorable_is_the_largest_position_that_every_layer_can_resume",),
    ),
    Break(
        name="E8-a-hit-copies-each-block",
        file="millpond/model/blocks.py",
        old="front : front + piece.shape[2]] = piece",
        new="front : front + piece.shape[2]] = piece + 0",
        by=("test_a_hit_copies_the_row_and_nothing_else",),
    ),
]
