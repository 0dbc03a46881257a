"""Groups of ranks as the front end starts, watches and ends them: real processes with a script instead of a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from group_support import (
    SCRIPTED,
    alive,
    all_gone,
    children_of,
    client_for,
    command_lines,
    group_of,
    layout_for,
    local,
    request,
    running,
)
from waiting import eventually, free_port, run

from millpond.client import EngineClient, EngineError, EngineState, EngineUnavailable
from millpond.client.watchdog import Watchdog
from millpond.lifeline import LOST_STATUS
from millpond.types import ErrorKind, Finish, GroupSettings
from millpond.wire import Beat

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SILENT = 903


@contextlib.asynccontextmanager
async def streaming(client: EngineClient) -> AsyncIterator[asyncio.Task[EngineError]]:
    """A stream that has begun; the task is its end, which must be an error."""
    begun = asyncio.Event()

    async def read() -> EngineError:
        try:
            async for _ in client.submit(request(os.urandom(4).hex(), [1, SILENT], 100)):
                begun.set()
        except EngineError as error:
            return error
        pytest.fail("the stream has ended without an error")

    reading = asyncio.create_task(read())
    await begun.wait()
    yield reading
    await reading


async def next_group(client: EngineClient) -> None:
    """Wait until the group has been replaced, and see that it works."""
    await eventually(lambda: client.state is not EngineState.READY)
    await client.settled()
    answer = [delta async for delta in client.submit(request(os.urandom(4).hex(), [5], 2))]
    assert answer[-1].finish is Finish.LENGTH


def reason(caplog: pytest.LogCaptureFixture) -> str:
    """Of the last loss in the log."""
    found = [record for record in caplog.records if record.message == "engine lost, starting another"]
    return str(found[-1].fields["reason"])  # type: ignore[attr-defined]


def test_every_rank_is_told_its_place() -> None:
    """tp: so many ranks; hosts, ports and the secret are those of this group."""

    async def test() -> None:
        async with running(local()) as client:
            group = group_of(client)
            assert (group.rank, group.world, group.backend, group.host) == (0, 3, "ring", "127.0.0.1")
            assert len(group.secret) == 64
            assert group.silence_seconds == 5.0
            nodes = json.loads(group.files["MLX_HOSTFILE"])
            ports = [node[0].rpartition(":")[2] for node in nodes]
            assert [node[0].rpartition(":")[0] for node in nodes] == ["127.0.0.1"] * 3
            assert len({*ports, str(group.port)}) == 4
            assert len(client.pids) == 3

    run(test)


@pytest.mark.often("hangs-2", "notices-1")
@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("script", ["slow=0.01", "slow=0.01,blind"], ids=["rank 0 notices", "rank 0 hangs"])
def test_a_killed_follower_ends_all_at_once(caplog: pytest.LogCaptureFixture, script: str, victim: int) -> None:
    """Clients hear of it, nobody of the old group is left, and the next has other ports and another secret."""

    async def test() -> None:
        async with running(local(script)) as client:
            old, pids = group_of(client), client.pids
            async with streaming(client) as ended, streaming(client) as other:
                os.kill(pids[victim], signal.SIGKILL)
                assert {(await ended).kind, (await other).kind} == {ErrorKind.DIED}
                with pytest.raises(EngineUnavailable, match="restarting"):
                    client.submit(request("x", [1]))
            await next_group(client)
            assert not any(alive(pid) for pid in pids)
            new = group_of(client)
            assert new.secret != old.secret
            assert new.files != old.files
            assert client.counts.restarts == 1
        assert reason(caplog) == f"rank {victim} was ended by SIGKILL"

    run(test)


def test_a_killed_rank_0_is_blamed_and_not_those_that_follow_it(caplog: pytest.LogCaptureFixture) -> None:
    """The followers see their connections close and end, too, some before we look."""

    async def test() -> None:
        async with running(local("slow=0.01")) as client:
            pids = client.pids
            async with streaming(client) as ended:
                os.kill(pids[0], signal.SIGKILL)
                assert (await ended).kind is ErrorKind.DIED
            await next_group(client)
            assert not any(alive(pid) for pid in pids)
        assert reason(caplog) == "rank 0 was ended by SIGKILL"

    run(test)


def test_a_follower_that_fails_is_quoted(caplog: pytest.LogCaptureFixture) -> None:
    """And what it writes is passed on to our own standard error."""

    async def test() -> None:
        async with running(local("die=0.3")) as client:
            await next_group(client)
        assert "rank 1 exited with status 7: a shard of layer 3 is missing" in reason(caplog)

    run(test)


def test_what_ranks_write_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with running(local()):
            pass

    run(test)
    said = capsys.readouterr().err
    assert "rank 1 of 3 is here\n" in said
    assert "rank 2 of 3 is here\n" in said


@pytest.mark.often("slow=0.01]")
@pytest.mark.parametrize("script", ["slow=0.01", "slow=0.01,deafranks"])
def test_a_stopped_rank_0_is_killed_after_tp_silence(caplog: pytest.LogCaptureFixture, script: str) -> None:
    """stall_timeout is off, and has nothing to do with it."""

    async def test() -> None:
        async with running(local(script, tp_silence="1")) as client:
            pids = client.pids
            async with streaming(client) as ended:
                os.kill(pids[0], signal.SIGSTOP)
                assert (await ended).kind is ErrorKind.DIED
            await next_group(client)
            assert not any(alive(pid) for pid in pids)
        assert reason(caplog).startswith("it has not been heard of for")

    run(test)


def test_a_stopped_follower_dies_with_the_group() -> None:
    async def test() -> None:
        async with running(local("slow=0.01")) as client:
            pids = client.pids
            os.kill(pids[1], signal.SIGSTOP)
            os.kill(pids[2], signal.SIGKILL)
            await next_group(client)
            assert not any(alive(pid) for pid in pids)

    run(test)


def test_a_follower_killed_while_loading_is_no_reason_to_give_up(caplog: pytest.LogCaptureFixture) -> None:
    """Although rank 0 says Fatal for it before the first readiness."""

    async def test() -> None:
        client = client_for(local("load=0.5"))
        await client.start()
        try:
            await eventually(lambda: len(client.pids) == 3)
            victim = client.pids[2]
            await eventually(lambda: client.stage is not None)
            os.kill(victim, signal.SIGKILL)
            await client.settled()
        finally:
            await client.stop()
        assert reason(caplog) == "rank 2 was ended by SIGKILL"

    run(test)


def test_what_rank_0_cannot_do_is_final() -> None:
    async def test() -> None:
        client = client_for(local("fatal"))
        await client.start()
        with pytest.raises(EngineUnavailable, match="model_type 'nonsense'"):
            await client.settled()
        assert client.counts.restarts == 0
        await client.stop()

    run(test)


def test_followers_that_cannot_run_leave_nothing_behind() -> None:
    async def test() -> None:
        client = client_for(replace(local(), command=("/no/such/program",)))
        before = children_of(os.getpid()) if sys.platform == "linux" else []
        with pytest.raises(OSError, match="rank 1: /no/such/program: No such file"):
            await client.start()
        assert sys.platform != "linux" or children_of(os.getpid()) == before

    run(test)


def test_an_address_that_cannot_be_had_is_named() -> None:
    """tp_host"""

    async def test() -> None:
        client = client_for(local(tp_host="192.0.2.1"))
        with pytest.raises(OSError, match=r"rank 0, which must be on this machine, cannot listen on 192\.0\.2\.1"):
            await client.start()

    run(test)


def test_tp_port_is_where_rank_0_listens() -> None:
    """Also again and again, and the backend's ports are behind it."""

    async def test() -> None:
        async with running(local(tp_port=str(port := free_port()))) as client:
            for _ in range(2):
                group = group_of(client)
                assert group.port == port
                assert [int(node[0].rpartition(":")[2]) - port for node in json.loads(group.files["MLX_HOSTFILE"])] == [
                    1,
                    2,
                    3,
                ]
                os.kill(client.pids[1], signal.SIGKILL)
                await next_group(client)

    run(test)


# --- stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["slow=0.01", "slow=0.01,deafranks", "slow=0.01,deaf"])
def test_a_stop_leaves_no_rank(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they listen or not."""
    monkeypatch.setattr("millpond.launch.group.FAREWELL", 0.3)

    async def test() -> None:
        client = client_for(local(script))
        await client.start()
        await client.settled()
        pids = client.pids
        async with streaming(client) as ended:
            await client.stop(patience=0.3)
            assert (await ended).kind is ErrorKind.UNAVAILABLE
        assert not any(alive(pid) for pid in pids)
        assert client.state is EngineState.STOPPED
        assert client.counts.restarts == 0

    run(test)


def test_an_orderly_stop_lets_the_followers_go(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        client = client_for(local())
        await client.start()
        await client.settled()
        assert client._group is not None
        ranks = client._group._followers
        assert ranks is not None
        await client.stop()
        assert [ending.status for ending in ranks.endings] == [0, 0]

    run(test)


def test_a_forced_exit_kills_every_rank() -> None:
    async def test() -> None:
        client = client_for(local("deaf,deafranks"))
        await client.start()
        await client.settled()
        pids = client.pids
        client.kill()
        await all_gone(pids)
        await client.stop()

    run(test)


@linux
def test_a_killed_front_end_leaves_no_rank(tmp_path: Path) -> None:
    """Also one that is stopped and cannot notice."""
    program = tmp_path / "front.py"
    program.write_text(
        "import asyncio, sys\n"
        f"sys.path = {sys.path!r}\n"
        "from group_support import client_for, local\n"
        "async def main():\n"
        "    client = client_for(local('plain'))\n"
        "    await client.start()\n"
        "    await client.settled()\n"
        "    print(*client.pids, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )

    async def test() -> None:
        front = await asyncio.create_subprocess_exec(
            sys.executable, str(program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert front.stdout is not None
        pids = [int(pid) for pid in (await front.stdout.readline()).split()]
        assert len(pids) == 3
        os.kill(pids[2], signal.SIGSTOP)
        front.kill()
        await front.wait()
        await all_gone(pids)

    run(test)


# --- secrets ----------------------------------------------------------------------------------------------------


@linux
def test_secrets_are_in_no_command_line_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_TP_SECRET", "given-to-the-front-end-only")
    monkeypatch.setenv("MILLPOND_API_KEY", "key-of-the-front-end-only")

    async def test() -> None:
        async with running(local()) as client:
            secret = group_of(client).secret
            assert not any(secret in line for line in command_lines())
            for pid in client.pids:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                assert secret.encode() not in environment
                assert b"front-end-only" not in environment

    run(test)


# --- millpond rank, the keeper on other machines ---------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What counts as a model folder; its name is a script."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def place(model: Path | str, port: int = 9) -> bytes:
    settings = GroupSettings(
        rank=1, world=2, backend="ring", host="127.0.0.1", port=port, secret="ab" * 32, model=str(model)
    )
    return msgspec.json.encode(settings) + b"\n"


async def keeper(*command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millpond.cli.main", "rank", "--command", *(command or SCRIPTED)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@linux
@pytest.mark.parametrize("stopped", [False, True])
def test_the_keeper_kills_its_child_when_its_input_ends(model: Path, stopped: bool) -> None:
    async def test() -> None:
        process = await keeper()
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(place(model))
        assert await process.stderr.readline() == b"rank 1 of 2 is here\n"
        [child] = children_of(process.pid)
        if stopped:
            os.kill(child, signal.SIGSTOP)
        process.stdin.close()
        assert await process.wait() == 1
        assert not alive(child)

    run(test)


@linux
def test_a_killed_keeper_takes_its_child_along(model: Path) -> None:
    async def test() -> None:
        process = await keeper()
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(place(model))
        await process.stderr.readline()
        [child] = children_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        process.kill()
        await process.wait()
        await all_gone([child])

    run(test)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (f"raise SystemExit({LOST_STATUS})", LOST_STATUS),
        ("raise SystemExit(0)", 0),
        ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL),
    ],
)
def test_the_keeper_ends_as_its_child(model: Path, tmp_path: Path, program: str, status: int) -> None:
    script = tmp_path / "child.py"
    script.write_text(program)

    async def test() -> None:
        process = await keeper(sys.executable, str(script))
        assert process.stdin is not None
        process.stdin.write(place(model))
        assert await process.wait() == status
        process.stdin.close()

    run(test)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (place("/no/such/model"), b"millpond rank: model '/no/such/model'"),
        (b"{}\n", b"standard input must be a pipe with the settings of a rank"),
        (b"", b"standard input must be a pipe with the settings of a rank"),
    ],
)
def test_the_keeper_says_what_it_cannot_do(line: bytes, says: bytes) -> None:
    async def test() -> None:
        process = await keeper()
        _, said = await process.communicate(line) if not line else (b"", await told(process, line))
        assert await process.wait() == 1
        assert says in said
        assert b"Traceback" not in said

    async def told(process: asyncio.subprocess.Process, line: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(line)
        return await process.stderr.read()

    run(test)


# --- the rule ---------------------------------------------------------------------------------------------------


def test_silence_and_progress_have_limits_of_their_own() -> None:
    """tp_silence bounds the silence of a group, stall_timeout its pauses."""
    now = 100.0
    watchdog = Watchdog(60.0, lambda: now, silence=5.0)
    watchdog.beat(Beat(step=1, running=1, waiting=0, kv_bytes=0), 1)
    now += 4.9
    assert not watchdog.verdict()
    now += 0.2
    assert "not been heard of for 5 s" in watchdog.verdict()
    for _ in range(18):
        now += 3.0
        watchdog.beat(Beat(step=1, running=1, waiting=0, kv_bytes=0), 1)
    assert not watchdog.verdict()
    now += 4.0
    watchdog.beat(Beat(step=1, running=1, waiting=0, kv_bytes=0), 1)
    assert "no step for" in watchdog.verdict()
    patient = Watchdog(0.0, lambda: now, silence=5.0)
    now += 5.1
    assert "not been heard of" in patient.verdict()


def test_layouts_say_who_starts_whom() -> None:
    layout = layout_for(tp="4")
    assert (layout.followers_here, layout.followers_elsewhere) == ((1, 2, 3), ())
