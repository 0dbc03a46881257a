"""Which names a server answers to and which web pages may call it, as a hostile page would try, on real sockets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
from plain_http import bearer, get, one_answer

from millpond.http.gate import ANY_HOST, host_name, served_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server, StartServer

KEY = "bob-key-0123456789"
PAGE = "https://chat.example.org"
ASK = {"model": "test-model", "prompt": "ab", "max_tokens": 4}


# --- Host ---------------------------------------------------------------------------------------------------------

OWN = ["localhost", "LocalHost:1", "localhost.", "localhost.:8000", "localhost:", "127.0.0.1", "127.0.0.1:8000"]
OWN += ["[::1]", "[::1]:8000", " localhost "]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil@localhost"]
FOREIGN += ["[::1]evil.example", "[::1].evil.example", "[::1]:80evil", "localhost:80:80", "localhost, evil", "[::2]"]
FOREIGN += ["127.0.0.2", "*", "", ".", "[]", "[", "localhost..", "localhost/evil", "evil#localhost", "xn--lcalhost-54a"]


@pytest.mark.parametrize("host", OWN)
def test_own_names_are_served_on_loopback(server: Server, host: str) -> None:
    assert get(server, host=host.encode()).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused_on_loopback(server: Server, host: str) -> None:
    """A web page whose name was made to point at 127.0.0.1 must not reach the model."""
    refused = get(server, host=host.encode())
    assert (refused.status, refused.error_code()) == (403, "host_not_allowed")
    assert "--allowed-hosts" in refused.body.decode()
    assert get(server, "/health", host=host.encode()).status == 403
    assert [get(server, path, host=host.encode()).status for path in ANY_HOST] == [200, 200]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 403),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.0\r\nhost: localhost\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.0\r\nhost: evil\r\n\r\n", 403),
        (b"GET http://localhost/v1/models HTTP/1.1\r\nhost: evil\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nhost: ev\xffil\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nhost: " + b"a" * 10_000 + b"\r\n\r\n", 403),
    ],
)
def test_missing_double_and_old_hosts(server: Server, head: bytes, status: int) -> None:
    assert one_answer(server, head).status == status


def test_allowed_hosts_are_the_only_ones(start_server: StartServer) -> None:
    """(J1)"""
    with start_server("plain", "allowed_hosts", "Chat.Example.org, *.example.net, [fe80::1]") as server:
        for host in ("chat.example.org", "CHAT.example.org.:80", "a.example.net", "a.b.example.net:1", "[fe80::1]:80"):
            assert get(server, host=host.encode()).status == 200, host
        for host in ("localhost", "127.0.0.1", "example.net", "evilexample.net", "a.example.net.evil", "example.org"):
            assert get(server, host=host.encode()).status == 403, host
    with start_server("plain", "allowed_hosts", "*") as server:
        assert get(server, host=b"anything.example").status == 200


def test_beyond_loopback_any_host_is_served_and_a_missing_key_is_warned_about(start_server: StartServer) -> None:
    """(B8, J1) Whoever listens for others is called by names that only they know."""
    with start_server("plain", "host", "0.0.0.0") as server:
        assert "beyond this machine" in server.wait_for_line(" warning ")
        assert get(server, host=b"10.1.2.3:8000").status == 200
    with start_server("plain", "host", "0.0.0.0", "api_key", KEY) as server:
        assert get(server, host=b"10.1.2.3:8000").status == 401
        assert not any("beyond this machine" in line for line in server.lines)


def test_hosts_are_normalised_alike() -> None:
    assert served_hosts([], "0.0.0.0", loopback=False) == frozenset()
    assert served_hosts([], "My.Host.", loopback=True) >= {"my.host", "localhost", "127.0.0.1", "::1"}
    assert served_hosts(["::1", "[::2]", "Example.org:80"], "127.0.0.1", loopback=True) == {"::1", "::2", "example.org"}
    assert [host_name(text) for text in ("[::1]:80", "a.b.:80", "A", "")] == ["::1", "a.b", "a", ""]


# --- browsers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://localhost:1", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://HOST"}, 200),
        ({"origin": "https://ui.example", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://ui.example", "sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_a_web_page_cannot_make_the_model_work(server: Server, headers: dict[str, str], status: int) -> None:
    """A plain POST needs no permission of CORS: the page could not read the answer, but the machine would be busy."""
    submitted = server.health()["requests"]["submitted"]
    own = urlsplit(server.url).netloc
    given = {name: value.replace("HOST", own) for name, value in headers.items()}
    response = httpx.post(
        f"{server.url}/v1/completions", content=json.dumps(ASK), headers={"content-type": "text/plain", **given}
    )
    assert response.status_code == status
    assert server.health()["requests"]["submitted"] == submitted + (status == 200)
    assert not [name for name in response.headers if name.startswith("access-control")]
    if status == 403:
        assert response.json()["error"]["code"] == "origin_not_allowed"


@pytest.fixture(scope="module")
def guarded(start_server: StartServer) -> Iterator[Server]:
    """A server with a key, which two web pages may call."""
    flags = ["api_key", KEY, "cors_origins", f"{PAGE.upper()}, http://localhost:3000"]
    with start_server("plain", *flags) as server:
        yield server


def preflight(server: Server, origin: str, **more: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    return httpx.options(f"{server.url}/v1/chat/completions", headers={**headers, **more}, verify=False)


def test_no_cors_unless_asked_for(server: Server) -> None:
    refused = preflight(server, PAGE)
    assert refused.status_code == 405
    response = httpx.get(f"{server.url}/v1/models", headers={"origin": PAGE})
    for answer in (refused, response):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_for_the_page_that_may(guarded: Server) -> None:
    """(J1) The preflight works without a key, with the headers of the official client; then the request with one."""
    wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count,openai-organization"
    more = {"access-control-request-headers": wanted, "access-control-request-private-network": "true"}
    allowed = preflight(guarded, PAGE, **more)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert allowed.headers["access-control-allow-headers"] == wanted
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert allowed.headers["access-control-allow-private-network"] == "true"
    url = f"{guarded.url}/v1/completions"
    for key, status in ((KEY, 200), ("wrong", 401)):
        answered = httpx.post(url, json=ASK, headers={"origin": PAGE, **bearer(key)})
        assert answered.status_code == status
        assert answered.headers["access-control-allow-origin"] == PAGE, "the page must be able to read a refusal, too"
        assert "x-request-id" in answered.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answered.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://chat.example.org", f"{PAGE}.evil.example", f"{PAGE}:444", "null", "*"]
)
def test_cors_for_nobody_else(guarded: Server, origin: str) -> None:
    refused = preflight(guarded, origin)
    answered = httpx.post(f"{guarded.url}/v1/completions", json=ASK, headers={"origin": origin, **bearer(KEY)})
    for response in (refused, answered):
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    read = httpx.get(f"{guarded.url}/v1/models", headers={"origin": origin, **bearer(KEY)})
    assert "access-control-allow-origin" not in read.headers


def test_cors_for_everybody(start_server: StartServer) -> None:
    with start_server("plain", "cors_origins", "*") as server:
        assert preflight(server, "https://any.example").headers["access-control-allow-origin"] == "*"
        answered = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"origin": "https://any.example"})
        assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (200, "*")
