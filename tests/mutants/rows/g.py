"""Breaks of section G: ranks."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="G1-a-world-of-one",
        file="millpond/launch/layout.py",
        old="    if world < 2:\n",
        new="    if world < 1:\n",
        by=("test_a_group_that_cannot_work_is_refused",),
    ),
    Break(
        name="G2-begun-with-less",
        file="millpond/parallel/follower.py",
        old="                if can == position:\n",
        new="                if can >= 0:\n",
        by=("test_a_rank_that_has_less_begins_nothing",),
    ),
    Break(
        name="G3-gaps-accepted",
        file="millpond/parallel/follower.py",
        old="if number != self._number + 1:",
        new="if number <= self._number:",
        by=("test_a_skipped_or_repeated_number_is_refused",),
    ),
    Break(
        name="G3-any-mac",
        file="millpond/parallel/channel.py",
        old="        if not hmac.compare_digest(header[_LENGTH.size :], self._incoming.next(body)):\n",
        new="        if not self._incoming.next(body):\n",
        by=("test_frames_repeated_swapped_or_dropped",),
    ),
    Break(
        name="G3-other-tokens-accepted",
        file="millpond/engine/executor.py",
        old="if mine != tokens or len(kept) != len(tokens):",
        new="if len(kept) != len(tokens):",
        by=("test_another_state_or_other_tokens_are_noticed",),
    ),
    Break(
        name="G4-refused-without-a-word",
        file="millpond/engine/requests.py",
        old="        self._outbox.send(Failed(request.id, ErrorKind.INVALID, why))\n",
        new="        pass\n",
        by=("test_what_cannot_be_answered_gets_its_error_and_nobody_else_notices",),
    ),
    Break(
        name="G5-idle-ranks-forgiven",
        file="millpond/parallel/leader.py",
        old="            if behind > LAG * self._settings.silence_seconds and not self._closing:\n",
        new="            if behind < 0:\n",
        by=("test_a_rank_that_lives_but_does_nothing_is_given_up",),
    ),
    Break(
        name="G6-one-namespace",
        file="millpond/engine/prepare.py",
        old="rank=group.rank, world=group.world",
        new="rank=0, world=group.world",
        by=("test_what_is_on_the_ssd_is_restored_after_a_restart",),
    ),
    Break(
        name="G6-most-counts",
        file="millpond/parallel/leader.py",
        old="return min(answer.position for answer in answers)",
        new="return max(answer.position for answer in answers)",
        by=("test_of_several_ranks_the_one_that_has_least_counts",),
    ),
    Break(
        name="G7-every-rank-draws",
        file="millpond/model/shard.py",
        old="return mx.distributed.all_sum(tokens * mine, group=group)",
        new="return mx.distributed.all_sum(tokens, group=group)",
        by=("test_two_ranks_answer_what_one_answers",),
    ),
]
