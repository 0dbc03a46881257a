"""Nobody takes more than there is: places, connections, time to send a request. Real sockets throughout."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from plain_http import port_of, until_closed
from raw_client import connect, receive

if TYPE_CHECKING:
    from conftest import Server, StartServer

SILENT = [64, 903]
"""A prompt that is answered with one token, and then with silence for ever."""
ASK: dict[str, object] = {"model": "test-model", "prompt": "ab", "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


def alive(connection: socket.socket) -> bool:
    """Whether a kept connection still answers."""
    try:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b'{"status":"ok"}'):
            if not (data := connection.recv(4096)):
                return False
            received += data
    except ConnectionError:
        return False
    return True


# --- places -------------------------------------------------------------------------------------------------------


async def begin(client: openai.AsyncOpenAI, user: str = "") -> openai.AsyncStream[openai.types.Completion]:
    """A stream that has given its first token and stays open."""
    stream = await client.completions.create(model="test-model", prompt=SILENT, stream=True, user=user)
    await anext(aiter(stream))
    return stream


async def refused(client: openai.AsyncOpenAI, code: str, **options: object) -> None:
    """Another request, streaming or not, gets its 429."""
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(**{**ASK, "stream": stream, **options})  # type: ignore[call-overload]
        assert limited.value.code == code
        assert limited.value.type == "rate_limit_error"
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


async def until_held(server: Server, count: int) -> None:
    await asyncio.to_thread(server.wait_until, lambda health: health["requests"]["held"] == count)


def test_the_65th_stream_of_64_waits_outside(start_server: StartServer) -> None:
    """(B9, J1) A place is held until the last byte: all 64 stream, the 65th gets a 429; one ends, the next is in."""

    async def test(server: Server) -> None:
        async with server.async_client() as client:
            streams = list(await asyncio.gather(*(begin(client) for _ in range(64))))
            await until_held(server, 64)
            await refused(client, "queue_full")
            assert httpx.get(f"{server.url}/health").json()["status"] == "overloaded"
            for _ in range(3):
                await streams.pop().close()
                await until_held(server, 63)
                streams.append(await begin(client))
                await refused(client, "queue_full")
            await asyncio.gather(*(stream.close() for stream in streams))
            await until_held(server, 0)
            assert (await client.completions.create(**ASK)).choices[0].text == "abab"  # type: ignore[call-overload]

    with start_server("rows=32", "max_waiting", "32") as server:
        asyncio.run(test(server))


def test_a_place_per_answer(start_server: StartServer) -> None:
    """(B9) n and several prompts take as many places; more than there ever are is a 400, not a 429."""

    async def test(server: Server) -> None:
        async with server.async_client() as client:
            stream = await begin(client)
            await refused(client, "queue_full", n=4)
            assert len((await client.completions.create(**ASK, n=3)).choices) == 3  # type: ignore[call-overload]
            with pytest.raises(openai.BadRequestError, match="at most 4"):
                await client.completions.create(**ASK, n=5)  # type: ignore[call-overload]
            await stream.close()
            await until_held(server, 0)
            assert len((await client.completions.create(**ASK, n=4)).choices) == 4  # type: ignore[call-overload]

    with start_server("rows=2", "max_waiting", "2") as server:
        asyncio.run(test(server))


def test_places_per_client_without_keys(start_server: StartServer) -> None:
    """(B9, J1) A client is the user field, else the address."""

    async def test(server: Server) -> None:
        async with server.async_client() as client:
            streams = [await begin(client, "ann"), await begin(client, "ann")]
            await refused(client, "client_limit", user="ann")
            streams += [await begin(client, "bea"), await begin(client), await begin(client)]
            await refused(client, "client_limit")
            await streams.pop(0).close()
            await until_held(server, 4)
            streams.append(await begin(client, "ann"))
            await refused(client, "client_limit", user="ann")
            with pytest.raises(openai.BadRequestError, match="at most 2"):
                await client.completions.create(**ASK, n=3, user="cid")  # type: ignore[call-overload]
            streams.append(await begin(client, "dan"))
            await refused(client, "client_limit", user="dan", n=2)
            await refused(client, "client_limit", user="dan", prompt=["a", "b"])
            for stream in streams:
                await stream.close()

    with start_server("rows=8", "max_per_client", "2") as server:
        asyncio.run(test(server))


def test_places_per_key(start_server: StartServer, tmp_path: Path) -> None:
    """(B8, B9) With keys the key's owner is the client, whatever the user field claims; two keys may share an owner."""
    keys = {name: f"{name}-key-0123456789" for name in ("ann", "ann2", "bea")}
    file = tmp_path / "keys"
    file.write_text("".join(f"{name.rstrip('2')} {key}\n" for name, key in keys.items()))

    async def test(server: Server) -> None:
        async with ExitStackOf(server, keys) as clients:
            stream = await begin(clients["ann"])
            await refused(clients["ann"], "client_limit")
            await refused(clients["ann"], "client_limit", user="bea")
            await refused(clients["ann2"], "client_limit")
            other = await begin(clients["bea"], user="ann")
            await stream.close()
            await until_held(server, 1)
            await (await begin(clients["ann2"])).close()
            await other.close()

    with start_server("rows=8", "max_per_client", "1", "api_key_file", str(file)) as server:
        asyncio.run(test(server))


class ExitStackOf:
    """One official client per key."""

    def __init__(self, server: Server, keys: dict[str, str]) -> None:
        self._clients = {name: server.async_client().with_options(api_key=key) for name, key in keys.items()}

    async def __aenter__(self) -> dict[str, openai.AsyncOpenAI]:
        return self._clients

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.close()


# --- connections --------------------------------------------------------------------------------------------------


def test_one_connection_too_many_is_cut_and_the_others_live(start_server: StartServer) -> None:
    """(J1)"""
    with start_server("plain", "max_connections", "4") as server, ExitStack() as stack:
        port = port_of(server)
        kept = [stack.enter_context(connect(port)) for _ in range(4)]
        assert all(alive(connection) for connection in kept)
        for _ in range(3):
            with connect(port) as extra:
                assert not alive(extra)
        assert all(alive(connection) for connection in kept)
        assert "most=4" in server.wait_for_line("too many connections")
        kept.pop().close()
        fresh = next(connection for connection in iter(lambda: connect(port), None) if alive(connection))
        fresh.close()


def test_open_files_are_asked_for() -> None:
    """As many as the connections need, and more; what the system refuses is said, and keeps nobody from starting."""
    program = (
        "import resource, sys\n"
        "from millpond.cli.serve import allow_files\n"
        "from millpond.observe.log import configure\n"
        "configure('info')\n"
        "hard = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "allow_files(200)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    for hard, granted in ((1000, 200), (100, 100)):
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
            pytest.skip("few open files are allowed here")
        done = subprocess.run([sys.executable, "-c", program, str(hard)], capture_output=True, text=True, check=True)
        assert int(done.stdout) == granted
        assert ("few open files" in done.stderr) == (granted < 200)


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(start_server: StartServer) -> Iterator[Server]:
    """A server that waits for half a second for a request, and takes bodies of 2000 bytes; 16000 are read."""
    flags = ["body_timeout", "0.5", "max_body", "2000"]
    with start_server("slow=0.1", *flags) as server:
        yield server
        assert not [line for line in server.lines if "Traceback" in line or "unexpected" in line]


@pytest.mark.parametrize("start", [b"", b"G", HEAD, HEAD + b"x: "])
def test_half_a_head_is_cut(hasty: Server, start: bytes) -> None:
    """(J1) Nothing is said to a client that says nothing; it is the one that closes last."""
    assert until_closed(hasty, start) == []


def test_a_head_that_drips_is_cut(hasty: Server) -> None:
    """Each byte is no new chance."""
    with connect(port_of(hasty)) as connection:
        connection.settimeout(0.05)
        connection.sendall(HEAD)
        while True:
            try:
                connection.sendall(b"x")
                assert connection.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                pass
            return


def test_a_second_request_on_a_connection_has_as_long(hasty: Server) -> None:
    with connect(port_of(hasty)) as connection:
        assert alive(connection)
        assert alive(connection)
        connection.sendall(HEAD)
        assert receive(connection) == b""


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"content-length: 50\r\n\r\n",
        HEAD + b'content-length: 50\r\n\r\n{"prompt": ',
        HEAD + b"transfer-encoding: chunked\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n",
        HEAD + b"content-length: 15999\r\n\r\n" + b"x" * 10_000,
    ],
)
def test_a_slow_body_is_a_408(hasty: Server, sent: bytes) -> None:
    """(B4, J1) A length that is forged to be larger, too."""
    [answer] = until_closed(hasty, sent)
    assert (answer.status, answer.error_code()) == (408, "body_timeout")
    assert answer.headers["connection"] == "close"


def test_a_body_that_drips_is_a_408(hasty: Server) -> None:
    with connect(port_of(hasty)) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        connection.settimeout(0.05)
        received = b""
        while not received:
            connection.sendall(b"1\r\n \r\n")
            try:
                received = connection.recv(12)
            except TimeoutError:
                continue
        assert received == b"HTTP/1.1 408"


def test_a_long_answer_is_not_a_slow_request(hasty: Server) -> None:
    """What was asked in time may be answered for as long as it takes, whole or streamed."""
    with hasty.client() as client:
        for stream in (False, True):
            said = client.completions.create(model="test-model", prompt="ab", max_tokens=12, stream=stream)
            text = "".join(chunk.choices[0].text for chunk in said) if stream else said.choices[0].text  # type: ignore[union-attr]
            assert text == "ab" * 6
