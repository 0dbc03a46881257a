"""Breaks of section H: speculation."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="H1-matches-must-be-longer",
        file="millpond/speculate/ngrams.py",
        old="            if length >= n:\n",
        new="            if length > n:\n",
        by=("test_finds_what_a_search_finds",),
    ),
    Break(
        name="H2-as-many-for-all-rows",
        file="millpond/engine/executor.py",
        old="[max(1, count) for count in kept]",
        new="[max(1, min(kept)) for _ in kept]",
        by=("test_every_answer_is_that_of_plain_decoding",),
    ),
    Break(
        name="H3-tables-are-shared",
        file="millpond/sample/state.py",
        old="None if self._edits is None else self._edits.copy()",
        new="self._edits",
        by=("test_what_may_come_is_apart_from_what_has_come",),
    ),
    Break(
        name="H3-bad-guesses-are-taken",
        file="millpond/engine/inflight.py",
        old="if drawn != guessed), len(draft))",
        new="if drawn != guessed + 0 * drawn and drawn < 0), len(draft))",
        by=("test_every_answer_is_that_of_plain_decoding",),
    ),
    Break(
        name="H4-goes-on-behind-the-end",
        file="millpond/engine/requests.py",
        old="while finish is None and count < len(drawn.tokens):",
        new="while count < len(drawn.tokens):",
        by=("test_endings_in_the_middle_of_a_run",),
    ),
    Break(
        name="H5-debt-without-bound",
        file="millpond/speculate/controller.py",
        old="min(BUDGET, max(LEAST_BUDGET, self._budget + saved))",
        new="min(BUDGET, self._budget + saved)",
        by=("test_no_debt_is_so_large_that_it_is_not_paid_back",),
    ),
    Break(
        name="H5-reading-without-bound",
        file="millpond/speculate/controller.py",
        old="max(LEAST_BUDGET, self._budget - read_ms",
        new="max(-1e9, self._budget - read_ms",
        by=("test_no_debt_is_so_large_that_it_is_not_paid_back",),
    ),
    Break(
        name="H6-all-count-as-accepted",
        file="millpond/engine/speculation.py",
        old="accepted=before.accepted + sum(agreed)",
        new="accepted=before.accepted + sum(drafts)",
        by=("test_a_draft_model_and_the_text_itself",),
    ),
]
