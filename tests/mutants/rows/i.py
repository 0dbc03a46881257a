"""Breaks of section I: packed keys and values."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="I2-a-way-unpublished",
        file="docs/kv-quality.md",
        old="| int4, groups of 64; within the prompt too | 1.33e-01",
        new="| int4, groups of 32; within the prompt too | 1.33e-01",
        by=("test_every_way_of_packing_is_published",),
    ),
    Break(
        name="I1-charged-as-bytes",
        file="millpond/kv/format.py",
        old="dims * self.packing.bits // 8 +",
        new="dims +",
        by=("test_bytes_are_those_of_the_format",),
    ),
]
