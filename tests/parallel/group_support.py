"""What the tests of groups of ranks share: plans with scripted ranks, and looking after processes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
from waiting import alive, eventually

from millpond import wire
from millpond.client import EngineClient
from millpond.config import read_config
from millpond.launch.followers import GroupPlan
from millpond.launch.layout import GroupLayout, group_layout
from millpond.types import GroupSettings, Request, SamplingParams

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_rank.py")))


def layout_for(**flags: str) -> GroupLayout:
    found = group_layout(read_config(flags, {}), {}, frozenset({"localhost", "127.0.0.1"}))
    assert found is not None
    return found


def client_for(group: GroupPlan, stall_timeout: float = 0.0) -> EngineClient:
    start = wire.Start(model_path=group.folder, max_batch=8, max_itl_ms=400)
    return EngineClient(start, command=SCRIPTED, group=group, stall_timeout=stall_timeout)


@contextlib.asynccontextmanager
async def running(group: GroupPlan) -> AsyncIterator[EngineClient]:
    client = client_for(group)
    await client.start()
    try:
        await client.settled()
        yield client
    finally:
        await client.stop()


def local(script: str = "plain", **flags: str) -> GroupPlan:
    """Ranks on this machine, three unless told otherwise."""
    return GroupPlan(layout_for(**{"tp": "3", **flags}), script, script, SCRIPTED)


def group_of(client: EngineClient) -> GroupSettings:
    """What rank 0 was told."""
    assert client.info is not None
    return msgspec.json.decode(client.info.lane_reason, type=GroupSettings)


def request(name: str, tokens: list[int], max_tokens: int = 4) -> Request:
    return Request(id=name, tokens=tokens, params=SamplingParams(max_tokens=max_tokens))


async def all_gone(pids: Iterable[int]) -> None:
    """Wait for it; that is all one can do for processes that are not our children."""
    for pid in pids:
        await eventually(lambda: not alive(pid))  # noqa: B023 - asked before the next one's turn


def children_of(pid: int) -> list[int]:
    """Direct children (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_lines() -> Iterable[str]:
    """Of all processes that we may look at (Linux)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
