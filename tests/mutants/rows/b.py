"""Breaks of section B: the HTTP API."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="B6-prompt-per-choice",
        file="kvarn/http/generation.py",
        old="sum(len(choice.request.tokens) for choice in firsts)",
        new="sum(len(choice.request.tokens) for choice in self._choices)",
        by=("test_completion_prompts_in_every_form",),
    ),
    Break(
        name="B7-kept-whole",
        file="kvarn/http/body.py",
        old="        else:\n            kept.clear()\n",
        new="        else:\n            kept += part\n",
    ),
    Break(
        name="B8-metrics-open",
        file="kvarn/http/gate.py",
        old='OPEN = ("/livez", "/readyz", "/health")',
        new='OPEN = ("/livez", "/readyz", "/health", "/metrics")',
        by=("test_only_the_probes_are_open",),
    ),
    Break(
        name="B8-wildcard-without-dot",
        file="kvarn/http/gate.py",
        old="host.endswith(allowed[1:])",
        new="host.endswith(allowed[2:])",
        by=("test_allowed_hosts_are_the_only_ones",),
    ),
]
