"""From replies to figures: means and percentiles of one workload, and the machine they were taken on."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from millpond.bench.stream import Json, Reply
from millpond.bench.workloads import Outcome


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least ``percent`` per cent of the values do not exceed; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Summary:
    """One workload in figures. Times in seconds; None where there was nothing to measure.

    ``ttft`` and ``gap`` figures leave out the long prompt of ``long-prompt``: that one has its own notes.
    """

    name: str
    requests: int
    failures: int
    errors: tuple[str, ...]
    wall: float
    prompt_tokens: float | None
    """Mean, as the server states it."""
    cached_tokens: float | None
    """Mean, as the server states it."""
    tokens: int
    """Of all good answers together."""
    counted_by: str
    """``usage``, ``chunks`` (one chunk taken as one token) or ``mixed``."""
    tokens_per_second: float | None
    """Tokens of good answers by wall time."""
    stream_tokens_per_second: float | None
    """Pace of one stream after its first token: the inverse of the mean time per token."""
    ttft_mean: float | None
    ttft_p95: float | None
    per_token_mean: float | None
    gap_mean: float | None
    gap_p95: float | None
    gap_max: float | None
    notes: dict[str, float]

    def as_json(self) -> dict[str, Json]:
        return {**self.__dict__, "errors": list(self.errors), "notes": dict(self.notes)}


def summarise(name: str, outcome: Outcome) -> Summary:
    good = [reply for reply in outcome.replies if reply.ok]
    timed = [reply for reply in good if reply.role != "long"]
    ttfts = [reply.ttft for reply in timed if reply.ttft is not None]
    gaps = [gap for reply in timed for gap in reply.gaps]
    per_token = mean([reply.per_token for reply in timed if reply.per_token is not None])
    tokens = sum(reply.tokens for reply in good)
    ways = {reply.counted_by for reply in good}
    return Summary(
        name=name,
        requests=len(outcome.replies),
        failures=len(outcome.replies) - len(good),
        errors=tuple(sorted({reply.error for reply in outcome.replies if reply.error is not None})),
        wall=outcome.wall,
        prompt_tokens=mean([reply.prompt_tokens for reply in timed if reply.prompt_tokens is not None]),
        cached_tokens=mean([reply.cached_tokens for reply in timed if reply.cached_tokens is not None]),
        tokens=tokens,
        counted_by=ways.pop() if len(ways) == 1 else "mixed" if ways else "none",
        tokens_per_second=tokens / outcome.wall if tokens and outcome.wall > 0 else None,
        stream_tokens_per_second=1 / per_token if per_token else None,
        ttft_mean=mean(ttfts),
        ttft_p95=percentile(ttfts, 95),
        per_token_mean=per_token,
        gap_mean=mean(gaps),
        gap_p95=percentile(gaps, 95),
        gap_max=max(gaps, default=None),
        notes=dict(outcome.notes),
    )


def reply_as_json(reply: Reply, zero: float) -> dict[str, Json]:
    """Raw figures of one reply; times in seconds since ``zero``."""
    arrivals: list[Json] = [round(at - zero, 6) for at in reply.arrivals]
    return {
        "role": reply.role,
        "sent": round(reply.sent - zero, 6),
        "ended": round(reply.ended - zero, 6),
        "arrivals": arrivals,
        "status": reply.status,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cached_tokens": reply.cached_tokens,
        "text": reply.text,
        "error": reply.error,
    }


def machine() -> dict[str, Json]:
    """What the load ran on, as far as it can be told."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
