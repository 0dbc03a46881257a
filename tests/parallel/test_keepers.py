"""Ranks that mlx.launch starts, other than the first: no HTTP, a follower, and another one whenever it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import pytest
from group_support import alive, all_gone
from waiting import run

from millpond.types import GroupSettings

SERVE = """\
import sys
from functools import partial
from millpond.cli import group, main, serve
serve.keep = partial(group.keep, command=[sys.executable, {follower!r}])
sys.exit(main.main(sys.argv[1:]))
"""
FOLLOWER = """\
import os, sys, time
print("told", os.getpid(), sys.stdin.readline(), file=sys.stderr, flush=True)
while True:
    byte = os.read(0, 1)
    if not byte:
        os._exit(1)
"""


class Rank:
    """``millpond serve`` as mlx.launch would run it for rank 1 of 2, with a follower of the test's."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self, text: str) -> str:
        """The next line with ``text`` in it."""
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode():
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError("".join(self.lines))

    async def follower(self) -> tuple[int, GroupSettings]:
        """The next follower's process and what it was told."""
        _, pid, told = (await self.line("told ")).split(" ", 2)
        return int(pid), msgspec.json.decode(told, type=GroupSettings)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


async def rank(tmp_path: Path, model: Path, *flags: str, follower: str = FOLLOWER, **environ: str) -> Rank:
    (tmp_path / "follower.py").write_text(follower)
    (tmp_path / "serve.py").write_text(SERVE.format(follower=str(tmp_path / "follower.py")))
    (tmp_path / "ring.json").write_text('[["127.0.0.1:32323"], ["127.0.0.1:32324"]]')
    launched = {"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "ring.json")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(tmp_path / "serve.py"), "serve", str(model), *flags),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **launched, "MILLPOND_TP_SECRET": "a secret of the group", **environ},
    )
    return Rank(process)


def test_it_binds_no_port_and_starts_followers_again(tmp_path: Path, model: Path) -> None:
    """The address that its flags name is taken, and it does not mind."""

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            keeper = await rank(tmp_path, model, "--port", str(taken.getsockname()[1]), "--tp-port", "4321")
            first, settings = await keeper.follower()
            assert (settings.rank, settings.world, settings.host, settings.port) == (1, 2, "127.0.0.1", 4321)
            assert settings.model == str(model)
            assert "a secret of the group" not in Path(f"/proc/{keeper.process.pid}/cmdline").read_text()
            assert b"a secret of the group" not in Path(f"/proc/{first}/environ").read_bytes()
            os.kill(first, signal.SIGKILL)
            assert 'reason="it was ended by SIGKILL"' in await keeper.line("rank lost, starting another")
            second, again = await keeper.follower()
            assert again == settings
            keeper.process.send_signal(signal.SIGTERM)
            os.kill(second, signal.SIGTERM)  # as if rank 0 had said goodbye
            assert await keeper.process.wait() == 0
            assert not alive(second)

    run(test)


@pytest.mark.parametrize("how", ["second signal", "input", "kill"])
def test_its_follower_never_outlives_it(tmp_path: Path, model: Path, how: str) -> None:
    async def test() -> None:
        keeper = await rank(tmp_path, model, "--drain-seconds", "0")
        pid, _ = await keeper.follower()
        if how == "kill":
            keeper.process.kill()
        elif how == "input":
            assert keeper.process.stdin is not None
            keeper.process.stdin.close()
            os.kill(pid, signal.SIGTERM)
            assert await keeper.process.wait() == 0
        else:
            keeper.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert alive(pid)  # rank 0 may still drain
            keeper.process.send_signal(signal.SIGTERM)
            assert await keeper.process.wait() == 128 + signal.SIGTERM
        await keeper.process.wait()
        await all_gone([pid])

    run(test)


def test_a_follower_that_ends_well_ends_it(tmp_path: Path, model: Path) -> None:
    async def test() -> None:
        keeper = await rank(tmp_path, model, follower="raise SystemExit(0)")
        assert await keeper.process.wait() == 0

    run(test)


def test_under_mpirun_there_is_no_second_follower(tmp_path: Path, model: Path) -> None:
    """mpirun ends all ranks with the first that is lost. Under mlx.launch the same follower is started again."""

    async def test() -> None:
        ranks = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        keeper = await rank(tmp_path, model, follower="raise SystemExit(3)", **ranks)
        await keeper.line("rank lost, starting another")
        keeper.process.kill()
        script = tmp_path / "serve.py"
        script.write_text("import os\ndel os.environ['MLX_RANK']\n" + script.read_text())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), "serve", str(model)),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "MLX_RANK": "1", "MILLPOND_TP_SECRET": "a secret of the group", **ranks},
        )
        assert "exited with status 3" in await Rank(process).line("rank lost")
        assert await process.wait() == 1
        await keeper.process.wait()

    run(test)


def test_a_bad_setting_is_refused_by_every_rank(tmp_path: Path, model: Path) -> None:
    async def test() -> None:
        keeper = await rank(tmp_path, model, "--tp", "3")
        assert "millpond serve: tp: must be 2, as many as mlx.launch started" in await keeper.line("millpond serve")
        assert await keeper.process.wait() == 1

    run(test)


def test_the_real_mlx_launch_is_understood(tmp_path: Path) -> None:
    """Both ranks of a ring on this machine, by what it really sets."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not installed")
    program = tmp_path / "tell.py"
    program.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from millpond.launch.launched import find_launch\n"
        "launch = find_launch(os.environ)\n"
        "found = [launch.rank, launch.world, launch.backend, launch.host]\n"
        "Path(sys.argv[1], str(launch.rank)).write_text(json.dumps(found))\n"
    )

    async def test() -> None:
        process = await asyncio.create_subprocess_exec(
            *(str(launcher), "-n", "2", "--backend", "ring", "--", sys.executable, str(program), str(tmp_path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        await process.wait()
        for number in (0, 1):
            assert json.loads((tmp_path / str(number)).read_text()) == [number, 2, "ring", "127.0.0.1"]

    run(test)
