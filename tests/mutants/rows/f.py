"""Breaks of section F: the SSD tier."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="F1-not-synced",
        file="millpond/prefix/disk/pool.py",
        old="                    self.files.sync(descriptor)\n",
        new="                    pass\n",
        by=("test_a_durable_write_is_synced_before_its_row",),
    ),
    Break(
        name="F2-no-checksum",
        file="millpond/prefix/disk/block_file.py",
        old="if xxhash.xxh3_128_digest(file[: parts.payload_end]) != bytes(",
        new="if len(file) < parts.payload_end and bytes(",
        by=("test_every_flipped_bit_is_found",),
    ),
    Break(
        name="F3-children-are-searched",
        file="millpond/prefix/disk/index.py",
        old="CREATE INDEX records_by_parent ON records(parent);\n",
        new="",
        by=("test_no_query_on_the_way_of_writes_reads_the_whole_table",),
    ),
    Break(
        name="F4-what-has-no-row-is-free",
        file="millpond/prefix/disk/limits.py",
        old="self._settings.cache_ssd - under_way - nbytes",
        new="self._settings.cache_ssd - nbytes",
        by=("test_the_cap_holds_after_every_event",),
    ),
    Break(
        name="F5-a-discard-waits-for-the-disk",
        file="millpond/prefix/disk/tier.py",
        old="self._inbox.discard(ids)",
        new='self._reader._files.read(0, memoryview(b"")) or self._inbox.discard(ids)',
        by=("test_a_disk_that_does_not_answer_holds_up_no_call",),
        hangs=60,
    ),
    Break(
        name="F6-the-rest-is-not-answered",
        file="millpond/prefix/disk/writer.py",
        old="self._refuse(CLOSING)",
        new="self._writes.clear()",
        by=("test_closing_with_a_full_queue_answers_every_write",),
    ),
    Break(
        name="F7-the-writer-dies",
        file="millpond/prefix/disk/backoff.py",
        old="BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]",
        new="BACKOFF_SECONDS[self._failures]",
        by=("test_a_disk_that_goes_on_failing_is_tried_for_ever",),
    ),
    Break(
        name="F7-refused-is-tried-at-once",
        file="millpond/prefix/cache.py",
        old="self._evict(ahead=not problem)",
        new="self._evict()",
        by=("test_what_the_disk_does_not_keep_is_not_written_for_ever",),
    ),
    Break(
        name="F7-dropped-is-written-again",
        file="millpond/prefix/eviction.py",
        old="if not node.lost:",
        new="if True:",
        by=("test_what_the_disk_does_not_keep_is_not_written_for_ever",),
    ),
    Break(
        name="F8-reading-always-pays",
        file="millpond/prefix/loader.py",
        old="return reading < self._prefill_seconds(start, end - start)",
        new="return reading >= 0.0",
        by=("test_a_disk_that_is_slower_than_computing_is_not_read",),
    ),
    Break(
        name="F8-all-or-nothing",
        file="millpond/prefix/cache.py",
        old="if more.position <= plan.position:\n            query.refused = End.MEMORY",
        new="if _bytes_on_disk(_absent(self.plan(query, disk=True))) > room:\n            query.refused = End.MEMORY",
        by=("test_no_more_is_read_than_memory_may_hold", "test_what_memory_cannot_hold_is_restored_as_far_as_it_can"),
    ),
    Break(
        name="F8-what-was-read-before-does-not-count",
        file="millpond/prefix/cache.py",
        old="_within(room - query.fetched_bytes, query.match, more, needs)",
        new="_within(room, query.match, more, needs)",
        by=("test_what_memory_cannot_hold_is_restored_as_far_as_it_can",),
    ),
    Break(
        name="F9-written-anew-is-dropped",
        file="millpond/prefix/disk/pool.py",
        old="if known is not None and self.has_file(known.namespace, known.id):",
        new="if known is None:",
        by=("test_a_missing_file_that_another_has_written_since_stays",),
    ),
    Break(
        name="F10-files-for-everybody",
        file="millpond/prefix/disk/files.py",
        old="FILE_MODE = 0o600",
        new="FILE_MODE = 0o644",
        by=("test_everything_is_private_to_the_user",),
    ),
    Break(
        name="F8-planned-for-with-each-block",
        file="millpond/prefix/cache.py",
        old="if offer.held and query.load is not None",
        new="if offer.held and query.load is None and query.load is not None",
        by=("test_what_arrives_block_by_block_is_planned_for_once",),
    ),
    Break(
        name="F8-nothing-is-put-ahead",
        file="millpond/engine/prefixes.py",
        old="                found.go_on()",
        new="                pass",
        by=("test_a_lone_prompt_is_put_together_while_the_disk_reads",),
    ),
    Break(
        name="F8-who-goes-leaves-a-row",
        file="millpond/engine/prefixes.py",
        old="queue[0][0] == self._not_assembled:\n            return",
        new="queue[0][0] == self._not_assembled:\n            self._assembly = found\n            return",
        by=("test_who_goes_leaves_nothing",),
    ),
]
