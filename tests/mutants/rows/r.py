"""Breaks of section R: what a GPU runs."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="R1-gemma-in-float16",
        file="millpond/model/load.py",
        old='BEYOND_FLOAT16 = "gemma"',
        new='BEYOND_FLOAT16 = "gemma1"',
        by=("test_a_type_that_holds_what_is_computed",),
    ),
    Break(
        name="R1-half-precision-is-held-to-float32",
        file="millpond/model/probe.py",
        old='if model.form.packs and model.dtype != "float32":',
        new='if model.form.packs and model.dtype == "float32":',
        by=("test_packed_keys_and_values",),
    ),
    Break(
        name="R1-drafts-beyond-the-kernel",
        file="millpond/engine/boot_speculation.py",
        old="FAST_QUERIES // model.queries_per_head - 1",
        new="FAST_QUERIES - 1",
        by=("test_drafts_that_one_fast_kernel_verifies",),
    ),
    Break(
        name="R2-rows-are-handed-over",
        file="millpond/engine/inflight.py",
        old="waiting = [*picks.arrays(), *(array",
        new="waiting = [*picks.arrays(), *lane.arrays(), *(array",
        by=("test_a_step_in_flight_copies_no_rows",),
    ),
    Break(
        name="R2-the-canary-sees-whole-rows-only",
        file="millpond/model/probe.py",
        old="COPIED * (long - short) / growing",
        new="COPIED * (long - short)",
        by=("test_the_canary_finds_a_copy_of_half_a_layer",),
    ),
    Break(
        name="R2-a-wait-for-each-layer",
        file="millpond/kv/arena.py",
        old="if self._bytes >= AT_ONCE_BYTES:",
        new="if self._bytes >= 0:",
        by=("test_rows_that_come_go_and_grow",),
    ),
    Break(
        name="R2-indices-are-cast",
        file="millpond/kv/rows.py",
        old="mx.array([[row] for row in range(self.n)], dtype=mx.uint32)",
        new="mx.array([[row] for row in range(self.n)], dtype=mx.int32)",
        by=("test_a_ragged_step_casts_no_indices",),
    ),
    Break(
        name="R2-a-forward-for-each-prompt",
        file="millpond/schedule/packing.py",
        old="if fits and scored and read.open and ms < found[2]:",
        new="if fits and scored and read.open and ms < 0:",
        by=("test_eight_prompts_at_once_on_a_gpu",),
    ),
    Break(
        name="R3-a-card-is-its-machine",
        file="millpond/native/device.py",
        old='for name in ("max_recommended_working_set_size", "total_memory"):',
        new='for name in ("max_recommended_working_set_size",):',
        by=("test_memory_by_what_mlx_tells",),
    ),
    Break(
        name="R3-what-others-hold-is-ours",
        file="millpond/engine/prepare.py",
        old="return min(found.total, found.free)",
        new="return found.total",
        by=("test_keys_and_values_have_what_the_gpu_has",),
    ),
    Break(
        name="R3-scores-do-not-count",
        file="millpond/schedule/packing.py",
        old="room = min(self._tokens_left, max(self._grid, self._budget.chunk_after(start)))",
        new="room = self._tokens_left",
        by=("test_chunks_get_shorter_where_attention_keeps_scores",),
    ),
    Break(
        name="R3-what-is-asked-for-is-not-wired",
        file="millpond/memory/shares.py",
        old="    if asked is not None:\n        return asked\n    return min(most, weight",
        new="    return min(most, weight",
        by=("test_what_is_wired",),
    ),
    Break(
        name="R5-a-hit-may-differ",
        file="millpond/cli/doctor/results.py",
        old='"ok" if same == len(found) else "failed"',
        new='"ok" if same else "failed"',
        by=("test_a_hit_that_is_no_miss_is_a_failure",),
    ),
    Break(
        name="R5-predictions-do-not-count",
        file="millpond/cli/doctor/selftest.py",
        old="if predicted + reserve > self._ends",
        new="if reserve > self._ends",
        by=("test_what_is_beyond_the_budget_is_not_run",),
    ),
    Break(
        name="R5-rows-that-wait-are-timed",
        file="millpond/cli/doctor/timing.py",
        old="        if waiting:\n            continue\n",
        new="",
        by=("test_rows_are_timed_while_all_of_them_run",),
    ),
    Break(
        name="R5-in-the-users-cache",
        file="millpond/cli/doctor/device.py",
        old='        "cache_dir": folder,\n',
        new="",
        by=("test_a_table_to_be_pasted",),
    ),
    Break(
        name="R5-terminated-in-the-middle",
        file="millpond/cli/doctor/device.py",
        old="add_signal_handler(signal.SIGTERM, task.cancel)",
        new="remove_signal_handler(signal.SIGTERM)",
        by=("test_a_signal_leaves_nothing_behind",),
    ),
]
