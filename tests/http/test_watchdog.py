"""Engines that hang, die again and again, or are merely slow; and how the server stops."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from prefix_client import MODEL, complete, story, wait_until

from millpond.client.watchdog import LEAST_SILENCE, Watchdog
from millpond.wire import Beat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server, StartServer

A, B = 64, 65
SILENT, KILLED, STOPPED = 903, 904, 906
STALL = ("stall_timeout", "1.5")


# --- the rule -----------------------------------------------------------------------------------------------------


@dataclass
class Time:
    """A clock that is set by hand."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def beat(step: int, running: int = 0, waiting: int = 0) -> Beat:
    return Beat(step=step, running=running, waiting=waiting, kv_bytes=0)


def told(watchdog: Watchdog, clock: Time, seconds: float, *, steps: float, running: int = 1, opened: int = 1) -> None:
    """So many seconds of beats, twice a second, with so many steps in each second."""
    start, first = clock.now, watchdog._step  # the step that was told last is where the engine goes on
    while clock.now < start + seconds:
        clock.now += 0.5
        watchdog.beat(beat(first + int((clock.now - start) * steps), running), opened)


def test_work_without_a_step_is_a_hang_and_idleness_is_none() -> None:
    clock = Time()
    watchdog = Watchdog(10.0, clock)
    told(watchdog, clock, 500, steps=0, running=0, opened=0)
    assert not watchdog.verdict()
    told(watchdog, clock, 9, steps=0)
    assert not watchdog.verdict()
    assert watchdog.stuck_seconds >= 9
    told(watchdog, clock, 2, steps=0)
    assert "no step" in watchdog.verdict()


def test_a_hang_in_the_first_step_after_idleness_is_seen() -> None:
    """The engine has not reported the request it hangs in: its beats go on saying that there is nothing to do."""
    clock = Time()
    watchdog = Watchdog(10.0, clock)
    told(watchdog, clock, 50, steps=0, running=0, opened=0)
    told(watchdog, clock, 11, steps=0, running=0, opened=1)
    assert "no step" in watchdog.verdict()


def test_slow_steps_are_steps() -> None:
    clock = Time()
    watchdog = Watchdog(10.0, clock)
    told(watchdog, clock, 300, steps=0.2)
    assert not watchdog.verdict()


def test_silence_is_a_hang_also_without_work() -> None:
    clock = Time()
    watchdog = Watchdog(10.0, clock)
    told(watchdog, clock, 5, steps=0, running=0, opened=0)
    clock.now += 11
    assert "not been heard of" in watchdog.verdict()
    watchdog.pardon()
    assert not watchdog.verdict()


@pytest.mark.parametrize("patience", [0.05, 0.4])
def test_patience_shorter_than_a_beat_kills_no_working_engine(patience: float) -> None:
    """Beats come twice a second; what has not been told yet may have happened."""
    clock = Time()
    watchdog = Watchdog(patience, clock)
    for _ in range(50):
        told(watchdog, clock, 0.5, steps=4)
        clock.now += 0.49
        assert not watchdog.verdict()
    clock.now += LEAST_SILENCE
    assert watchdog.verdict()


def test_zero_patience_finds_nothing_wrong() -> None:
    clock = Time()
    watchdog = Watchdog(0.0, clock)
    told(watchdog, clock, 1000, steps=0)
    clock.now += 1000
    assert not watchdog.verdict()


# --- real processes ---------------------------------------------------------------------------------------------


def restarted(server: Server, times: int) -> None:
    server.wait_until(
        lambda health: health["engine"]["restarts"] == times and health["status"] == "ok"  # type: ignore[comparison-overlap]
    )


def answers(server: Server) -> None:
    with server.client() as client:
        answer = client.with_options(max_retries=50).completions.create(model="test-model", prompt="ab", max_tokens=4)
    assert answer.choices[0].text == "abab"


def post(server: Server, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 400, **body}, timeout=60, verify=False)


@pytest.mark.parametrize(
    ("script", "prompt", "says"),
    [
        ("slow=0.01", [A, B, STOPPED], "not been heard of"),
        ("slow=0.01", [A, B, SILENT], "no step"),
        ("slow=0.01,mute", [A, B, SILENT], "no step"),
    ],
    ids=["stopped process", "hanging thread", "hanging thread that reports no work"],
)
def test_an_engine_that_hangs_is_killed_and_everybody_is_told(
    start_server: StartServer, script: str, prompt: list[int], says: str
) -> None:
    """(A2, K2) Streams get an error event, whole answers a 500, and the next engine answers."""
    with start_server(script, *STALL) as server, server.client() as client:
        engine = server.engine_pid()
        stream = client.completions.create(model="test-model", prompt=prompt, max_tokens=400, stream=True)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(post, server, prompt=[SILENT])
            with pytest.raises(openai.APIError, match="died"):
                list(stream)
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (500, "engine_died")
        assert says in server.wait_for_line("engine stalled")
        answers(server)
        restarted(server, 1)
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)
        assert server.health()["requests"]["held"] == 0


def test_an_idle_engine_is_stopped_too_but_never_for_being_idle(start_server: StartServer) -> None:
    """(K2) Several times the patience pass without work: nothing happens. Then it stops saying anything."""
    with start_server("plain", *STALL) as server:
        engine = server.engine_pid()
        time.sleep(5.0)  # three times the patience
        assert server.engine_pid() == engine
        assert server.health()["engine"]["restarts"] == 0
        os.kill(engine, signal.SIGSTOP)
        server.wait_for_line("engine stalled")
        answers(server)


def test_a_slow_engine_is_left_alone(start_server: StartServer) -> None:
    """A token every half second for several times the patience."""
    with start_server("slow=0.5", *STALL) as server:
        assert post(server, prompt=[A], max_tokens=9).json()["usage"]["completion_tokens"] == 9
        assert server.health()["engine"]["restarts"] == 0


class Comments:
    """A stream that is read beside the test; counts the comments in it."""

    def __init__(self, server: Server, prompt: list[int]) -> None:
        self.count = 0
        self.error = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(server, prompt))
        self._thread.start()

    def _read(self, server: Server, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                with self._changed:
                    self.count += line.startswith(":")
                    self.error = line if "error" in line else self.error
                    self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, 30), self.count

    def end(self) -> str:
        self._thread.join(60)
        return self.error


@pytest.mark.often("in the middle")
@pytest.mark.parametrize("prompt", [[A, SILENT], [SILENT]], ids=["in the middle", "before the first token"])
def test_comments_come_while_steps_do(start_server: StartServer, prompt: list[int]) -> None:
    """Silent streams are kept alive as long as the engine works, on whatever, and fall silent with it."""
    with start_server("slow=0.02", "keepalive", "0.2", "stall_timeout", "0", "token_timeout", "0") as server:
        silent = Comments(server, prompt)
        assert post(server, prompt=[A], max_tokens=100).status_code == 200
        silent.wait_for(3)
        time.sleep(1.0)  # the beat and the comment that the last steps earned may still come
        steps, after = server.health()["engine"]["step"], silent.count
        time.sleep(1.5)  # many keepalive times
        assert silent.count == after
        assert server.health()["engine"]["step"] == steps
        assert post(server, prompt=[A], max_tokens=20).status_code == 200
        silent.wait_for(after + 1)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert "engine_died" in silent.end()


def test_headers_that_go_out_with_a_comment_claim_nothing(start_server: StartServer) -> None:
    """The prompt has not been begun: what the prefix cache will do for it is not known."""
    with start_server("slow=0.02,queue=0", "keepalive", "0.2") as server, ThreadPoolExecutor(1) as pool:
        other = pool.submit(post, server, prompt=[A], max_tokens=100)
        body = {"prompt": [907], "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            assert next(answer.iter_lines()).startswith(":")
            assert "x-millpond-prefix-cache" not in answer.headers
        assert "x-millpond-prefix-cache" in other.result().headers


def test_too_many_deaths_end_the_server_and_it_says_why(start_server: StartServer) -> None:
    """(A2) Two restarts are allowed; the third death ends it with a status and a reason, and nobody is left waiting."""
    with start_server("slow=0.01", "max_restarts", "2") as server:
        for times in (1, 2):
            assert post(server, prompt=[KILLED]).status_code == 500
            restarted(server, times)
        with ThreadPoolExecutor(4) as pool:
            whole = [pool.submit(post, server, prompt=[A, SILENT], n=2) for _ in range(2)]
            streams = [pool.submit(post, server, prompt=[A, SILENT], stream=True) for _ in range(2)]
            server.wait_until(lambda health: health["engine"]["running"] == 6)
            os.kill(server.engine_pid(), signal.SIGKILL)
            for answer in whole:
                assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (500, "engine_died")
            for answer in streams:
                assert '"engine_died"' in answer.result().text
                assert "[DONE]" not in answer.result().text
        assert server.process.wait(20) == 1
        assert "SIGKILL (3 deaths within 600 s)" in server.wait_for_line("millpond serve:")


def test_no_restart_at_all_may_be_asked_for(start_server: StartServer) -> None:
    with start_server("plain", "max_restarts", "0") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(20) == 1


# --- stop -------------------------------------------------------------------------------------------------------


def stopped_within(server: Server, number: signal.Signals) -> tuple[int, float]:
    begun = time.monotonic()
    server.process.send_signal(number)
    status = server.process.wait(60)
    return status, time.monotonic() - begun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(start_server: StartServer, number: signal.Signals) -> None:
    """(A3) With connections open that nobody uses, too."""
    with start_server("plain") as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/livez").status_code == 200
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port or 0)):
            status, seconds = stopped_within(server, number)
    print(f"exit {seconds:.2f} s after {number.name}")
    assert status == 0
    assert seconds < 10


def test_a_stop_with_requests_that_nobody_began(start_server: StartServer) -> None:
    """(A3) Queued, being read and being drawn: each gets its error within the deadline, none hangs."""
    with start_server("slow=0.01,queue=0", "drain_seconds", "0.5") as server, ThreadPoolExecutor(6) as pool:
        queued = [pool.submit(post, server, prompt=[907], stream=stream) for stream in (False, True)]
        reading = [pool.submit(post, server, prompt=[SILENT], stream=stream) for stream in (False, True)]
        drawing = [pool.submit(post, server, prompt=[A, SILENT], stream=stream) for stream in (False, True)]
        server.wait_until(lambda health: health["engine"]["running"] == 6)
        status, seconds = stopped_within(server, signal.SIGTERM)
        for answer in (*queued, *reading, drawing[0]):
            assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "unavailable")
        assert '"unavailable"' in drawing[1].result().text
    assert status == 0
    assert seconds < 0.5 + 10


@pytest.fixture
def busy(start_server: StartServer) -> Iterator[Server]:
    with start_server("slow=0.01,deaf", "drain_seconds", "3600") as server:
        yield server


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_takes_the_engine_along(busy: Server, second: signal.Signals) -> None:
    """(A3) Also an engine that listens to nothing."""
    engine = busy.engine_pid()
    with busy.client() as client:
        stream = client.completions.create(model="test-model", prompt=[A, SILENT], max_tokens=60, stream=True)
        next(stream)
        busy.process.send_signal(signal.SIGTERM)
        busy.wait_for_line("stopping")
        status, _ = stopped_within(busy, second)
    assert status == 128 + second
    gone = time.monotonic() + 10
    while time.monotonic() < gone:
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            return
    pytest.fail("the engine outlived its server")


@pytest.mark.models
def test_a_stop_with_work_and_writes_under_way_loses_no_block(
    launch: Launch, millpond: Launch, smollm2_folder: Path, tmp_path: Path
) -> None:
    """(A3; L: stop with work queued, running, disk writes pending) Exit code 0 in time, everybody has got an answer
    or an error, and what was computed is on disk: the next server finds the whole prompt."""
    flags = ["--cache-dir", str(tmp_path), "--cache-ssd", "2GB", "--ssd-min-free", "0", "--ssd-policy", "all"]
    command = ["serve", str(smollm2_folder), "--port", "0", "--model-name"]
    command += [MODEL, "--max-batch", "1", "--ssd-durability", "durable", "--drain-seconds", "1", *flags]
    prompt = story("Ketch", 60)
    body = {"prompt": prompt, "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
    with launch([sys.executable, "-m", "millpond.cli.main", *command]) as server, ThreadPoolExecutor(3) as pool:
        running = pool.submit(post, server, **body, stream=True)
        wait_until(server, lambda health: health["engine"]["running"] == 1)
        queued = [pool.submit(post, server, **body | {"prompt": word}, stream=word == "b") for word in "ab"]
        wait_until(server, lambda health: health["engine"]["waiting"] == 2)
        status, seconds = stopped_within(server, signal.SIGTERM)
        assert '"unavailable"' in running.result().text
        assert "[DONE]" not in running.result().text
        for answer in queued:
            assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "unavailable")
    print(f"exit {seconds:.2f} s after SIGTERM with a drain of 1 s")
    assert status == 0
    assert seconds < 1 + 10
    with millpond(command) as server:
        again = complete(server, prompt)
    assert again.prompt_tokens > 600
    assert again.disk >= again.prompt_tokens // 64 * 64 - 64
