"""The four time-outs: each ends the work at once, says which one it was, and is never taken for an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from conftest import Launch, Server, StartServer

A, B, C = 64, 65, 66
"""Tokens of the letters a, b and c."""
NEVER_BEGUN, STOP_HERE, SILENT = 907, 901, 903
CASES = {
    "queue_timeout": [NEVER_BEGUN],
    "first_token_timeout": [SILENT],
    "token_timeout": [A, B, SILENT],
    "request_timeout": [A, B, C],
}
"""A prompt that runs into each of them."""
BEGUN = ("token_timeout", "request_timeout")
"""Those that end an answer of which something was shown."""


@pytest.fixture(scope="module")
def hasty(start_server: StartServer) -> Iterator[Server]:
    """A server with little patience. Its engine tells when a prompt is begun, as the real one does."""
    limits = ("queue_timeout", "0.7", "first_token_timeout", "0.8", "token_timeout", "0.9", "request_timeout", "3")
    script = "slow=0.02,queue=0.01,context=200000"
    with start_server(script, *limits) as server:
        yield server


def until_idle(server: Server) -> dict[str, dict[str, int]]:
    return server.wait_until(lambda health: health["requests"]["held"] == 0 and health["engine"]["running"] == 0)


def post(server: Server, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 100_000, **body}, timeout=30, verify=False)


def events(answer: httpx.Response) -> list[dict[str, object]]:
    """The events of a stream without comments; [DONE] is {}."""
    found = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [{} if one == "[DONE]" else json.loads(one) for one in found]


@pytest.mark.parametrize(
    ("stream", "choices"),
    [
        (False, 1),
        (True, 3),
        pytest.param(False, 3, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", CASES)
def test_each_timeout_names_itself_and_cancels_the_work(hasty: Server, kind: str, stream: bool, choices: int) -> None:
    """(B10, A4) A status before the first byte, an error event after it; everything is given back."""
    before = until_idle(hasty)["requests"]
    answer = post(hasty, prompt=CASES[kind], n=choices, stream=stream)
    if stream and kind in BEGUN:
        assert answer.status_code == 200
        *shown, last = events(answer)
        assert shown
        assert all("choices" in event for event in shown)
        assert not any(choice["finish_reason"] for event in shown for choice in event["choices"])  # type: ignore[attr-defined]
    else:
        assert answer.status_code == 504
        last = answer.json()
    error = last["error"]
    assert isinstance(error, dict)
    assert error["code"] == kind
    assert error["message"].startswith(kind)
    assert error["type"] == "server_error"
    assert set(re.findall(r"\w+_timeout", answer.text)) == {kind}
    after = until_idle(hasty)["requests"]
    assert after["submitted"] - before["submitted"] == choices
    assert after["finished"] == before["finished"]
    assert after["failed"] + after["cancelled"] == before["failed"] + before["cancelled"] + choices


def test_one_late_choice_ends_the_whole_request(hasty: Server) -> None:
    """One answer of two is complete when the other's time is up: half an answer is none."""
    answer = post(hasty, prompt=[[A, STOP_HERE], [A, SILENT]])
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "token_timeout")
    until_idle(hasty)


def test_an_empty_answer_is_no_timeout(hasty: Server) -> None:
    """(B10) Nothing to say and nothing said in time are different things, streamed or not."""
    whole = post(hasty, prompt=[STOP_HERE])
    assert whole.status_code == 200
    assert (whole.json()["choices"][0]["text"], whole.json()["choices"][0]["finish_reason"]) == ("", "stop")
    streamed = events(post(hasty, prompt=[STOP_HERE], stream=True))
    assert streamed[-1] == {}
    assert not any("error" in event for event in streamed)


def test_the_official_client_sees_what_it_was(hasty: Server) -> None:
    with hasty.client() as client:
        with pytest.raises(openai.InternalServerError, match="first_token_timeout") as late:
            client.completions.create(model="test-model", prompt=CASES["first_token_timeout"])
        assert late.value.status_code == 504
        stream = client.completions.create(model="test-model", prompt=CASES["token_timeout"], stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="token_timeout"):
            text = "".join(chunk.choices[0].text for chunk in iter(lambda: next(stream), None))
        assert not text


def test_a_client_that_pauses_is_not_the_engines_delay(hasty: Server) -> None:
    """The time-outs are about the engine: reading late costs nobody an answer that is there."""
    with hasty.client() as client:
        stream = client.completions.create(model="test-model", prompt=[A, B], max_tokens=20, stream=True)
        text = next(stream).choices[0].text
        time.sleep(2.0)  # longer than every pause that is allowed to the engine
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == "ab" * 10


@pytest.mark.slow
def test_zero_turns_them_off(start_server: StartServer) -> None:
    """The same delays that end a request elsewhere; the server's own limits are all 0."""
    zeros = [word for name in CASES for word in (name, "0")]
    delays = "queue=1.2,prefill=1.2,pause=3:1.2"
    limits = [word for name in CASES for word in (name, "0.6")]
    with start_server(delays, *zeros) as server, start_server(delays, *limits) as strict:
        with ThreadPoolExecutor(2) as pool:
            patient = pool.submit(post, server, prompt=[A, B, C], max_tokens=5)
            refused = pool.submit(post, strict, prompt=[A, B, C], max_tokens=5)
        assert patient.result().status_code == 200
        assert patient.result().json()["usage"]["completion_tokens"] == 5
        assert refused.result().status_code == 504


def test_a_server_that_was_stopped_and_continued_loses_nothing(start_server: StartServer) -> None:
    """Ctrl-Z and fg: the time in which the front end itself stood still counts against nobody, nor is the engine
    killed for the silence."""
    flags = ("token_timeout", "1", "stall_timeout", "1", "queue_timeout", "1", "keepalive", "0.2")
    with start_server("slow=0.01,queue=0", *flags) as server, server.client() as client:
        streams = [
            client.completions.create(model="test-model", prompt=[A, B], max_tokens=400, stream=True) for _ in range(3)
        ]
        texts = [next(stream).choices[0].text for stream in streams]
        engine = server.engine_pid()
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            time.sleep(3.5)  # longer than all of its time-outs
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        for text, stream in zip(texts, streams, strict=True):
            assert len(text + "".join(chunk.choices[0].text for chunk in stream)) == 400
        assert server.engine_pid() == engine
        assert server.health()["engine"]["restarts"] == 0


SLOW_TEMPLATE = (
    "{% if messages[0].content == 'slow' %}{% for i in range(5000) %}{% for j in range(100000) %}{% endfor %}"
    "{% endfor %}{% endif %}{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


@pytest.fixture
def slow_text(byte_tokenizer: Path, tmp_path: Path) -> Path:
    """A model whose template takes long for one word."""
    for file in byte_tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": SLOW_TEMPLATE}))
    return tmp_path


@pytest.mark.often("request")
@pytest.mark.parametrize("kind", ["queue_timeout", "request_timeout"])
def test_reading_a_prompt_counts_and_holds_up_no_exit(launch: Launch, slow_text: Path, kind: str) -> None:
    """(B10, A3) Templates and tokenizers run in threads that nothing can interrupt: the request ends all the same,
    and so does the process."""
    program = str(Path(__file__).with_name("scripted_server.py"))
    with launch([sys.executable, program, "plain", str(slow_text), kind, "0.5"]) as server:
        body = {"messages": [{"role": "user", "content": "slow"}], "max_tokens": 2}
        begun = time.monotonic()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        waited = time.monotonic() - begun
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, kind)
        until_idle(server)
        assert server.health()["requests"]["submitted"] == 0
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        try:
            status = server.process.wait(30)
        except subprocess.TimeoutExpired:
            pytest.fail("a thread that works on a prompt kept the process alive")
        print(f"answered after {waited:.2f} s, exit after {time.monotonic() - begun:.2f} s")
        assert status == 0


# --- clocks that jump --------------------------------------------------------------------------------------------

CLOCK = """
import os, time
_real, _file = time.time, os.environ["MILLPOND_TEST_CLOCK"]
def _shifted():
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _shifted
"""
"""A sitecustomize module: wall time of a process and its children moves by what a file says."""
DAY = 86400.0


def test_a_clock_that_jumps_moves_nothing(
    launch: Launch, byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(L: clock jumps) A day forward and two back while streams run: no time-out fires, none comes late."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    shift = tmp_path / "shift"
    shift.write_text("0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))))
    monkeypatch.setenv("MILLPOND_TEST_CLOCK", str(shift))
    program = str(Path(__file__).with_name("scripted_server.py"))
    limits = [word for name in ("queue_timeout", "first_token_timeout", "token_timeout") for word in (name, "4")]
    flags = (*limits, "request_timeout", "60", "stall_timeout", "15", "write_timeout", "4", "keepalive", "1")
    with launch([sys.executable, program, "slow=0.01,queue=0", str(byte_tokenizer), *flags]) as server:
        created = httpx.get(f"{server.url}/v1/models").json()["data"][0]["created"]
        assert abs(created - time.time()) < DAY / 2
        seen: list[int] = []
        with server.client() as client:
            client_streams = [
                client.completions.create(model="test-model", prompt=[A, B], max_tokens=400, stream=True)
                for _ in range(4)
            ]
            shifts = iter((DAY, -DAY, 400 * DAY, 0.0))
            texts = [""] * 4
            for count, chunks in enumerate(zip(*client_streams, strict=True)):
                texts = [text + chunk.choices[0].text for text, chunk in zip(texts, chunks, strict=True)]
                if count % 80 == 40 and (jump := next(shifts, None)) is not None:
                    _replace(shift, jump)
                    answer = client.completions.create(model="test-model", prompt="ab", max_tokens=1)
                    seen.append(round((answer.created - time.time()) / DAY))
        assert seen == [1, -1, 400, 0], "the jumps were seen"
        assert all(len(text) == 400 for text in texts)
        # And what should fire does.
        late = post(server, prompt=[SILENT], max_tokens=9)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "first_token_timeout")
        _replace(shift, -DAY)
        assert server.health()["engine"]["restarts"] == 0
    assert server.process.returncode == 0


def _replace(file: Path, value: float) -> None:
    """In one go: the server reads it at any time."""
    fresh = file.with_suffix(".new")
    fresh.write_text(str(value))
    fresh.replace(file)


# --- Retry-After -------------------------------------------------------------------------------------------------


class Told(Protocol):
    """What a response says before its body."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...


class Tries:
    """When the official client asked, and what it was told: its own retries, seen from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answers: list[tuple[float, int, float]] = []
        """Seconds, status and Retry-After of each answer."""

    def __call__(self, response: Told) -> None:
        with self._lock:
            wait = float(response.headers.get("retry-after", 0))
            self.answers.append((time.monotonic(), response.status_code, wait))


def retrying(server: Server, tries: Tries) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(event_hooks={"response": [tries]}, timeout=30)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20, http_client=http)


def check_waits(tries: Tries, refusal: int) -> None:
    *refused, last = tries.answers
    assert refused
    assert last[1] == 200
    for (at, status, wait), (then, *_) in zip(refused, [*refused[1:], last], strict=True):
        assert status == refusal
        assert wait >= 1
        assert then - at >= wait * 0.95, "the client came back earlier than it was told"


def test_a_predicted_wait_is_a_429_that_clients_obey(start_server: StartServer) -> None:
    """(B4, B10) The engine says how long the queue is; longer than the queue's time-out is refused at once, with the
    difference as Retry-After."""
    with start_server("slow=0.01,wait=7", "queue_timeout", "5") as server, server.client() as client:
        running = client.completions.create(model="test-model", prompt=[A], max_tokens=100, stream=True)
        next(running)
        server.wait_until(lambda health: health["engine"]["wait_seconds"] > 0)
        tries = Tries()
        with retrying(server, tries) as second:
            answer = second.completions.create(model="test-model", prompt="ab", max_tokens=2)
        assert answer.choices[0].text == "ab"
        check_waits(tries, 429)
        assert tries.answers[0][2] == 2
        assert len(list(running)) == 99


def test_a_full_house_is_a_429_that_clients_obey(start_server: StartServer) -> None:
    with start_server("slow=0.01,rows=1", "max_waiting", "1") as server, server.client() as client:
        streams = [client.completions.create(model="test-model", prompt=[A], max_tokens=100, stream=True) for _ in "ab"]
        tries = Tries()
        with retrying(server, tries) as second:
            answer = second.completions.create(model="test-model", prompt="ab", max_tokens=2)
        assert answer.choices[0].text == "ab"
        check_waits(tries, 429)
        for stream in streams:
            assert len(list(stream)) == 100


def test_a_restart_is_a_503_that_clients_obey(start_server: StartServer) -> None:
    with start_server("load=0.5") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for_line("engine lost")
        tries = Tries()
        with retrying(server, tries) as client:
            answer = client.completions.create(model="test-model", prompt="ab", max_tokens=2)
        assert answer.choices[0].text == "ab"
        check_waits(tries, 503)
