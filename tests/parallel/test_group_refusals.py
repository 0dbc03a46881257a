"""Who may not be part of a group, and what its owner is told: real processes, real sockets."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_driver import request
from group_driver import PATIENCE, Group, text
from tiny_models import save

from millpond.parallel.backend import machine, versions
from millpond.parallel.channel import Channel
from millpond.parallel.messages import Broken, Content, Go, Hello, Setup, Vote, decode_from_leader, encode

OLDER = (
    sys.executable,
    "-c",
    "import millpond; millpond.__version__ = '0.0.1'\n"
    "import runpy; runpy.run_module('millpond.parallel', run_name='__main__')",
)
"""A rank with another version of Millpond."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


def test_a_rank_with_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save("llama", tmp_path / "other", seed=1)
    with Group(folder, 2, tmp_path, models={1: other}) as group:
        reason = group.failure()
        assert reason.startswith("tp: rank 1 has other weights or another config than rank 0 (")
        assert reason.endswith("); all ranks need the same model")
        assert group.processes[1].wait(PATIENCE) != 0
        group.logged(1, "rank 1 has other weights")


WRONG: dict[str, tuple[Callable[[Group], object], str]] = {
    "version": (lambda group: group.follow(1, OLDER), "tp: rank 1 has millpond 0.0.1, rank 0 has "),
    "world": (lambda group: group.follow(1, world=3), "tp: a rank 1 of 3 came to a group of 2"),
    "flags": (
        lambda group: group.follow(1, flags={"max_batch": "4"}),
        "max_batch: rank 1 was started with 4, rank 0 with None; all need the same",
    ),
}


@pytest.mark.often("version")
@pytest.mark.parametrize("what", WRONG)
def test_a_rank_that_is_not_what_it_should_be_is_refused(what: str, folder: Path, tmp_path: Path) -> None:
    """It hears why, too."""
    follow, expected = WRONG[what]
    with Group(folder, 2, tmp_path, followers=False) as group:
        follow(group)
        assert group.failure().startswith(expected)
        assert group.processes[1].wait(PATIENCE) != 0
        group.logged(1, expected)


def test_two_processes_cannot_be_the_same_rank(folder: Path, tmp_path: Path) -> None:
    with Group(folder, 3, tmp_path, followers=False) as group:
        for _ in range(2):
            group.follow(1)
        assert group.failure() == "tp: two processes say that they are rank 1"
        assert all(process.wait(PATIENCE) != 0 for process in group.processes)


def test_strangers_are_refused_and_the_group_forms_without_them(folder: Path, tmp_path: Path) -> None:
    """Another secret, bytes that are no greeting, one who says nothing and one who goes at once."""
    with Group(folder, 2, tmp_path, followers=False) as group:
        silent = stranger(group)
        stranger(group).close()
        with stranger(group) as loud:
            with contextlib.suppress(OSError):
                loud.sendall(b"GET / HTTP/1.1\r\nHost: millpond\r\n\r\n" + bytes(range(256)) * 64)
            group.logged(0, "its greeting does not begin as ours")
        group.follow(1, secret="00" * 32)
        group.logged(0, "its secret is another")
        assert group.log(0).count("a connection to the group was refused") >= 2
        group.follow(1)
        assert group.ready().ranks == 2
        assert text(group.answers([request("x", [1, 2, 3], 3)])["x"])[0]
        with silent, pytest.raises(OSError, match="refused"):
            stranger(group)  # and now nobody is let in any more


def stranger(group: Group) -> socket.socket:
    return socket.create_connection(("127.0.0.1", group.port), timeout=PATIENCE)


@pytest.mark.often("no message")
@pytest.mark.parametrize(
    ("nonsense", "expected"),
    [
        (b"\x82\xa4type\xa6Broken\xa6reason\xa2\xff\xfe", "undecodable message to rank 0"),
        (encode(Vote(True)), "answers with Vote instead of Content"),
    ],
    ids=["no message", "no answer"],
)
def test_a_rank_that_talks_nonsense_ends_the_start(
    nonsense: bytes, expected: str, folder: Path, tmp_path: Path
) -> None:
    with Group(folder, 2, tmp_path, followers=False) as group:
        channel = Channel.connect(stranger(group), bytes.fromhex(group.settings[1].secret), PATIENCE)
        channel.send(encode(Hello(1, 2, "ring", machine(), versions())))
        assert isinstance(decode_from_leader(channel.receive() or b""), Setup)
        channel.send(nonsense)
        assert expected in group.failure()
        channel.close()


def test_what_a_rank_says_of_its_model_is_compared(folder: Path, tmp_path: Path) -> None:
    """No rank opens a connection for tensors before all have the same model."""
    with Group(folder, 2, tmp_path, followers=False) as group:
        channel = Channel.connect(stranger(group), bytes.fromhex(group.settings[1].secret), PATIENCE)
        channel.send(encode(Hello(1, 2, "ring", machine(), versions())))
        channel.send(encode(Content("0" * 64)))
        assert "tp: rank 1 has other weights or another config than rank 0 (000000000000 and " in group.failure()
        heard = [decode_from_leader(body) for body in iter(channel.receive, None)]
        assert not any(isinstance(message, Go) for message in heard)
        assert isinstance(heard[-1], Broken)
        channel.close()
