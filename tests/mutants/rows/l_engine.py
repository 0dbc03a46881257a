"""Breaks of section L: failures inside the engine and of its disk."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="L15-one-stream-hangs",
        file="millpond/client/open_requests.py",
        old="[*self._streams, *self._explaining]",
        new="[*list(self._streams)[1:], *self._explaining]",
        by=("test_killed_engine_during_eight_streams",),
    ),
    Break(
        name="L12-one-prompt-ends-the-engine",
        file="millpond/engine/recovery.py",
        old='        log.error("prefill of request %s failed", name, exc_info=error)\n',
        new="        raise error\n",
        by=("test_one_bad_request_never_kills_others",),
    ),
    Break(
        name="L13-nobody-on-probation",
        file="millpond/engine/recovery.py",
        old="probation=guilty is None and not guessed",
        new="probation=False",
        by=("test_one_bad_request_never_kills_others",),
    ),
    Break(
        name="L14-a-table-grows-late",
        file="millpond/sample/edits.py",
        old="if slot == len(self._ids):",
        new="if slot > len(self._ids):",
        by=("test_a_table_is_right_after_every_token",),
    ),
    Break(
        name="L14-arrival-ends-the-engine",
        file="millpond/engine/requests.py",
        old='            log.exception("request %s cannot be begun", request.id)\n',
        new="            raise\n",
        by=("test_a_request_that_cannot_be_sampled_fails_alone",),
    ),
    Break(
        name="L16-nobody-gives-way",
        file="millpond/schedule/admission.py",
        old="while len(left) > 1 and not MemoryReservation(budget, left).fits:",
        new="while len(left) > 99 and not MemoryReservation(budget, left).fits:",
        by=("test_memory_pressure_preempts_and_resumes_unseen",),
    ),
    Break(
        name="L17-no-way-out",
        file="millpond/prefix/disk/limits.py",
        old="            rows = pool.evict_files(total - keep)\n",
        new="            raise\n",
        by=("test_a_full_file_system",),
    ),
    Break(
        name="L18-nobody-is-told",
        file="millpond/prefix/disk/reader.py",
        old='            problem = f"read error: {error}"\n',
        new="            raise\n",
        by=("test_errors_of_reading_are_misses",),
    ),
    Break(
        name="L19-reading-always-pays",
        file="millpond/prefix/loader.py",
        old="return reading < self._prefill_seconds(start, end - start)",
        new="return reading >= 0.0",
        by=("test_a_disk_that_is_slower_than_computing_is_not_read",),
    ),
    Break(
        name="L20-no-checksum",
        file="millpond/prefix/disk/block_file.py",
        old="if xxhash.xxh3_128_digest(file[: parts.payload_end]) != bytes(",
        new="if len(file) < parts.payload_end and bytes(",
        by=("test_a_flipped_bit_anywhere",),
    ),
    Break(
        name="L21-nobody-counts",
        file="millpond/prefix/disk/reader.py",
        old="self._tally.add_damaged(error.damage)",
        new="pass",
        by=("test_cut_off_or_zeroed_from_anywhere",),
    ),
    Break(
        name="L22-files-are-not-entered",
        file="millpond/prefix/disk/sweep.py",
        old="                pool.index.adopt(*row)\n",
        new="                pass\n",
        by=("test_a_lost_or_broken_index_is_made_anew",),
    ),
    Break(
        name="L23-goes-on-without-a-folder",
        file="millpond/prefix/disk/writer.py",
        old="if self._pool.replaced():",
        new="if self._pool.replaced() and not self._writes:",
        by=("test_the_folder_removed_while_running",),
    ),
    Break(
        name="L24-files-of-the-living-go",
        file="millpond/prefix/disk/sweep.py",
        old="return not pool.files.alive(pid) or",
        new="return pool.files.alive(pid) or",
        by=("test_leftovers_of_the_dead_go_and_those_of_the_living_stay",),
    ),
    Break(
        name="L27-what-is-queued-is-dropped",
        file="millpond/prefix/disk/writer.py",
        old="            self._guarded(self._change)\n        while (batch",
        new="            break\n        while (batch",
        by=("test_closing_finishes_what_is_queued",),
    ),
]
