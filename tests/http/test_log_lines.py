"""Log lines: one per request, parsable in both formats whatever clients send, and never a word of a prompt."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
from raw_client import connect, receive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server, StartServer

SECRET = "tell-nobody"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
VALUE = r'(?:"(?:[^"\\]|\\.)*"|[^\s"=]+)'
TEXT_LINE = re.compile(rf"({TIME}) (debug|info|warning|error) ([\w.]+): ([^=]*?)((?: \w+={VALUE})*)\n")
NASTY_PATHS = ["/a%0Ab%0D%00", "/%22quoted%22", "/a=b", "/caf%C3%A9%20%E9%8D%B5", "/%FF%FE", "/%1b[31m", "/\\", "/{}"]


@pytest.fixture(scope="module", params=["text", "json"])
def logging_server(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[Server]:
    """A server that writes everything, in either format, to which bad things happen."""
    flags = ["log_format", request.param, "log_level", "debug", "drain_seconds", "0.2", "body_timeout", "0.3"]
    with start_server("plain", *flags, ready=False) as server:
        yield server


def url_of(server: Server) -> str:
    match = re.search(r"http://[\d.]+:\d+", server.wait_for_line("listening"))
    assert match is not None
    server.wait_for_line("/v1")
    return match[0]


def read(server: Server, line: str) -> dict[str, object]:
    """A line's fields. Raises AssertionError for a line that is not as promised."""
    if line.startswith("{"):
        found: dict[str, object] = json.loads(line)
        assert re.fullmatch(TIME, str(found["time"]))
        assert {"level", "logger", "message"} <= set(found)
        return found
    match = TEXT_LINE.fullmatch(line)
    assert match is not None, line
    pairs = re.findall(rf" (\w+)=({VALUE})", match[5])
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return {"time": match[1], "level": match[2], "logger": match[3], "message": match[4], **values}


def test_every_line_parses_and_none_has_text_of_a_prompt(logging_server: Server) -> None:
    """(J1, K3) Answers, refusals of all kinds, failures, hang-ups, nasty paths, broken HTTP, at the level debug."""
    server = logging_server
    url = url_of(server)
    with httpx.Client(base_url=url, timeout=20) as client:
        chat = {"messages": [{"role": "user", "content": SECRET}]}
        for path, body in (
            ("/v1/completions", {"prompt": SECRET, "max_tokens": 3, "user": "x"}),
            ("/v1/completions", {"prompt": SECRET, "max_tokens": 3, "stream": True}),
            ("/v1/completions", {"prompt": SECRET * 1000}),
            ("/v1/completions", {"prompt": {SECRET: SECRET}}),
            ("/v1/completions", {"prompt": "a", "stop": SECRET, SECRET: SECRET}),
            ("/v1/completions", {"prompt": "a", "temperature": SECRET}),
            ("/v1/completions", {"prompt": [64, 900]}),
            ("/v1/completions", {"prompt": [900]}),
            ("/v1/chat/completions", {**chat, "max_tokens": 3}),
            ("/v1/chat/completions", {**chat, "tools": [SECRET]}),
            ("/v1/chat/completions", {"messages": [{"role": "tool", "content": SECRET, "tool_call_id": "1"}]}),
            ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
            ("/v1/cache/explain", {"prompt": SECRET}),
        ):
            client.post(path, json=body)
        for path in NASTY_PATHS:
            assert client.get(path).status_code == 404
        client.get("/livez", headers={"host": "evil.example"})
        client.get(f"/v1/models?prompt={SECRET}", headers={"host": 'ev"il=1'})
        client.post("/v1/completions", content=f'{{"prompt": "{SECRET}"')
        with client.stream("POST", "/v1/completions", json={"prompt": [64, 903], "stream": True}) as stream:
            next(stream.iter_lines())
    for sent in (
        b"nonsense \n\n",
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{SECRET}".encode(),
    ):
        with connect(int(urlsplit(url).port or 0)) as connection:
            connection.sendall(sent)
            receive(connection)
    assert server.stop() == 0
    lines = [read(server, line) for line in server.lines]
    assert not [line for line in server.lines if SECRET in line or "Traceback" in line]
    requests = [line for line in lines if line["message"] == "request"]
    assert {str(line["status"]) for line in requests if "status" in line} >= {"200", "400", "403", "404", "408", "500"}
    paths = [line["path"] for line in requests]
    assert {"/a\nb\r\x00", '/"quoted"', "/a=b", "/café 鍵", "/\x1b[31m"} <= set(paths)
    done = next(line for line in requests if str(line.get("completion_tokens")) == "3")
    assert {"id", "method", "path", "status", "seconds", "prompt_tokens", "cached_tokens", "ttft", "seed"} <= set(done)
    assert {str(done["accepted_draft_tokens"]), str(done["rejected_draft_tokens"])} == {"0"}


def test_request_ids_are_echoed_or_made(server: Server) -> None:
    """(K3) On answers and refusals alike; what could not stand in a header or a log line is replaced."""
    for path, status in (("/v1/models", 200), ("/nothing", 404), ("/livez", 200)):
        answered = httpx.get(f"{server.url}{path}", headers={"x-request-id": f"mine-{status}"})
        assert (answered.status_code, answered.headers["x-request-id"]) == (status, f"mine-{status}")
    refused = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "mine-403", "host": "evil"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (403, "mine-403")
    for odd in ("", "a b", "x" * 129, "ä", "a\tb"):
        answered = httpx.get(f"{server.url}/v1/models", headers={b"x-request-id": odd.encode()})
        assert re.fullmatch(r"[0-9a-f]{32}", answered.headers["x-request-id"]), odd


@pytest.mark.parametrize(
    ("level", "probes", "requests", "started"), [("debug", 1, 1, 1), ("info", 0, 1, 1), ("error", 0, 0, 0)]
)
def test_log_levels(start_server: StartServer, level: str, probes: int, requests: int, started: int) -> None:
    """(J1) The port is found by hand, since at the level error nothing is said."""
    with start_server("plain", "log_level", "debug") as probe:
        port = urlsplit(probe.url).port
    with start_server("plain", "log_level", level, "port", str(port), ready=False) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=10)) as client:
            while client.get("/readyz").status_code != 200:
                pass
            client.get("/livez")
            client.get("/v1/models")
        assert server.stop() == 0
        said = "".join(server.lines)
        assert [("path=/livez" in said), ("path=/v1/models" in said), ("listening" in said)] == [
            bool(probes),
            bool(requests),
            bool(started),
        ]
