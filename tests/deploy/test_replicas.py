"""Two real servers behind a real nginx and a real HAProxy, with the files that we ship."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from balancers import PROGRAMS, Balancer, free_port
from waiting import until

if TYPE_CHECKING:
    from conftest import Server, StartServer

HOST = "llm.example.org"
SESSIONS = [f"conversation-{number}" for number in range(40)]
NAMES = ["one", "two"]
PATIENCE = 60
"""Seconds after which something will not come true any more."""
Json = dict[str, object]


@dataclass
class Site:
    """A balancer with the replicas behind it, by the names under which they serve their model."""

    balancer: Balancer
    replicas: dict[str, Server]

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.balancer.url, headers={"host": HOST, **headers}, timeout=30, verify=False, trust_env=False
        )

    def ai(self, session: str) -> openai.OpenAI:
        client = openai.DefaultHttpxClient(verify=False, trust_env=False, timeout=30)
        headers = {"X-Session-Id": session, "Host": HOST}
        url = f"{self.balancer.url}/v1"
        return openai.OpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=30, default_headers=headers, http_client=client
        )

    def place(self, **headers: str) -> str:
        """The replica that answers a request with these headers."""
        with self.http(**headers) as client:
            return placed(client)

    def places(self) -> dict[str, str]:
        """Where each session goes."""
        with self.http() as client:
            return {session: placed(client, session) for session in SESSIONS}


def placed(client: httpx.Client, session: str = "") -> str:
    """Which replica answers; an empty session is none."""
    body = {"prompt": "a", "max_tokens": 1}
    answer = client.post("/v1/completions", json=body, headers={"x-session-id": session} if session else {})
    assert answer.status_code == 200, answer.text
    name: str = answer.json()["model"]
    return name


def refused(server: Server, code: str) -> float:
    """How many requests a replica has refused with this code."""
    page = httpx.get(f"{server.url}/metrics", verify=False, trust_env=False).text
    found = re.findall(rf'^millpond_requests_refused_total{{.*code="{code}".*}} (\S+)$', page, re.M)
    return sum(float(value) for value in found)


def addresses(replicas: dict[str, Server]) -> list[str]:
    return [server.url.removeprefix("http://") for server in replicas.values()]


def submitted(server: Server) -> int:
    return server.health()["requests"]["submitted"]


@contextlib.contextmanager
def site(
    start: StartServer, balancer: str, folder: Path, script: str, *flags: str, names: Sequence[str] = NAMES
) -> Iterator[Site]:
    """Fresh replicas behind a balancer."""
    with contextlib.ExitStack() as stack:
        replicas = {
            name: stack.enter_context(start(script, "model_name", name, "allowed_hosts", f"{HOST},127.0.0.1", *flags))
            for name in names
        }
        program = Balancer(balancer, folder, addresses(replicas))
        stack.enter_context(program.running())
        yield Site(program, replicas)


@pytest.fixture(scope="module", params=sorted(PROGRAMS))
def balancer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if PROGRAMS[name] is None:
        pytest.skip(f"needs {name}: apt-get install --no-install-recommends {name}, or brew install {name}")
    return name


@pytest.fixture(scope="module")
def shared(balancer: str, start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For the tests that leave both replicas running. A prompt that is not begun gives up soon."""
    flags = ("queue_timeout", "1", "max_per_client", "4")
    with site(start_server, balancer, tmp_path_factory.mktemp(balancer), "queue=0,context=200000", *flags) as opened:
        yield opened


def test_the_program_accepts_the_file(balancer: str, tmp_path: Path) -> None:
    program = Balancer(balancer, tmp_path, ["127.0.0.1:8001", "127.0.0.1:8002"])
    checked = subprocess.run(program.check, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# --- where a request goes -------------------------------------------------------------------------------------------


@pytest.mark.often("nginx")
def test_a_session_stays_where_it_is_and_sessions_spread(shared: Site) -> None:
    places = shared.places()
    assert set(places.values()) == set(NAMES)
    with shared.http(authorization="Bearer somebody", **{"x-forwarded-for": "192.0.2.7"}) as client:
        for session in SESSIONS:
            assert {placed(client, session) for _ in range(3)} == {places[session]}


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_without_a_session_the_key_decides(shared: Site, name: str) -> None:
    keys = [f"Bearer key-{number}" for number in range(24)]
    places = {key: shared.place(**{name: key}) for key in keys}
    assert set(places.values()) == set(NAMES)
    again = {key: shared.place(**{name: key, "x-session-id": "", "x-request-id": key[7:]}) for key in keys}
    assert again == places


def test_without_either_the_address_decides(shared: Site) -> None:
    def ask(address: str) -> str:
        transport = httpx.HTTPTransport(local_address=address, verify=False)
        with httpx.Client(base_url=shared.balancer.url, headers={"host": HOST}, transport=transport) as client:
            return placed(client)

    addresses = [f"127.0.0.{number}" for number in range(2, 26)]
    try:
        places = {address: ask(address) for address in addresses}
    except httpx.ConnectError:
        pytest.skip("this system has 127.0.0.1 only")
    assert set(places.values()) == set(NAMES)
    assert {address: ask(address) for address in addresses} == places


def test_one_more_replica_takes_only_what_becomes_its_own(
    shared: Site, start_server: StartServer, tmp_path: Path
) -> None:
    before = shared.places()
    with start_server("plain", "model_name", "three", "allowed_hosts", HOST) as third:
        replicas = {**shared.replicas, "three": third}
        more = Site(Balancer(shared.balancer.name, tmp_path, addresses(replicas)), replicas)
        with more.balancer.running():
            after = more.places()
    assert set(after.values()) == {*NAMES, "three"}
    assert {session for session in SESSIONS if after[session] != before[session]} == {
        session for session in SESSIONS if after[session] == "three"
    }


# --- what passes unchanged ------------------------------------------------------------------------------------------


def test_a_stream_arrives_piece_by_piece(shared: Site) -> None:
    """The answer to 903 never goes on: what comes before it comes only if nobody collects."""
    with shared.ai("stream") as client:
        stream = client.completions.create(model="", prompt=[64, 65, 903], max_tokens=9, stream=True)
        assert "".join(next(stream).choices[0].text for _ in range(2)) == "ab"
        stream.close()
        whole = client.completions.create(model="", prompt="abc", max_tokens=300, stream=True)
        assert "".join(piece.choices[0].text for piece in whole if piece.choices) == "abc" * 100


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_the_work(shared: Site, stream: bool) -> None:
    server = shared.replicas[shared.place(**{"x-session-id": "leaver"})]
    before = server.health()["requests"]
    body = json.dumps({"prompt": [64, 903], "max_tokens": 9, "stream": stream})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\nx-session-id: leaver\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", shared.balancer.port), PATIENCE) as leaver:
        # In one piece: what a balancer has read as a whole, it may not read on from, and miss the end.
        leaver.sendall((head + body).encode())
        server.wait_until(lambda health: health["requests"]["submitted"] == before["submitted"] + 1)
        if stream:
            assert leaver.recv(65536)
    after = server.wait_until(lambda health: health["requests"]["held"] == 0)["requests"]
    assert after["cancelled"] == before["cancelled"] + 1


def test_errors_are_those_of_the_replica(shared: Site) -> None:
    cases: dict[int, Json] = {
        400: {"prompt": "a", "temperature": -1},
        404: {"prompt": "a", "model": "other"},
        500: {"prompt": [900]},
        504: {"prompt": [907, 64]},
    }
    session = "errors"
    home = shared.place(**{"x-session-id": session})
    with shared.http(**{"x-session-id": session}) as client:
        for status, body in cases.items():
            through = client.post("/v1/completions", json=body)
            direct = httpx.post(f"{shared.replicas[home].url}/v1/completions", json=body, verify=False, timeout=30)
            assert (through.status_code, through.json()) == (direct.status_code, direct.json())
            assert through.status_code == status
        other_host = client.get("/v1/models", headers={"host": "evil.example.org"})
    assert other_host.status_code == 403
    assert other_host.json()["error"]["code"] == "host_not_allowed"


def test_a_full_replica_says_so_itself(shared: Site) -> None:
    """A 429 is for the client; another replica would only have it cold. Limits are those of the client's address."""
    session = "greedy"
    home = shared.place(**{"x-session-id": session})
    [other] = set(NAMES) - {home}
    before = refused(shared.replicas[home], "client_limit"), submitted(shared.replicas[other])

    def client_from(address: str) -> httpx.Client:
        transport = httpx.HTTPTransport(local_address=address, verify=False)
        headers = {"host": HOST, "x-session-id": session, "x-forwarded-for": "192.0.2.99"}
        return httpx.Client(base_url=shared.balancer.url, headers=headers, transport=transport, timeout=30)

    endless = {"prompt": [64, 903], "max_tokens": 9, "stream": True, "n": 4}
    with client_from("127.0.0.1") as client, client.stream("POST", "/v1/completions", json=endless) as held:
        pieces = held.iter_bytes()
        next(pieces)
        refusal = client.post("/v1/completions", json={"prompt": "a"})
        assert refusal.status_code == 429
        assert refusal.json()["error"]["code"] == "client_limit"
        assert refusal.headers["retry-after"]
        with client_from("127.0.0.2") as neighbour, contextlib.suppress(httpx.ConnectError):
            assert placed(neighbour) == home
    after = refused(shared.replicas[home], "client_limit"), submitted(shared.replicas[other])
    assert after == (before[0] + 1, before[1])
    shared.replicas[home].wait_until(lambda health: health["requests"]["held"] == 0)


def test_bodies_of_several_megabytes_pass(shared: Site) -> None:
    def body(megabytes: int) -> Json:
        return {"prompt": "a", "max_tokens": 1, "metadata": {"padding": "x" * (megabytes << 20)}}

    with shared.http(**{"x-session-id": "large"}) as client:
        assert client.post("/v1/completions", json=body(7)).status_code == 200
        refusal = client.post("/v1/completions", json=body(9))
    assert refusal.status_code == 413
    assert refusal.json()["error"]["code"] == "request_too_large"


def test_request_ids_pass_and_numbers_do_not(shared: Site) -> None:
    with shared.http() as client:
        assert client.get("/v1/models", headers={"x-request-id": "trace-9"}).headers["x-request-id"] == "trace-9"
        ids = {client.get("/v1/models").headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2
        for path in ("/metrics", "/%6detrics", "/health", "/metrics?a=b"):
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert "millpond_" not in answer.text
        assert client.get("/readyz").status_code == 200


def test_a_request_that_kills_the_engine_is_not_passed_on(shared: Site) -> None:
    """It is answered by the replica it killed; the next one is spared."""
    session = "deadly"
    home = shared.place(**{"x-session-id": session})
    [other] = set(NAMES) - {home}
    before = submitted(shared.replicas[other])
    with shared.http(**{"x-session-id": session}) as client:
        answer = client.post("/v1/completions", json={"prompt": [904]})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_died"
    assert submitted(shared.replicas[other]) == before
    shared.replicas[home].wait_until(lambda health: health["engine"]["restarts"] == 1 and not health["reasons"])


# --- replicas that go -----------------------------------------------------------------------------------------------


@pytest.mark.often("nginx")
def test_a_replica_that_is_killed_takes_only_its_own_with_it(
    balancer: str, start_server: StartServer, tmp_path: Path
) -> None:
    """What it had begun fails, visibly, and is not begun elsewhere. Its sessions move, all others stay."""
    with site(start_server, balancer, tmp_path, "queue=0", names=[*NAMES, "three"]) as opened:
        before = opened.places()
        assert set(before.values()) == {*NAMES, "three"}
        session = next(session for session, name in before.items() if name == "one")
        one, *others = opened.replicas.values()
        begun, asked = submitted(one), [submitted(other) for other in others]
        endless = {"prompt": [64, 903], "max_tokens": 9}
        headers = {"x-session-id": session}
        with opened.ai(session) as client, ThreadPoolExecutor(1) as pool, opened.http(**headers) as raw:
            stream = client.completions.create(model="", prompt=[64, 903], max_tokens=9, stream=True)
            assert next(stream).model == "one"
            waiting = pool.submit(raw.post, "/v1/completions", json=endless)
            one.wait_until(lambda health: health["requests"]["submitted"] == begun + 2)
            os.kill(one.process.pid, signal.SIGKILL)
            with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
                list(stream)
            broken = waiting.result(30)
        assert broken.status_code == 502
        assert broken.json()["error"]["code"] == "bad_gateway"
        assert [submitted(other) for other in others] == asked
        after = opened.places()
        assert set(after.values()) == {"two", "three"}
        assert {session for session in SESSIONS if after[session] != before[session]} == {
            session for session in SESSIONS if before[session] == "one"
        }


@pytest.mark.often("nginx")
@pytest.mark.parametrize("back", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replica_that_stops_hands_over(balancer: str, start_server: StartServer, tmp_path: Path, back: bool) -> None:
    """It finishes what it has begun, the other gets what it refuses. Started again, its sessions are its own again."""
    port = str(free_port())
    flags = ("drain_seconds", "60", "allowed_hosts", f"{HOST},127.0.0.1")
    with contextlib.ExitStack() as stack:
        two = stack.enter_context(start_server("context=200000", "model_name", "two", *flags))
        one = stack.enter_context(start_server("slow=0.02", "model_name", "one", "port", port, *flags))
        program = Balancer(balancer, tmp_path, [f"127.0.0.1:{port}", two.url.removeprefix("http://")])
        stack.enter_context(program.running())
        opened = Site(program, {"one": one, "two": two})
        before = opened.places()
        session = next(session for session, name in before.items() if name == "one")
        with opened.ai(session) as client, opened.http(**{"x-session-id": session}) as raw:
            stream = client.completions.create(model="", prompt="abc", max_tokens=60, stream=True)
            text = next(stream).choices[0].text
            one.process.send_signal(signal.SIGTERM)
            one.wait_for_line("stopping")
            long = {"prompt": "a" * 100_000, "max_tokens": 1}
            answer = raw.post("/v1/completions", json=long)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "two"
            assert refused(one, "unavailable") > 0
            assert placed(raw) == "two"
            text += "".join(piece.choices[0].text for piece in stream if piece.choices)
        assert text == "abc" * 20
        assert one.process.wait(30) == 0
        assert opened.places() == dict.fromkeys(SESSIONS, "two")
        if not back:
            return
        stack.enter_context(start_server("plain", "model_name", "one", "port", port, *flags))
        # A balancer finds out when it looks again, some seconds later.
        until(opened.places, lambda after: after == before)
