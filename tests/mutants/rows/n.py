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
]
