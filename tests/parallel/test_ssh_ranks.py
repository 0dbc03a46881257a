"""Ranks on another machine: a private sshd on loopback, real ssh, ``millpond rank`` behind it, scripted ranks."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from group_support import (
    SCRIPTED,
    alive,
    all_gone,
    children_of,
    command_lines,
    group_of,
    layout_for,
    request,
    running,
)
from waiting import eventually, free_port, run

from millpond.cli.group import group_plan, layout_of
from millpond.client import EngineClient, EngineError, EngineState, EngineUnavailable
from millpond.config import read_config
from millpond.launch.followers import GroupPlan
from millpond.types import ErrorKind

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.skipif(SSHD is None, reason="there is no sshd"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
SILENT = 903
RUNTIME = Path("/run/sshd")


@dataclass
class Machine:
    """Two names that lead here over ssh, and the options for it."""

    config: Path
    log: Path
    pid: int
    """sshd's."""

    @property
    def ssh(self) -> str:
        return f"ssh -F {self.config}"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    port = free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "ssh_config").write_text(
        f"Host rank-b rank-c\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user\n"
        f"IdentitiesOnly yes\nUserKnownHostsFile {folder}/known\nStrictHostKeyChecking accept-new\n"
        f"Host rank-locked\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile none\n"
        f"IdentityAgent none\nUserKnownHostsFile {folder}/known\nStrictHostKeyChecking accept-new\n"
        f"Host rank-away\nHostName 127.0.0.1\nPort {free_port()}\n"
    )
    log = folder / "sshd.log"
    assert SSHD is not None
    with runtime_folder():
        yield from served(folder, log)


@contextlib.contextmanager
def runtime_folder() -> Iterator[None]:
    """sshd insists on this folder when root runs it; where its service is not installed, nobody has made it."""
    missing = os.geteuid() == 0 and not RUNTIME.exists()
    if missing:
        RUNTIME.mkdir(mode=0o755)
    try:
        yield
    finally:
        if missing:
            RUNTIME.rmdir()


def served(folder: Path, log: Path) -> Iterator[Machine]:
    assert SSHD is not None
    server = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
    try:
        found = Machine(folder / "ssh_config", log, server.pid)
        if not reachable(found, server):
            pytest.skip(f"no login over a private sshd here: {log.read_text() if log.exists() else ''}")
        yield found
    finally:
        server.terminate()
        server.wait(10)


def reachable(machine: Machine, server: subprocess.Popen[bytes]) -> bool:
    command = ["ssh", "-F", str(machine.config), "-T", "-oBatchMode=yes", "rank-b", "true"]
    for _ in range(50):
        if server.poll() is not None:
            return False
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return True
        time.sleep(0.1)
    return False


def model_folder(parent: Path, script: str) -> Path:
    """What counts as a model folder; its name is a script."""
    folder = parent / script
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def over_ssh(machine: Machine, tmp_path: Path, script: str, *names: str, python: str = sys.executable) -> GroupPlan:
    """Rank 0 here, the others where ssh leads to; as ``millpond serve`` would plan it, with scripted ranks."""
    hosts = [{"ssh": name, "ips": ["127.0.0.1"]} for name in ("localhost", *names)]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps({"backend": "ring", "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": hosts}))
    flags = {"hostfile": str(hostfile), "tp_port": str(free_port()), "tp_ssh": machine.ssh, "tp_python": python}
    config = read_config({**flags, "log_level": "info"}, {})
    layout = layout_of(config, {})
    assert layout is not None
    folder = model_folder(tmp_path, script)
    plan = group_plan(layout, config, str(folder), folder)
    return GroupPlan(
        layout=plan.layout,
        given=plan.given,
        folder=plan.folder,
        command=SCRIPTED,
        python=plan.python,
        ssh=plan.ssh,
        environment=plan.environment,
        options=(*plan.options, "--command", *SCRIPTED),
    )


def behind(machine: Machine) -> list[int]:
    """Keepers and followers that this sshd has started and that still run, each keeper before its follower."""
    found, left = [], [machine.pid]
    while left:
        pid = left.pop()
        with contextlib.suppress(OSError):
            left += children_of(pid)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"rank" in command or SCRIPTED[1].encode() in command[:2]:
                found.append(pid)
    return found


async def ended_stream(client: EngineClient, victim: int) -> EngineError:
    """Begin a stream, kill, and return what the stream ends with."""
    stream = client.submit(request(os.urandom(4).hex(), [1, SILENT], 100))
    await anext(stream)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        await anext(stream)
    return caught.value


def followers_only(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if alive(pid) and b"scripted_rank" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]
    ]


def test_ranks_over_ssh_work_and_are_told_everything(machine: Machine, tmp_path: Path) -> None:
    """hostfile, tp_port, tp_ssh, tp_python: rank 0 here, one each behind two names; nothing is left after a stop."""

    async def test() -> None:
        async with running(over_ssh(machine, tmp_path, "plain", "rank-b", "rank-c")) as client:
            group = group_of(client)
            assert group.world == 3
            assert group.environment == {"MLX_METAL_FAST_SYNCH": "1", "MLX_RANK": "0"}
            nodes = json.loads(group.files["MLX_HOSTFILE"])
            assert nodes == [[f"127.0.0.1:{group.port + 1 + n}"] for n in range(3)]
            assert not any(group.secret in line for line in command_lines())
            pids = [*client.pids, *behind(machine)]
            assert len(followers_only(pids)) == 3
        await all_gone(pids)

    run(test)


@pytest.mark.often("ssh")
@pytest.mark.parametrize("victim", ["follower", "keeper", "ssh"])
def test_a_lost_remote_rank_ends_the_group_and_comes_back(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: str
) -> None:
    async def test() -> None:
        async with running(over_ssh(machine, tmp_path, "slow=0.01,blind", "rank-b")) as client:
            old = group_of(client)
            keeper, follower = behind(machine)
            pids = [*client.pids, keeper, follower]
            error = await ended_stream(client, {"follower": follower, "keeper": keeper, "ssh": pids[1]}[victim])
            assert error.kind is ErrorKind.DIED
            await eventually(lambda: client.state is not EngineState.READY)
            await client.settled()
            await all_gone(pids)
            new = group_of(client)
            assert new.secret != old.secret
            assert new.port == old.port
        found = [
            str(record.fields["reason"])
            for record in caplog.records
            if hasattr(record, "fields") and "reason" in record.fields
        ]
        assert found[0].startswith(
            {
                "follower": "rank 1 on rank-b was ended by SIGKILL",
                "keeper": "rank 1 on rank-b",
                "ssh": "rank 1 on rank-b was",
            }[victim]
        )

    run(test)


def test_stopped_remote_ranks_die_with_the_front_end(machine: Machine, tmp_path: Path) -> None:
    """A forced exit, and a follower that could not notice by itself."""

    async def test() -> None:
        async with running(over_ssh(machine, tmp_path, "deaf,deafranks", "rank-b")) as client:
            pids = [*client.pids, *behind(machine)]
            os.kill(pids[-1], signal.SIGSTOP)
            client.kill()
            await all_gone(pids)
            await client.stop()

    run(test)


@pytest.mark.often("rank-away", "rank-locked")
@pytest.mark.parametrize(
    ("name", "python", "says"),
    [
        ("rank-away", sys.executable, "rank 1 on rank-away: ssh has lost it: .*refused"),
        ("rank-locked", sys.executable, "rank 1 on rank-locked: ssh has lost it: .*Permission denied"),
        ("rank-b", "/no/such/python", "rank 1 on rank-b exited with status 12[67]: .*/no/such/python"),
    ],
)
def test_what_cannot_be_started_is_said(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, python: str, says: str
) -> None:
    monkeypatch.setattr("millpond.client.engine.FIRST_DELAY", 0.01)

    async def test() -> None:
        with pytest.raises(EngineUnavailable) as failed:
            async with running(over_ssh(machine, tmp_path, "plain", name, python=python)):
                pass
        assert re.search(says, failed.value.whole)

    run(test)


@pytest.mark.slow
def test_a_model_that_is_not_there_is_said(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine finds the model itself."""
    monkeypatch.setattr("millpond.client.engine.FIRST_DELAY", 0.01)

    async def test() -> None:
        plan = over_ssh(machine, tmp_path, "plain", "rank-b")
        elsewhere = GroupPlan(**{**plan.__dict__, "given": "/no/such/model"})
        with pytest.raises(EngineUnavailable) as failed:
            async with running(elsewhere):
                pass
        assert "rank 1 on rank-b exited with status 1: millpond rank: model '/no/such/" in failed.value.whole

    run(test)


def test_names_of_this_machine_need_no_ssh(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "mac1", "ips": ["127.0.0.1"]}] * 2))
    layout = layout_for(hostfile=str(hosts))
    assert (layout.followers_here, layout.followers_elsewhere, layout.port) == ((1,), (), 0)
