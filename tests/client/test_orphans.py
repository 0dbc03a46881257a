"""(A6) Processes whose front end is killed: whatever they are doing, they go with it.

Reading weights that never come, the engine keeps Python's lock: no thread of it could notice anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from endless_model import endless_model
from tiny_models import save
from waiting import alive, until

from millpond.child import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that is stopped lives on")
PATIENCE = 120
FRONT = """
import asyncio, socket, subprocess, sys
from millpond import wire
from millpond.child import python
from millpond.launch.keeper import start_follower
from millpond.client.engine import ENGINE_COMMAND
from millpond.launch.process import EngineProcess
from millpond.launch.followers import RANK_COMMAND
from millpond.types import GroupSettings

async def main(model, endless):
    ready, loading, leader = [await EngineProcess.spawn(command, {}) for command in
        (ENGINE_COMMAND, ENGINE_COMMAND, RANK_COMMAND)]
    silent = socket.create_server(("127.0.0.1", 0))
    follower = await start_follower(GroupSettings(rank=1, world=2, backend="ring", host="127.0.0.1",
        port=silent.getsockname()[1], secret="ab" * 32, model=model), {})
    held = subprocess.Popen(python("-m", "millpond.cli.held", "serve", endless, "--port", "0"), stdin=subprocess.PIPE)
    for engine, folder in ((ready, model), (loading, endless)):
        engine.send(wire.Start(model_path=folder, max_batch=4, max_itl_ms=400.0))
    silent.setblocking(False)
    await asyncio.get_running_loop().sock_accept(silent)
    while not isinstance(await ready.receive(), wire.Ready):
        pass
    print(ready.pid, loading.pid, leader.pid, follower.pid, held.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(until(children.read_text).split()[0])


@pytest.mark.often("True")
@pytest.mark.parametrize("stopped", [False, True])
def test_nobody_outlives_a_killed_front_end(tmp_path: Path, stopped: bool) -> None:
    """An idle engine, one that loads for ever, rank 0 of a group, another rank, the server of a chat and its engine."""
    model = save("llama", tmp_path / "model")
    with endless_model(tmp_path / "endless") as being_read:
        command = python("-c", FRONT, str(model), str(tmp_path / "endless"))
        front = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        pids: list[int] = []
        try:
            assert front.stdout is not None
            pids = [int(pid) for pid in front.stdout.readline().split()]
            assert len(pids) == 5
            being_read(None)
            pids.append(child_of(pids[-1]))
            if stopped:
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
            front.kill()
            front.wait()
            until(lambda: list(map(alive, pids)), lambda living: not any(living), PATIENCE)
        finally:
            front.kill()
            front.wait()
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
