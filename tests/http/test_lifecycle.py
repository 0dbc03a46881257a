"""Start, loss of clients, loss of the engine, full queue, and stop: whole processes and real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server, StartServer

ENDLESS = [64, 65, 66]


@pytest.fixture(scope="module")
def slow(start_server: StartServer) -> Iterator[Server]:
    """One server that takes its time, for the tests that leave it running."""
    with start_server("slow=0.02") as server:
        yield server


def stream_until(server: Server, pieces: int) -> None:
    """Read some of an endless stream, then hang up."""
    with server.client() as client:
        stream = client.completions.create(model="test-model", prompt=ENDLESS, max_tokens=400, stream=True)
        for number, _ in enumerate(stream):
            if number == pieces:
                stream.close()
                return


def idle(health: dict[str, dict[str, int]]) -> bool:
    return health["engine"]["running"] == 0 and health["requests"]["held"] == 0


def test_disconnects_cancel_the_work(slow: Server) -> None:
    before = slow.health()["requests"]["cancelled"]
    stream_until(slow, 2)
    assert slow.wait_until(idle)["requests"]["cancelled"] == before + 1
    with httpx.Client(base_url=slow.url, timeout=0.3) as raw:
        with pytest.raises(httpx.ReadTimeout):
            raw.post("/v1/completions", json={"model": "", "prompt": [903], "max_tokens": 400})
        with pytest.raises(httpx.ReadTimeout):
            raw.post("/v1/completions", json={"prompt": [903], "n": 3, "stream": True})
    assert slow.wait_until(idle)["requests"]["cancelled"] == before + 5
    assert slow.wait_for_line("client=gone")


def test_livez_answers_and_work_is_refused_while_the_model_loads(start_server: StartServer) -> None:
    with start_server("load=2", ready=False) as server, httpx.Client(base_url=server.url, timeout=20) as raw:
        while raw.get("/health").json()["engine"]["stage"] is None:
            pass
        assert raw.get("/livez").status_code == 200
        ready = raw.get("/readyz")
        assert ready.status_code == 503
        assert any("loading" in reason for reason in ready.json()["reasons"])
        refused = raw.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "unavailable"
        assert raw.get("/health").json()["status"] == "starting"
        server.wait_for_line("ready api=")
        assert raw.get("/readyz").status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(start_server: StartServer) -> None:
    with start_server("fatal", ready=False) as server:
        assert server.process.wait(20) == 1
        assert "model_type 'nonsense' is not supported" in server.wait_for_line("millpond serve:")


def test_killed_engine_during_eight_streams(slow: Server) -> None:
    """Every client gets its error soon, readiness goes and comes back, and the server answers again."""

    async def read(stream: openai.AsyncStream[openai.types.Completion], begun: asyncio.Semaphore) -> None:
        async for _ in stream:
            begun.release()

    async def consume(client: openai.AsyncOpenAI, begun: asyncio.Semaphore) -> float:
        stream = await client.completions.create(model="test-model", prompt=ENDLESS, max_tokens=400, stream=True)
        with pytest.raises(openai.APIError, match="died"):
            await read(stream, begun)
        return time.monotonic()

    async def test(server: Server) -> None:
        async with server.async_client() as client:
            semaphores = [asyncio.Semaphore(0) for _ in range(8)]
            tasks = [asyncio.create_task(consume(client, begun)) for begun in semaphores]
            for begun in semaphores:
                await begun.acquire()
            killed = time.monotonic()
            os.kill(server.engine_pid(), signal.SIGKILL)
            assert max(await asyncio.gather(*tasks)) - killed < 2
            # The client's own retries meet 503 until the engine is back.
            answer = await client.with_options(max_retries=50).completions.create(
                model="test-model", prompt="ab", max_tokens=4
            )
            assert answer.choices[0].text == "abab"

    before = slow.health()
    asyncio.run(test(slow))
    after = slow.wait_until(idle)
    assert after["engine"]["restarts"] == before["engine"]["restarts"] + 1
    assert after["requests"]["failed"] == before["requests"]["failed"] + 8


def test_engine_death_before_the_first_byte_is_a_500(slow: Server) -> None:
    with slow.client() as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(model="test-model", prompt=[904], stream=True)
        assert failed.value.status_code == 500
        assert failed.value.code == "engine_died"
        again = client.with_options(max_retries=50).completions.create(model="test-model", prompt="a", max_tokens=1)
        assert again.choices[0].text == "a"


def test_a_full_queue_is_a_429(start_server: StartServer) -> None:
    async def test(server: Server) -> None:
        async with server.async_client() as client, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(client.completions.create(model="test-model", prompt=[64, 903], stream=True))
                for _ in range(3)
            ]
            streams = [await task for task in tasks]
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(model="test-model", prompt="a")
            assert refused.value.response.headers["retry-after"]
            assert refused.value.code == "queue_full"
            assert (await client.models.list()).data
            for stream in streams:
                await stream.close()

    with start_server("rows=2", "max_waiting", "1") as server:
        asyncio.run(test(server))
        server.wait_until(idle)
        with server.client() as client:
            assert client.completions.create(model="test-model", prompt="a", max_tokens=1).choices


def test_sigterm_drains_and_exits_with_0(start_server: StartServer) -> None:
    """The running answer is finished, new work is refused meanwhile, and nothing is left behind."""
    with start_server("slow=0.02") as server, server.client() as client:
        stream = client.completions.create(model="test-model", prompt="ab", max_tokens=60, stream=True)
        pieces = [next(stream)]
        pid = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("stopping")
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").json()["status"] == "shutting_down"
        pieces += list(stream)
        assert "".join(piece.choices[0].text for piece in pieces) == "ab" * 30
        assert server.process.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_drain_deadline_ends_the_rest_with_an_error(start_server: StartServer) -> None:
    with start_server("plain", "drain_seconds", "0.2") as server, server.client() as client:
        stream = client.completions.create(model="test-model", prompt=[64, 903], max_tokens=60, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.process.wait(20) == 0


def test_a_second_signal_forces_exit(start_server: StartServer) -> None:
    with start_server("plain", "drain_seconds", "3600") as server, server.client() as client:
        stream = client.completions.create(model="test-model", prompt=[64, 903], max_tokens=60, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("stopping")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 128 + signal.SIGTERM


def test_one_log_line_per_request_without_its_text(server: Server) -> None:
    body = {"prompt": "secret-words", "max_tokens": 3, "seed": -1}
    httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "trace-7"})
    line = server.wait_for_line("id=trace-7")
    for part in ("status=200", "prompt_tokens=12", "completion_tokens=3", "cached_tokens=3", f"seed={2**64 - 1}"):
        assert part in line
    assert not any("secret" in line for line in server.lines)


def test_a_port_in_use_is_said_before_anything_loads(server: Server, start_server: StartServer) -> None:
    port = server.url.rsplit(":", 1)[1]
    with start_server("plain", "port", port, ready=False) as second:
        assert second.process.wait(20) == 1
        assert f"--port {port}" in second.wait_for_line("cannot listen")
