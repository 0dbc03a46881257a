"""A model is replaced by another in a running front end, and nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import weakref
from collections.abc import Awaitable
from pathlib import Path

import httpx
import pytest
import tiny_models
from in_process import scripted, served, serving
from waiting import run

from millpond import wire
from millpond.client import EngineClient, EngineUnavailable
from millpond.client.start import engine_client, start_message
from millpond.config import ServeConfig
from millpond.text.tokenizer import Tokenizer, TokenizerError

REPLACING = "the server is replacing its model"


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer)


def ask(http: httpx.AsyncClient, prompt: list[int], max_tokens: int = 4, model: str = "") -> Awaitable[httpx.Response]:
    return http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": max_tokens})


def real(folder: Path) -> EngineClient:
    config = ServeConfig(cache_ssd=0, kv_memory_mb=16)
    return engine_client(config, start_message(config, str(folder), "", "tiny"))


def used() -> tuple[int, int]:
    """Open files of this process, sockets among them, and tasks."""
    return len(list(Path("/dev/fd").iterdir())), len(asyncio.all_tasks())


@pytest.mark.often("scripted")
@pytest.mark.parametrize("kind", ["scripted", "real"])
def test_nothing_of_the_old_model_stays(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    if kind == "real":
        tiny_models.save("llama", tmp_path)

    def engine() -> EngineClient:
        return real(tmp_path) if kind == "real" else scripted("slow=0.01")

    async def test() -> None:
        async with serving(served("old", engine(), lambda: tokenizer)) as (http, front):
            before, pid = used(), front.model.client.pid
            gone = [weakref.ref(front.model), weakref.ref(front.model.client), weakref.ref(front.model.meters)]
            running = asyncio.create_task(ask(http, [65, 66], 60))
            while not front.model.client.open_requests:
                await asyncio.sleep(0.01)
            replacing = asyncio.create_task(front.replace(served("new", engine(), lambda: tokenizer), 30))
            await asyncio.sleep(0)
            refused, ready, health = await asyncio.gather(ask(http, [65]), http.get("/readyz"), http.get("/health"))
            assert (refused.status_code, refused.json()["error"]["message"]) == (503, REPLACING)
            assert (ready.status_code, ready.json()["reasons"]) == (503, [REPLACING])
            assert (health.status_code, health.json()["status"]) == (503, "stopped")
            assert (await running).status_code == 200  # it was drained
            await replacing
            assert (await ask(http, [65, 66], model="old")).status_code == 404
            answer = (await ask(http, [65, 66], 5, model="new")).json()
            assert (answer["model"], answer["usage"]["completion_tokens"]) == ("new", 5)
            del running, replacing
            gc.collect()
            assert [each() for each in gone] == [None] * 3
            assert all(now <= then for now, then in zip(used(), before, strict=True))
            with pytest.raises(ProcessLookupError):
                os.kill(pid or 0, 0)

    run(test)


def test_what_outlasts_the_drain_ends_with_an_error(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with serving(served("old", scripted("plain"), lambda: tokenizer)) as (http, front):
            running = asyncio.create_task(ask(http, [903]))
            while not front.model.client.open_requests:
                await asyncio.sleep(0.01)
            await front.replace(served("new", scripted("plain"), lambda: tokenizer), 0.1)
            answer = await running
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == f"{REPLACING} and stopped this request after 0.1 s"
            assert front.held == 0
            assert (await ask(http, [65])).status_code == 200

    run(test)


def unreadable() -> Tokenizer:
    raise TokenizerError("/models/x: tokenizer.json is damaged")


@pytest.mark.parametrize("wrong", ["engine", "command", "tokenizer"])
def test_a_model_that_cannot_be_had_says_so_and_may_be_replaced(tokenizer: Tokenizer, wrong: str) -> None:
    broken, error, said = {
        "engine": (
            lambda: served("x", scripted("fatal"), lambda: tokenizer),
            EngineUnavailable,
            "model_type 'nonsense'",
        ),
        "command": (
            lambda: served("x", no_command(), lambda: tokenizer),
            OSError,
            "could not be started: No such file",
        ),
        "tokenizer": (lambda: served("x", scripted("plain"), unreadable), TokenizerError, "tokenizer.json is damaged"),
    }[wrong]

    async def test() -> None:
        async with serving(served("old", scripted("plain"), lambda: tokenizer)) as (http, front):
            lost = asyncio.create_task(front.lost())
            with pytest.raises(error):
                await front.replace(broken(), 5)
            refused = await ask(http, [65])
            assert refused.status_code == 503
            assert said in refused.json()["error"]["message"]
            assert "/models" not in refused.text
            await front.replace(served("new", scripted("plain"), lambda: tokenizer), 5)
            assert (await ask(http, [65])).status_code == 200
            assert not lost.done()  # nobody has to end the server for it
            os.kill(front.model.client.pid or 0, signal.SIGKILL)
            assert "SIGKILL" in await lost

    run(test)


def no_command() -> EngineClient:
    return EngineClient(wire.Start(model_path="plain", max_batch=8, max_itl_ms=400), command=("/nowhere/engine",))


def test_a_stop_meanwhile_leaves_no_engine(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with serving(served("old", scripted("plain"), lambda: tokenizer)) as (_, front):
            slow = served("new", scripted("load=30"), lambda: tokenizer)
            replacing = asyncio.create_task(front.replace(slow, 5))
            while slow.client.stage is None:
                await asyncio.sleep(0.01)
            pid = slow.client.pid
            await front.stop()
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await replacing
            with pytest.raises(ProcessLookupError):
                os.kill(pid or 0, 0)
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await front.replace(served("newer", scripted("plain"), lambda: tokenizer), 5)

    run(test)
