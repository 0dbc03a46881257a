"""Clients that read slowly or not at all: they lose nothing silently, cost nobody else anything, and are cut in time.

The kernel and the server swallow some hundred kilobytes before anybody notices that nothing is read, so events are made
large by a long model name, and whole answers by a long prompt that is echoed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import string
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prefix_client import MODEL, explain, story, wait_until
from waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from conftest import Launch, Server, StartServer

NAME = "m" * 4000
BUFFER = 32
LETTERS = string.ascii_lowercase
OTHERS, PIECES = 7, 120
MOST_KEPT = 1_000_000
"""Bytes that the server and the kernel may hold for a client that reads nothing: a buffer of events for each of its
four answers, and what a socket takes."""
SMALL = 1024
"""Bytes of a client's receive buffer, as it is asked for; the kernel takes a little more."""


def serve(start_server: StartServer, script: str, *flags: str) -> AbstractContextManager[Server]:
    return start_server(f"context=100000,{script}", "model_name", NAME, *flags)


@pytest.fixture(scope="module")
def patient(start_server: StartServer) -> Iterator[Server]:
    """A server that ends what overflows and has all the patience in the world with what is unread."""
    with serve(start_server, "slow=0.01", "stream_buffer", str(BUFFER), "write_timeout", "0") as server:
        yield server


@pytest.fixture(scope="module")
def strict(start_server: StartServer) -> Iterator[Server]:
    """A server that cuts a connection on which nothing is read for a second."""
    flags = ("stream_buffer", str(BUFFER), "write_timeout", "1")
    with serve(start_server, "slow=0.001,context=9000000", *flags) as server:
        yield server


def address(server: Server) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def head(size: int, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", f"content-length: {size}", *headers]
    return "\r\n".join((*lines, "", "")).encode()


def post(server: Server, *headers: str, receive: int = SMALL, **body: object) -> socket.socket:
    """Send a request on a connection of one's own and read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(60)
    connection.connect(address(server))
    data = json.dumps(body).encode()
    connection.sendall(head(len(data), *headers) + data)
    return connection


def endless(**more: object) -> dict[str, Any]:
    return {"prompt": LETTERS, "max_tokens": 99_000, "stream": True, **more}


@dataclass
class Heard:
    """What a stream said, by choice, and how it ended."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: list[str] = field(default_factory=list)
    errors: list[dict[str, object]] = field(default_factory=list)
    done: bool = False
    times: list[float] = field(default_factory=list)

    def take(self, line: bytes) -> None:
        if not line.startswith(b"data: "):
            return
        assert not self.done, "something after the end"
        if line.strip() == b"data: [DONE]":
            self.done = True
            return
        event = json.loads(line[6:])
        if "error" in event:
            self.errors.append(event["error"])
            return
        assert not self.errors, "something after the error"
        for choice in event["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            self.finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
        self.times.append(time.monotonic())


def read_all(connection: socket.socket) -> Heard:
    """Read a stream to its end: [DONE], an error event, or the end of the connection."""
    heard = Heard()
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break  # cut in the middle of an event
            heard.take(line)
            if heard.done or heard.errors:
                break
    return heard


def expected(text: str) -> bool:
    """Whether these are the first tokens of the answer, none missing and none twice."""
    return text == (LETTERS * (len(text) // len(LETTERS) + 1))[: len(text)]


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def resting(server: Server) -> int:
    """How many it has when nobody is connected: the questions of before may still be on their way out."""
    return min(_after(0.02, server) for _ in range(15))


def _after(seconds: float, server: Server) -> int:
    time.sleep(seconds)
    return descriptors(server)


def ended(server: Server) -> int:
    """How many answers ended without their last token."""
    requests = server.health()["requests"]
    return requests["failed"] + requests["cancelled"]


def idle(server: Server) -> bool:
    health = server.health()
    return health["requests"]["held"] == 0 and health["engine"]["running"] == 0


def free(server: Server) -> None:
    until(lambda: idle(server))


async def paced(server: Server) -> Heard:
    """A stream that is read as it comes."""
    heard = Heard()
    reader, writer = await asyncio.open_connection(*address(server), limit=1 << 20)
    body = json.dumps({"prompt": LETTERS, "max_tokens": PIECES, "stream": True}).encode()
    writer.write(head(len(body)) + body)
    while not heard.done:
        line = await reader.readline()
        assert line, "the connection ended before the answer"
        heard.take(line)
    writer.close()
    return heard


def others(server: Server) -> list[Heard]:
    async def all_of_them() -> list[Heard]:
        return await asyncio.gather(*(paced(server) for _ in range(OTHERS)))

    return asyncio.run(all_of_them())


def slowest_gap(heard: list[Heard]) -> float:
    """The gap between two tokens that nine of ten are shorter than."""
    gaps = sorted(b - a for one in heard for a, b in zip(one.times, one.times[1:], strict=False))
    return gaps[int(0.9 * len(gaps))]


@pytest.fixture(scope="module")
def usual(patient: Server) -> float:
    """The pace of seven streams without a slow one beside them."""
    others(patient)
    return slowest_gap(others(patient))


@pytest.mark.parametrize("depth", [0, 300, 5_000, 200_000])
def test_a_slow_reader_gets_what_was_kept_and_then_an_error_and_others_keep_their_pace(
    patient: Server, usual: float, depth: int
) -> None:
    """(B12) It stops reading before the headers, after them, after one event, after many."""
    before = ended(patient)
    slow = post(patient, **endless(n=4))
    with slow:
        got = b""
        while len(got) < depth:
            got += slow.recv(depth - len(got))
        beside = others(patient)
        for one in beside:
            assert expected(one.texts[0])
            assert len(one.texts[0]) == PIECES
            assert one.finishes == ["length"]
        assert slowest_gap(beside) < 4 * usual
        # The work ends at the overflow, long before the client reads again or leaves.
        until(lambda: ended(patient) == before + 4)
        assert patient.health()["requests"]["held"] == 4
        heard = Heard()
        with slow.makefile("rb") as lines:
            first = got.rpartition(b"\n")[2] + lines.readline()
            for line in (*got.splitlines()[: got.count(b"\n")], first):
                heard.take(line)
            for line in lines:
                heard.take(line)
                if heard.errors or heard.done:
                    break
    assert not heard.done
    assert [error["code"] for error in heard.errors] == ["slow_reader"]
    assert "read too slowly" in str(heard.errors[0]["message"])
    assert sorted(heard.texts) == [0, 1, 2, 3]
    assert all(expected(text) for text in heard.texts.values())
    # What was kept for it is there to the last step: nothing was dropped between the socket and the end.
    assert sum(map(len, heard.texts.values())) > BUFFER
    # And no more than was meant to be: by itself the kernel would take megabytes before anybody notices.
    assert sum(map(len, heard.texts.values())) * len(NAME) - depth < MOST_KEPT
    assert len({len(text) for text in heard.texts.values()}) <= 2
    assert not heard.finishes
    free(patient)


def test_an_answer_that_fits_into_the_sockets_may_be_read_any_time_later(strict: Server) -> None:
    """(B12) Read after several write time-outs, it is whole and without an error."""
    connection = post(strict, **endless(max_tokens=10))
    free(strict)
    time.sleep(2.5)  # longer than the write time-out: what the kernel holds is none of the server's business
    heard = read_all(connection)
    assert (heard.done, heard.errors, heard.texts) == (True, [], {0: LETTERS[:10]})


def test_a_pause_within_the_buffers_does_no_harm(patient: Server) -> None:
    """A client that reads nothing for a while and then everything gets everything; tokens never wait for it."""
    connection = post(patient, **endless(max_tokens=40))
    connection.recv(1, socket.MSG_PEEK)
    until(lambda: patient.health()["requests"]["running"] == 0)
    heard = read_all(connection)
    assert heard.done
    assert len(heard.texts[0]) == 40


def test_a_burst_is_not_a_slow_reader(start_server: StartServer) -> None:
    """Many choices in one step, with the smallest buffer there is: a client that reads gets all of it."""
    with serve(start_server, "slow=0.005", "stream_buffer", "1") as server:
        for stream in (True, False):
            body = {"prompt": LETTERS, "max_tokens": 40, "n": 8, "stream": stream}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200
            assert '"error"' not in answer.text
            if not stream:
                assert {choice["text"] for choice in answer.json()["choices"]} == {(LETTERS * 2)[:40]}


def test_one_that_never_reads_is_cut_and_everything_is_given_back(strict: Server) -> None:
    """(B9, B12) Permits, engine requests and file descriptors, for streams of all kinds."""
    free(strict)
    before, tasks = resting(strict), strict.health()["process"]["tasks"]
    connections = [post(strict, **endless(n=2)) for _ in range(5)]
    until(lambda: sum("client=stalled" in line for line in strict.lines) >= 5)
    free(strict)
    until(lambda: descriptors(strict) <= before)
    for connection in connections:
        with contextlib.suppress(ConnectionError):
            heard = read_all(connection)
            assert not heard.done
            assert not heard.errors
    until(lambda: strict.health()["process"]["tasks"] <= tasks)


BIG: dict[str, Any] = {"prompt": "all work and no play " * 40_000, "echo": True, "max_tokens": 1}
"""Its answer is larger than what the kernel holds for a client."""


@pytest.mark.parametrize("header", ["connection: keep-alive", "connection: close"])
def test_a_whole_answer_left_unread_does_not_keep_its_connection_for_ever(strict: Server, header: str) -> None:
    """The request is over, its permit is back, and the connection goes too: nobody may collect dead ones here."""
    free(strict)
    before = resting(strict)
    with post(strict, header, **BIG):
        until(lambda: descriptors(strict) > before)
        until(lambda: descriptors(strict) <= before)
        free(strict)


def test_questions_without_reading_the_answers_end_too(strict: Server) -> None:
    """A client may put thousands of requests into one connection; not reading ends it like any other."""
    before = resting(strict)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        connection.connect(address(strict))
        connection.settimeout(60)
        questions = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100_000
        with pytest.raises(ConnectionError):
            connection.sendall(questions)
        until(lambda: descriptors(strict) <= before)


def test_a_slow_line_gets_a_whole_answer_however_long_it_takes(strict: Server) -> None:
    """What is still being read is not cut, though it takes many write time-outs."""
    with post(strict, "connection: close", receive=1 << 16, **BIG) as connection:
        got = bytearray()
        while part := connection.recv(40_000, socket.MSG_WAITALL):
            got += part
            time.sleep(0.15)  # the line's slowness
    body = json.loads(bytes(got).partition(b"\r\n\r\n")[2])
    assert body["choices"][0]["text"].startswith(BIG["prompt"])
    free(strict)


# --- clients that leave while a real prompt is read ----------------------------------------------------------------


@pytest.fixture(scope="module")
def real(millpond: Launch, smollm2_folder: Path) -> Iterator[Server]:
    """The demo model, which reads a long prompt in many short steps."""
    arguments = ["serve", str(smollm2_folder), "--port", "0", "--model-name", MODEL, "--prefill-chunk", "64"]
    with millpond(arguments) as server:
        yield server


@pytest.mark.often("True")
@pytest.mark.models
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_prompt_is_read_ends_the_work_within_a_step(real: Server, stream: bool) -> None:
    """(B11) Nobody is told anything before the first token, and yet: no further step, memory back, prefix kept."""
    wait_until(real, lambda health: health["engine"]["kv_bytes"] == 0)
    prompt = story("Yawl" if stream else "Wherry", 420)
    start = real.health()["engine"]["step"]
    connection = post(real, prompt=prompt, max_tokens=50, stream=stream, temperature=0)
    with connection:
        seen = wait_until(real, lambda health: health["engine"]["step"] >= start + 5)["engine"]
        assert (seen["waiting"], seen["running"]) == (1, 0)
        assert seen["kv_bytes"] > 0
        asked = time.monotonic()
    gone = wait_until(real, lambda health: health["engine"]["waiting"] == 0)
    took = time.monotonic() - asked
    wait_until(real, lambda health: health["engine"]["kv_bytes"] == 0)
    last = real.health()["engine"]["step"]
    assert last == gone["engine"]["step"], "no step after it"
    # The last beat before it left may be half a second old, and so may be the first one after it.
    print(f"left at step {seen['step'] - start}, the last was {last - start}, {took:.2f} s later")
    assert last - start < 6000 // 64 // 2, "most of the prompt was never read"
    assert gone["requests"]["held"] == 0
    known = explain(real, prompt=prompt)[0]["known_tokens"]
    assert isinstance(known, int)
    assert 64 * 4 <= known <= 64 * (last - start + 1)
