"""Breaks of N: every model in the batch."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="N1-anything-will-do",
        file="millpond/model/parity.py",
        old="if not apart(logits[number, column], row.next()) <= tolerance:",
        new="if not apart(logits[number, column], row.next()) <= 100 * tolerance:",
        by=("test_every_fault_is_noticed",),
    ),
    Break(
        name="N1-half-precision-is-enough",
        file="millpond/model/probe.py",
        old="    if not reason and largest_bytes(",
        new="    if reason and largest_bytes(",
        by=("test_half_precision_hides_nothing",),
    ),
    Break(
        name="N1-windows-stay-wide",
        file="millpond/model/twin.py",
        old="found[name], changed = NARROW, True",
        new="found[name], changed = value, True",
        by=("test_windows_that_no_prompt_of_a_start_fills",),
    ),
    Break(
        name="N3-a-column-too-many",
        file="millpond/kv/states.py",
        old="counted = mx.arange(max(counts), dtype=mx.int32)[None] < kept[:, None]",
        new="counted = mx.arange(max(counts), dtype=mx.int32)[None] <= kept[:, None]",
        by=("test_every_answer_is_that_of_plain_decoding",),
    ),
    Break(
        name="N3-what-is-unknown-stays",
        file="millpond/kv/states.py",
        old='        raise CannotRollBackError("nobody knows how a state came about")\n',
        new="        return array\n",
        by=("test_what_was_not_noted_cannot_be_kept_in_part",),
    ),
    Break(
        name="N2-states-of-the-shortest-prompt",
        file="millpond/model/load.py",
        old="mx.zeros((1, FILL), dtype=mx.int32)",
        new="mx.zeros((1, 1), dtype=mx.int32)",
        by=("test_rows_of_different_lengths_share_a_forward",),
    ),
    Break(
        name="N2-a-leave-copies-all-rows",
        file="millpond/kv/states.py",
        old="return mx.slice_update(array, new, mx.array([row], dtype=mx.uint32), axes=[0])",
        new="return mx.concatenate([array[:row], new, array[row + 1 :]])",
        by=("test_a_join_copies_layer_by_layer_and_a_leave_its_own_row",),
    ),
    Break(
        name="N2-blocks-by-the-longest-row",
        file="millpond/model/ragged.py",
        old="own = (cache.forward.positions // size)[:, None, :, None]",
        new="own = mx.max(cache.forward.positions // size, axis=0)[None, None, :, None]",
        by=("test_rows_of_different_lengths_share_a_forward",),
    ),
    Break(
        name="N2-chunks-are-windows",
        file="millpond/kv/rows.py",
        old="held // window == query // window if chunked else held > query - window",
        new="held > query - window",
        by=("test_rows_of_different_lengths_share_a_forward",),
    ),
    Break(
        name="N5-whatever-is-installed",
        file="millpond/model/upstream.py",
        old="is not supported by mlx-lm {version('mlx-lm')}, which is installed; ",
        new="is not supported by mlx-lm, which is installed; ",
        by=("test_a_type_that_mlx_lm_lacks_is_named_with_its_version",),
    ),
    Break(
        name="N6-snapshots-without-end",
        file="millpond/prefix/eviction.py",
        old="SNAPSHOTS_SHARE = 0.5",
        new="SNAPSHOTS_SHARE = 1.5",
        by=("test_those_that_nobody_came_back_to_go_first",),
    ),
    Break(
        name="N6-the-newest-snapshot-first",
        file="millpond/prefix/memory.py",
        old="(node for node in self._snapshots if not node.pins)",
        new="(node for node in reversed(self._snapshots) if not node.pins)",
        by=("test_those_that_nobody_came_back_to_go_first",),
    ),
    Break(
        name="N6-preempted-without-a-snapshot",
        file="millpond/engine/loop.py",
        old="executor.set_aside(name, kept=True)",
        new="executor.set_aside(name)",
        by=("test_preempted_answers_of_recurrent_models_go_on_from_a_snapshot",),
    ),
]
