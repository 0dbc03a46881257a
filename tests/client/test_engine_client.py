"""The engine's supervision and streams, against a real process that speaks the wire protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import alive, eventually, run

from millpond import wire
from millpond.client import EngineClient, EngineError, EngineState, EngineUnavailable
from millpond.types import ErrorKind, Finish, Request, SamplingParams

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))


def client_for(script: str) -> EngineClient:
    return EngineClient(wire.Start(model_path=script, max_batch=8, max_itl_ms=400), command=SCRIPTED)


@contextlib.asynccontextmanager
async def engine(script: str = "plain") -> AsyncIterator[EngineClient]:
    client = client_for(script)
    await client.start()
    try:
        await client.settled()
        yield client
    finally:
        await client.stop()


def request(name: str, tokens: list[int], max_tokens: int = 4) -> Request:
    return Request(id=name, tokens=tokens, params=SamplingParams(max_tokens=max_tokens))


def check_counts(client: EngineClient) -> None:
    counts = client.counts
    assert counts.submitted == counts.finished + counts.failed + counts.cancelled + client.open_requests


def test_a_request_streams_to_its_finish() -> None:
    async def test() -> None:
        async with engine() as client:
            assert client.state is EngineState.READY
            assert client.info is not None
            assert client.info.context_length == 512
            deltas = [delta async for delta in client.submit(request("a", [7, 8, 9], 5))]
            assert [token for delta in deltas for token in delta.tokens] == [7, 8, 9, 7, 8]
            assert [delta.finish for delta in deltas] == [None] * 4 + [Finish.LENGTH]
            assert client.counts.finished == 1
            check_counts(client)

    run(test)


def test_many_requests_keep_apart() -> None:
    async def collect(client: EngineClient, number: int) -> list[int]:
        return [token async for delta in client.submit(request(str(number), [number], 9)) for token in delta.tokens]

    async def test() -> None:
        async with engine() as client:
            answers = await asyncio.gather(*(collect(client, number) for number in range(40)))
            assert answers == [[number] * 9 for number in range(40)]

    run(test)


def test_cancel_ends_the_iteration_and_reaches_the_engine() -> None:
    async def test() -> None:
        async with engine("slow=0.01") as client:
            stream = client.submit(request("a", [1, 903], 100))
            assert (await anext(stream)).tokens == [1]
            waiter = asyncio.create_task(anext(stream, None))
            await asyncio.sleep(0)
            stream.cancel()
            stream.cancel()
            assert await waiter is None
            assert client.counts.cancelled == 1
            await eventually(lambda: client.beat is not None and not client.beat.running)
            check_counts(client)

    run(test)


def test_leaving_a_stream_early_cancels_it() -> None:
    async def test() -> None:
        async with engine("slow=0.01") as client:
            async with client.submit(request("a", [1], 400)) as stream:
                async for _ in stream:
                    break
            assert (client.open_requests, client.counts.cancelled) == (0, 1)
            again = [delta async for delta in client.submit(request("b", [1], 2))]
            assert again[-1].finish is Finish.LENGTH

    run(test)


def test_cancel_after_the_end_counts_nothing() -> None:
    async def test() -> None:
        async with engine() as client:
            async with client.submit(request("a", [1], 1)) as stream:
                assert [delta async for delta in stream]
            assert (client.counts.finished, client.counts.cancelled) == (1, 0)

    run(test)


@pytest.mark.parametrize(("token", "kind"), [(900, ErrorKind.ENGINE), (902, ErrorKind.INVALID)])
def test_a_failed_request_raises_and_leaves_the_others(token: int, kind: ErrorKind) -> None:
    async def test() -> None:
        async with engine() as client:
            good, bad = client.submit(request("good", [1], 30)), client.submit(request("bad", [1, token], 30))
            with pytest.raises(EngineError) as caught:
                _ = [delta async for delta in bad]
            assert caught.value.kind is kind
            assert sum(len(delta.tokens) for delta in [delta async for delta in good]) == 30
            check_counts(client)

    run(test)


def test_killed_engine_fails_every_stream_and_comes_back() -> None:
    """Questions about the cache, too."""

    async def consume(client: EngineClient, number: int, seen: asyncio.Queue[int]) -> ErrorKind | None:
        try:
            async for delta in client.submit(request(str(number), [number], 100_000)):
                seen.put_nowait(delta.tokens[0])
        except EngineError as error:
            return error.kind
        return None

    async def test() -> None:
        async with engine("slow=0.01") as client:
            seen: asyncio.Queue[int] = asyncio.Queue()
            question = asyncio.create_task(client.explain([907], ""))
            tasks = [asyncio.create_task(consume(client, number, seen)) for number in range(8)]
            started: set[int] = set()
            while len(started) < 8:
                started.add(await seen.get())
            first = client.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            assert await asyncio.gather(*tasks) == [ErrorKind.DIED] * 8
            with pytest.raises(EngineError) as caught:
                await question
            assert caught.value.kind is ErrorKind.DIED
            with pytest.raises(EngineUnavailable, match=r"restarting"):
                client.submit(request("x", [1]))
            await client.settled()
            assert client.pid != first
            assert client.counts.restarts == 1
            assert [delta async for delta in client.submit(request("x", [1]))][-1].finish is Finish.LENGTH
            check_counts(client)

    run(test)


def test_unreadable_message_replaces_the_engine() -> None:
    async def test() -> None:
        async with engine() as client:
            with pytest.raises(EngineError) as caught:
                _ = [delta async for delta in client.submit(request("a", [905]))]
            assert caught.value.kind is ErrorKind.DIED
            await client.settled()
            assert "cannot be read" in client.reason or client.state is EngineState.READY

    run(test)


def test_fatal_before_ready_is_final_and_says_why() -> None:
    async def test() -> None:
        client = client_for("fatal")
        await client.start()
        pid = client.pid
        assert pid is not None
        with pytest.raises(EngineUnavailable, match=r"model_type 'nonsense'"):
            await client.settled()
        assert not alive(pid)  # it was seen out
        assert client.state is EngineState.FAILED
        assert client.counts.restarts == 0
        await client.gone()
        await client.stop()

    run(test)


def test_crashing_starts_end_after_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.client.engine.FIRST_DELAY", 0.01)

    async def test() -> None:
        client = client_for("crash")
        await client.start()
        with pytest.raises(EngineUnavailable, match=r"exited with status 3 \(5 starts in a row\)"):
            await client.settled()
        assert client.counts.restarts == 4
        await client.stop()

    run(test)


def test_submit_before_ready_is_refused_with_the_stage() -> None:
    async def test() -> None:
        client = client_for("load=30")
        await client.start()
        await eventually(lambda: client.stage is not None)
        with pytest.raises(EngineUnavailable, match=r"loading \(weights, 50%\)"):
            client.submit(request("a", [1]))
        await client.stop()
        assert client.state is EngineState.STOPPED

    run(test)


def test_a_used_id_is_refused() -> None:
    async def test() -> None:
        async with engine() as client:
            client.submit(request("a", [903]))
            with pytest.raises(ValueError, match="in use"):
                client.submit(request("a", [1]))

    run(test)


def test_stop_fails_open_streams_and_ends_the_process() -> None:
    async def test() -> None:
        async with engine() as client:
            pid = client.pid
            assert pid is not None
            stream = client.submit(request("a", [903]))
            waiter = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            await client.stop()
            await client.stop()
            with pytest.raises(EngineError, match="shutting down") as caught:
                await waiter
            assert caught.value.kind is ErrorKind.UNAVAILABLE
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            with pytest.raises(EngineUnavailable):
                client.submit(request("b", [1]))

    run(test)


def test_stop_ends_an_engine_that_does_not_listen() -> None:
    async def test() -> None:
        client = client_for("deaf")
        await client.start()
        await client.settled()
        pid = client.pid
        assert pid is not None
        await client.stop(patience=0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test)


def test_stop_during_back_off() -> None:
    async def test() -> None:
        client = client_for("crash")
        await client.start()
        await eventually(lambda: client.state is EngineState.RESTARTING)
        await client.stop()
        assert client.state is EngineState.STOPPED

    run(test)


def test_stop_before_start() -> None:
    async def test() -> None:
        client = client_for("plain")
        await client.stop()
        assert client.state is EngineState.STOPPED

    run(test)


def test_front_end_death_ends_the_engine(tmp_path: Path) -> None:
    """A front end that is killed cannot say goodbye: the engine has to notice the closed socket."""
    program = tmp_path / "front.py"
    program.write_text(
        "import asyncio, sys\n"
        "from millpond import wire\n"
        "from millpond.client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(wire.Start(model_path='plain', max_batch=8, max_itl_ms=400), command=sys.argv[1:])\n"
        "    await client.start()\n"
        "    await client.settled()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def test() -> None:
        front = await asyncio.create_subprocess_exec(
            sys.executable, str(program), *SCRIPTED, stdout=asyncio.subprocess.PIPE
        )
        assert front.stdout is not None
        engine_pid = int(await front.stdout.readline())
        assert alive(engine_pid)
        front.kill()
        await front.wait()
        await eventually(lambda: not alive(engine_pid))

    run(test)
