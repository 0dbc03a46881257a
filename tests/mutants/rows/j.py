"""Breaks of section J: configuration."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="J1-dead-write-timeout",
        file="millpond/cli/serve.py",
        old="config.body_timeout, config.write_timeout)",
        new="config.body_timeout, 600.0)",
        by=("test_one_that_never_reads_is_cut_and_everything_is_given_back",),
    ),
    Break(
        name="J1-dead-prefill-chunk",
        file="millpond/client/start.py",
        old="prefill_chunk=config.prefill_chunk,",
        new="prefill_chunk=0,",
        by=("test_prefill_chunk_cuts_prompts",),
    ),
    Break(
        name="J1-dead-ssd-ttl",
        file="millpond/config.py",
        old='"label": label}',
        new='"label": label, "ssd_ttl": 0.0}',
        by=("test_ssd_ttl_removes_what_was_not_used",),
    ),
    Break(
        name="J1-dead-max-restarts",
        file="millpond/client/start.py",
        old="        max_restarts=config.max_restarts,\n",
        new="",
        by=("test_no_restart_at_all_may_be_asked_for",),
    ),
    Break(
        name="J1-no-environment",
        file="millpond/config.py",
        old="        elif variable in environ:\n",
        new='        elif variable in environ and name != "port":\n',
        by=("test_every_setting_is_read_from_every_source",),
    ),
    Break(
        name="J2-wider-range",
        file="millpond/config.py",
        old='le=65535, description="Port to listen on',
        new='le=65536, description="Port to listen on',
        by=("test_bad_values_are_refused_by_source_value_and_range",),
    ),
]
