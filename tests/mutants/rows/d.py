"""Breaks of section D: the engine."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="D4-a-prompt-sees-what-it-is-filled-up-with",
        file="millpond/model/together.py",
        old="seen = column <= place",
        new="seen = column <= place + 1",
        by=("test_prompts_of_different_lengths_behind_different_prefixes",),
    ),
    Break(
        name="D6-the-first-of-those-read-together-is-to-blame",
        file="millpond/engine/recovery.py",
        old="if len(names) == 1 or self._executor",
        new="if names or self._executor",
        by=("test_one_that_fails_fails_alone",),
    ),
    Break(
        name="D1-leaving-copies-all",
        file="millpond/kv/segment.py",
        old="mx.take(array[:, :, :held], index, axis=0)",
        new="array[:, :, :held][row : row + 1]",
        by=("test_joining_and_leaving_cost_one_row",),
    ),
    Break(
        name="D2-all-tables-in-one-row",
        file="millpond/sample/edits.py",
        old="table.ids + row * vocab_size",
        new="table.ids",
        by=("test_everything_batches_together",),
    ),
    Break(
        name="D3-age-does-not-count",
        file="millpond/schedule/scheduler.py",
        old="seconds -= age_weight * (now - request.arrival)",
        new="seconds -= age_weight * 0.0",
        by=("test_a_long_prompt_is_not_starved_by_an_endless_stream_of_short_ones",),
    ),
    Break(
        name="D3-requeued-lose-their-age",
        file="millpond/schedule/scheduler.py",
        old="request.arrival = min(request.arrival, now)",
        new="request.arrival = now",
        by=("test_requeue_recomputes_from_the_start_and_keeps_the_arrival",),
    ),
    Break(
        name="D4-rows-change-places",
        file="millpond/kv/batch.py",
        old="self._names[row] = self._names[last]\n",
        new="self._names.append(self._names.pop(row))\n",
        by=("test_batched_answers_equal_single_ones",),
    ),
    Break(
        name="D5-noise-by-row",
        file="millpond/sample/sampler.py",
        old="self.states[row].params.seed for",
        new="self.states[row].params.seed + row for",
        by=("test_a_row_is_the_same_alone_and_in_any_batch",),
    ),
    Break(
        name="D6-a-state-fails-the-step",
        file="millpond/engine/inflight.py",
        old="                sequence.fault = error\n",
        new="                raise\n",
        by=("test_what_sampling_knows_of_a_request_may_fail_at_any_step",),
    ),
    Break(
        name="D6-guesses-fail-the-engine",
        file="millpond/engine/speculation.py",
        old='            log.exception("guessing for request %s failed; it goes on without", name)\n',
        new="            raise\n",
        by=("test_whatever_guessing_raises_costs_guesses_and_nothing_else",),
    ),
    Break(
        name="D7-the-oldest-goes",
        file="millpond/schedule/admission.py",
        old="(request.priority, -request.arrival, -request.number)",
        new="(request.priority, request.arrival, request.number)",
        by=("test_growth_preempts_the_youngest_row",),
    ),
    Break(
        name="D9-launched-elsewhere",
        file="millpond/engine/inflight.py",
        old="mx.async_eval(*self.waiting)",
        new='__import__("concurrent.futures").futures.ThreadPoolExecutor().submit(mx.eval, *self.waiting).result()',
        by=("test_one_thread_alone_touches_mlx",),
    ),
    Break(
        name="D8-twice-the-context",
        file="millpond/http/prompts.py",
        old="wanted > room:",
        new="wanted > room + context:",
        by=("test_prompt_and_max_tokens_beyond_the_context",),
    ),
]
