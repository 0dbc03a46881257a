"""The engine process as its front end sees it: a real process, a real socket, a tiny model."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import BinaryIO

import mlx.core as mx
import pytest
from endless_model import endless_model
from engine_driver import request
from tiny_models import save

from millpond import wire
from millpond.engine.boot import boot
from millpond.engine.link import FrontEndLink
from millpond.lifeline import LOST_STATUS
from millpond.types import Finish

SILENCE = 60.0
"""Seconds after which a peer that says nothing has hung; generous, because machines are busy."""


class Peer:
    """The front end's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        self._connection = connection
        self._stream: BinaryIO = connection.makefile("rb")
        self.seen: list[wire.FromEngine] = []

    def send(self, message: wire.ToEngine) -> None:
        self._connection.sendall(wire.encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._connection.sendall(data)

    def messages(self) -> Iterator[wire.FromEngine]:
        while header := self._stream.read(wire.HEADER.size):
            message = wire.decode_from_engine(self._stream.read(wire.frame_length(header)))
            self.seen.append(message)
            yield message

    def until(self, kind: type | UnionType) -> wire.FromEngine:
        return next(message for message in self.messages() if isinstance(message, kind))

    def close(self) -> None:
        self._stream.close()
        self._connection.close()


@contextmanager
def engine() -> Iterator[tuple[Peer, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "millpond.engine", "--fd", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.DEVNULL)
    theirs.close()
    peer = Peer(ours)
    try:
        yield peer, process
    finally:
        peer.close()
        process.kill()
        process.wait()


def start(folder: Path, **options: object) -> wire.Start:
    fields: dict[str, object] = {"max_batch": 4, "max_itl_ms": 400.0, **options}
    return wire.Start(model_path=str(folder), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def test_ready_comes_after_load_and_probe_and_then_requests_run(folder: Path) -> None:
    with engine() as (peer, process):
        peer.send(start(folder))
        ready = peer.until(wire.Ready)
        assert isinstance(ready, wire.Ready)
        stages = [message.stage for message in peer.seen if isinstance(message, wire.Loading)]
        assert stages[0] == "weights"
        assert stages[-1] == "probe"  # the probe runs forwards: nothing is ready before one has run
        info = ready.info
        assert (info.lane, info.lane_reason, info.cache_kinds, info.context_length) == ("slots", "", ["kv"], 512)
        assert info.kv_bytes_per_token == 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
        assert len(info.fingerprint) == 64
        peer.send(wire.Submit(request("x", [1, 2, 3], 5)))
        tokens: list[int] = []
        for message in peer.messages():
            if isinstance(message, wire.Deltas):
                tokens += message.items[0].tokens
                if message.items[0].finish:
                    assert message.items[0].finish is Finish.LENGTH
                    break
        assert len(tokens) == 5
        peer.send(wire.Stop())
        assert process.wait(SILENCE) == 0


def test_beats_come_without_being_asked_and_tell_the_load(folder: Path) -> None:
    with engine() as (peer, _):
        peer.send(start(folder))
        peer.until(wire.Ready)
        beat = peer.until(wire.Beat)
        assert isinstance(beat, wire.Beat)
        assert (beat.running, beat.waiting, beat.kv_bytes) == (0, 0, 0)


@pytest.mark.slow
def test_a_rest_gives_the_rows_memory_back(folder: Path) -> None:
    """Without another message, and after every request anew."""
    with engine() as (peer, _):
        peer.send(start(folder))
        peer.until(wire.Ready)
        for name in ("x", "y"):
            peer.send(wire.Submit(request(name, [1, 2, 3], 200)))
            loads = (message.kv_bytes for message in peer.messages() if isinstance(message, wire.Beat))
            assert next(held for held in loads if held) > 0
            assert next(held for held in loads if not held) == 0


@pytest.mark.often("abc")
@pytest.mark.parametrize("rest", [b"", b"\x00\x00\x00\x09abc"])
def test_it_ends_when_the_front_end_is_gone(folder: Path, rest: bytes) -> None:
    with engine() as (peer, process):
        peer.send(start(folder))
        peer.until(wire.Ready)
        peer.send(wire.Submit(request("x", [1, 2, 3], 400)))
        peer.until(wire.Deltas)
        peer.send_bytes(rest)
        peer.close()
        assert process.wait(SILENCE) == LOST_STATUS


def test_it_ends_when_the_front_end_is_gone_while_it_loads(tmp_path: Path) -> None:
    """(A6)"""
    with engine() as (peer, process), endless_model(tmp_path / "model", "config.json") as being_read:
        peer.send(start(tmp_path / "model"))
        being_read(process)
        peer.close()
        assert process.wait(SILENCE) == LOST_STATUS


@pytest.mark.often("xc1")
@pytest.mark.parametrize("data", [b"\x00\x00\x00\x02\xc1\xc1", b"\xff\xff\xff\xff"])
def test_an_undecodable_message_ends_it(folder: Path, data: bytes) -> None:
    with engine() as (peer, process):
        peer.send(start(folder))
        peer.until(wire.Ready)
        peer.send_bytes(data)
        assert process.wait(SILENCE) == 0


def test_what_cannot_be_loaded_is_said_before_the_exit(tmp_path: Path) -> None:
    with engine() as (peer, process):
        peer.send(start(tmp_path))
        fatal = peer.until(wire.Fatal)
        assert isinstance(fatal, wire.Fatal)
        assert "cannot load the model" in fatal.message
        assert process.wait(SILENCE) == 1


def test_another_version_is_refused(folder: Path) -> None:
    with engine() as (peer, process):
        peer.send(start(folder, version=wire.VERSION + 1))
        assert isinstance(peer.until(wire.Fatal), wire.Fatal)
        assert process.wait(SILENCE) == 1


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with engine() as (peer, _):
        peer.send(start(folder, context_length=100_000))
        fatal = peer.until(wire.Fatal)
        assert isinstance(fatal, wire.Fatal)
        assert "context_length: 100000" in fatal.message


@pytest.mark.often("llama")
@pytest.mark.parametrize("kind", ["llama", "lfm2", "mamba"])
def test_little_memory_means_a_shorter_context_not_refusals(kind: str, tmp_path: Path) -> None:
    """A request that fills the context that the engine names must be accepted, whatever the cache kind (D7)."""
    megabyte = 2**20 if kind == "llama" else 2**19
    with engine() as (peer, _):
        peer.send(start(save(kind, tmp_path / "tiny"), kv_memory_bytes=megabyte))
        ready = peer.until(wire.Ready)
        assert isinstance(ready, wire.Ready)
        context = ready.info.context_length
        assert 256 <= context <= 512
        assert (context < 512) == (kind != "mamba")
        assert (ready.info.kv_bytes_per_token == 0) == (kind == "mamba")
        peer.send(wire.Submit(request("x", [1, 2, 3], context - 3)))
        assert isinstance(peer.until(wire.Deltas | wire.Failed), wire.Deltas)


def test_no_memory_for_any_request_is_said_at_start(folder: Path) -> None:
    with engine() as (peer, _):
        peer.send(start(folder, kv_memory_bytes=1000))
        fatal = peer.until(wire.Fatal)
        assert isinstance(fatal, wire.Fatal)
        assert "kv_memory_mb" in fatal.message


def test_memory_that_cannot_be_wired_is_refused_at_start(folder: Path) -> None:
    with engine() as (peer, _):
        peer.send(start(folder, wired_bytes=1 << 30))
        fatal = peer.until(wire.Fatal)
        assert isinstance(fatal, wire.Fatal)
        assert fatal.message.startswith("wired_memory_mb: 1024 is more than can be wired")


def test_one_thread_alone_touches_mlx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real link's threads beside it, every evaluation happens on the engine's thread (A5, D9)."""
    threads: set[int] = set()
    for name in ("eval", "async_eval"):
        original = getattr(mx, name)

        def recording(*arrays: object, _original: object = original) -> None:
            threads.add(threading.get_ident())
            _original(*arrays)  # type: ignore[operator]

        monkeypatch.setattr(mx, name, recording)
    ours, theirs = socket.socketpair()
    link = FrontEndLink(theirs)
    link.start()
    owner: list[int] = []

    def run() -> None:
        owner.append(threading.get_ident())
        boot(start(folder), "", link).run()

    engine_thread = threading.Thread(target=run, daemon=True)  # one that hangs must not hold up the others' tests
    engine_thread.start()
    peer = Peer(ours)
    peer.until(wire.Ready)
    peer.send(wire.Submit(request("x", [1, 2, 3], 5)))
    peer.send(wire.Submit(request("y", [4] * 90, 50)))
    peer.send(wire.Cancel("y"))
    peer.send(wire.Stop())
    engine_thread.join(SILENCE)
    assert not engine_thread.is_alive()
    link.close()
    peer.close()
    theirs.close()
    assert threads == set(owner)
