"""Breaks of section K: what can be observed."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="K1-disk-counted-twice",
        file="millpond/http/metrics.py",
        old='[("memory", counted.memory_tokens), ("disk", counted.disk_tokens)]',
        new='[("memory", counted.memory_tokens + counted.disk_tokens), ("disk", counted.disk_tokens)]',
        by=("test_the_engines_numbers",),
    ),
    Break(
        name="K1-cancelled-not-counted",
        file="millpond/client/open_requests.py",
        old="            self.counts.cancelled += 1\n",
        new="            pass\n",
        by=("test_every_scrape_adds_up",),
    ),
    Break(
        name="K2-first-step-never-hangs",
        file="millpond/client/watchdog.py",
        old="not beat.running + beat.waiting + open_requests:",
        new="not beat.running + beat.waiting:",
        by=("test_an_engine_that_hangs_is_killed_and_everybody_is_told",),
    ),
    Break(
        name="K2-idleness-is-a-hang",
        file="millpond/client/watchdog.py",
        old="if beat.step != self._step or not beat.running + beat.waiting + open_requests:",
        new="if beat.step != self._step:",
        by=("test_work_without_a_step_is_a_hang_and_idleness_is_none",),
    ),
    Break(
        name="K3-prompts-logged",
        file="millpond/http/reading.py",
        old="    front.unknown_fields += parsed.unknown_fields\n",
        new="    front.unknown_fields += parsed.unknown_fields\n    context_of(http.scope).left = parsed\n",
        by=("test_every_line_parses_and_none_has_text_of_a_prompt",),
    ),
    Break(
        name="K3-no-id",
        file="millpond/http/access.py",
        old='[*message.get("headers", ()), *own]',
        new='[*message.get("headers", ())]',
        by=("test_request_ids_are_echoed_or_made",),
    ),
    Break(
        name="K3-reason-lost",
        file="millpond/client/engine.py",
        old='log.error("engine failed", extra=fields(reason=reason))',
        new='log.error("engine failed", extra={"reason": reason})',
        by=("test_giving_up_says_why", "test_no_field_is_lost"),
    ),
]
