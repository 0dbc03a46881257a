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
    Break(
        name="I1-a-tile-is-left-out",
        file="millpond/kv/rows.py",
        old="for first in range(settled, end, TILE)]",
        new="for first in range(settled, end - TILE, TILE)]",
        by=("test_tiles_fill_up_while_rows_are_decoded",),
    ),
    Break(
        name="I1-a-tile-is-left-out-in-c",
        file="millpond/native/decode.c",
        old="first < call->ends[row]; first += TILE)",
        new="first < call->ends[row] - TILE; first += TILE)",
        by=("test_any_story",),
    ),
    Break(
        name="I1-means-forgotten",
        file="millpond/native/decode.c",
        old="scores[q * TILE + j] += raised[q];",
        new="scores[q * TILE + j] += 0.0f * raised[q];",
        by=("test_any_story",),
    ),
    Break(
        name="I1-one-spoils-a-tile",
        file="millpond/native/tiles.c",
        old="mean[j] - mean[j] == 0.0f ? float_to_half(mean[j], 0) : 0",
        new="float_to_half(mean[j], 0)",
        by=("test_one_position_that_is_not_finite_spoils_no_other",),
    ),
    Break(
        name="I1-guessed-beyond-a-tile",
        file="millpond/engine/speculation.py",
        old="return self._tile - 1 - held % self._tile if self._tile else self._most",
        new="return self._most",
        by=("test_guesses_across_the_ends_of_tiles",),
    ),
    Break(
        name="I1-parts-of-tiles",
        file="millpond/model/blocks.py",
        old="state=bool(groups[Kind.STATE]), whole=form.rotated)",
        new="state=bool(groups[Kind.STATE]))",
        by=("test_a_part_of_a_tile_is_of_no_use",),
    ),
    Break(
        name="I1-a-mask-for-each-size",
        file="millpond/kv/rows.py",
        old="key = (first, packed, newest, ring)",
        new="key = (exact, tiled, newest, ring)",
        by=("test_a_long_prompt_beside_a_row",),
    ),
    Break(
        name="I1-room-for-what-will-not-come",
        file="millpond/model/assembly.py",
        old="room = 0 if whole else self._capacity",
        new="room = self._capacity",
        by=("test_a_prompt_that_is_restored_whole_is_as_large_as_its_row",),
    ),
    Break(
        name="I1-taken-back-and-still-packed",
        file="millpond/kv/batch.py",
        old="self._settled = [min(settled, end) for settled, end in zip(self._settled, self.ends, strict=True)]",
        new="pass",
        by=("test_everybody_is_where_their_data_is",),
    ),
]
