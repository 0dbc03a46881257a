"""Running workloads against one server, one after another, on one event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx

from millpond.bench.connection import connection
from millpond.bench.prompts import request_text
from millpond.bench.stream import Ask, Endpoint, Json, Reply
from millpond.bench.summary import Summary, machine, reply_as_json, summarise
from millpond.bench.workloads import Outcome, Sizes, Workload


class UnreachableError(Exception):
    """Nothing answers at the given address."""


@dataclass(frozen=True)
class Target:
    """Which server to measure and how long to wait for it. ``model`` empty: the first one that it lists."""

    url: str
    model: str = ""
    timeout: float = 300.0
    """Seconds that one request may take."""
    api_key: str = ""


@dataclass
class Run:
    """Results of one server, in the order in which the workloads ran."""

    target: Target
    model: str
    server: str
    """The server's own name, from its response header."""
    sizes: Sizes
    label: str = ""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)

    @property
    def all_failed(self) -> bool:
        """True when no request of any workload got a good answer."""
        return all(summary.failures == summary.requests for summary in self.summaries.values())

    def as_json(self) -> dict[str, Json]:
        return {
            "label": self.label,
            "url": self.target.url,
            "model": self.model,
            "server": self.server,
            "began": self.began.isoformat(timespec="seconds"),
            "salt": self.sizes.salt,
            "tokens": self.sizes.tokens,
            "prompt_scale": self.sizes.prompt_scale,
            "machine": machine(),
            "workloads": {name: self._workload_as_json(name) for name in self.summaries},
        }

    def _workload_as_json(self, name: str) -> Json:
        outcome = self.outcomes[name]
        zero = min((reply.sent for reply in outcome.replies), default=0.0)
        requests: list[Json] = [reply_as_json(reply, zero) for reply in outcome.replies]
        return {"summary": self.summaries[name].as_json(), "requests": requests}


class RunProgress:
    """Told what happens; this one keeps silent."""

    def begin(self, workload: Workload, count: int) -> None:
        """A workload starts; it will send ``count`` requests."""

    def tick(self, reply: Reply) -> None:
        """One of its requests ended."""

    def end(self) -> None:
        """The workload is over."""


async def run_workloads(
    target: Target,
    workloads: Sequence[Workload],
    sizes: Sizes,
    *,
    label: str = "",
    progress: RunProgress | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Run:
    """Run the workloads in order after one unmeasured request. Raises UnreachableError when nobody
    answers, Unusable for a proxy that cannot be used.

    ``on_run`` gets the Run object before the first workload, so that an interrupted run still has its results.
    """
    progress = progress or RunProgress()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(None, connect=10.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, **connection(target.url, target.api_key)) as client:
        model, server = await _identify(client, target)
        endpoint = Endpoint(client, model, target.timeout)
        run = Run(target, model, server, sizes, label)
        if on_run is not None:
            on_run(run)
        await endpoint.ask(Ask([{"role": "user", "content": request_text(f"{sizes.salt}/warm-up", 20)}], 4))
        for workload in workloads:
            progress.begin(workload, workload.count(sizes))
            outcome = await workload.run(endpoint, sizes, progress.tick)
            run.outcomes[workload.name] = outcome
            run.summaries[workload.name] = summarise(workload.name, outcome)
            progress.end()
    return run


async def _identify(client: httpx.AsyncClient, target: Target) -> tuple[str, str]:
    """The model to name in requests and the server's name. A server that lists no models is not an error."""
    try:
        response = await client.get("/v1/models", timeout=min(30.0, target.timeout))
    except httpx.ConnectError as error:
        raise UnreachableError(f"no server answers at {target.url}: {error}") from error
    except httpx.HTTPError:
        return target.model or "default", ""
    server = response.headers.get("server", "")
    return target.model or _first_model(response) or "default", server


def _first_model(response: httpx.Response) -> str:
    try:
        listed = response.json()
    except ValueError:
        return ""
    data = listed.get("data") if isinstance(listed, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    name = first.get("id") if isinstance(first, dict) else None
    return name if isinstance(name, str) else ""


def fresh_salt() -> str:
    """A salt that no earlier run used, so that nobody's prefix cache knows the prompts."""
    return f"{time.time_ns():x}"
