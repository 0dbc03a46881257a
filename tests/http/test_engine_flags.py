"""The whole command on tiny models: settings of the engine change what it does, wherever they come from."""

from __future__ import annotations

import json
import queue
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx
import pytest
import tiny_models

from millpond import wire
from millpond.config import read_config
from millpond.engine import boot
from millpond.engine.link import Inbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Launch, Server

    from millpond.engine.link import FrontEndLink
    from millpond.schedule.scheduler import Limits

KEY = "environment-key-0123456789"
PROMPT = 250
"""Tokens of a test prompt: four blocks, almost."""


@pytest.fixture(scope="module")
def folder(byte_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.save("llama", tmp_path_factory.mktemp("flags") / "tiny-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_tokenizer / name, made / name)
    return made


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "millpond.cli.main", "serve", str(folder), "--port", "0", *flags]


@pytest.fixture(scope="module")
def plain(folder: Path, launch: Launch) -> Iterator[Server]:
    """Everything as it is by default, but for the memory."""
    with launch(command(folder, "--kv-memory-mb", "1")) as server:
        yield server


@pytest.fixture(scope="module")
def told(folder: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Told by flags, variables and a file, each overruled once."""
    file = tmp_path_factory.mktemp("config") / "millpond.toml"
    file.write_text(
        'context-length = 300\nmax_batch = 7\nmax_waiting = 1\nlog_format = "json"\nmodel_name = "from-file"\n'
    )
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MILLPOND_CONFIG", str(file))
            patch.setenv("MILLPOND_API_KEY", KEY)
            patch.setenv("MILLPOND_MAX_BATCH", "2")
            patch.setenv("MILLPOND_PREFILL_CHUNK", "128")
            flags = ["--prefill-chunk", "64", "--model-name", "from-flag"]
            server = stack.enter_context(launch(command(folder, *flags), ready=False))
        server.wait_for_line('"message": "ready"')
        yield server


def client_of(server: Server) -> httpx.Client:
    match = re.search(r"http://[\d.]+:\d+", server.wait_for_line("listening"))
    assert match is not None
    return httpx.Client(base_url=match[0], timeout=60, headers={"authorization": f"Bearer {KEY}"})


def steps_for(client: httpx.Client, first: int) -> int:
    """How many steps the engine makes for one new prompt that is answered with one token."""

    def step() -> int:
        while True:
            engine = client.get("/health").json()["engine"]
            if engine["running"] == engine["waiting"] == 0:
                return int(engine["step"])

    before = step()
    prompt = [first, *((first + 7 * i) % 250 for i in range(1, PROMPT))]
    client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).raise_for_status()
    while (after := step()) == before:
        continue
    return after - before


def test_settings_from_all_sources_reach_the_engine(told: Server, plain: Server, folder: Path) -> None:
    """(J1, J2) Name, context, rows: what the clients are shown, and what they are refused."""
    with client_of(told) as client, client_of(plain) as other:
        [shown], [usual] = (each.get("/v1/models").json()["data"] for each in (client, other))
        assert (shown["id"], usual["id"]) == ("from-flag", folder.name)
        assert shown["max_model_len"] == 300
        assert (shown["millpond"]["max_rows"], usual["millpond"]["max_rows"]) == (2, 32)
        ask = {"model": "from-flag", "prompt": "ab", "max_tokens": 4}
        assert client.post("/v1/completions", json=ask).status_code == 200
        assert other.post("/v1/completions", json=ask).status_code == 404
        assert client.post("/v1/completions", json={**ask, "max_tokens": 299}).json()["error"]["param"] == "max_tokens"
        assert len(client.post("/v1/completions", json={**ask, "n": 3}).json()["choices"]) == 3
        assert "at most 3" in client.post("/v1/completions", json={**ask, "n": 4}).json()["error"]["message"]
        assert client.get("/v1/models", headers={"authorization": "Bearer nobody"}).status_code == 401


def test_prefill_chunk_cuts_prompts(told: Server, plain: Server) -> None:
    """(J1) Four forwards of up to 64 tokens instead of one."""
    with client_of(told) as client, client_of(plain) as other:
        assert steps_for(client, 1) >= 4
        assert steps_for(other, 1) < 4


def test_little_kv_memory_means_a_shorter_context(plain: Server) -> None:
    """(J1)"""
    with client_of(plain) as client:
        assert 256 <= client.get("/v1/models").json()["data"][0]["max_model_len"] < tiny_models.CONTEXT


def test_both_processes_write_json(told: Server) -> None:
    """(K3, J1) Every line, to the last one; and no key."""
    with client_of(told) as client:
        client.get("/v1/models")
        told.wait_for_line("/v1/models")
        told.wait_for_line("millpond.engine")
    lines = [json.loads(line) for line in told.lines]
    loggers = {line["logger"] for line in lines}
    assert loggers >= {"millpond.serve", "millpond.http"}
    assert any(logger.startswith("millpond.engine") for logger in loggers)
    assert not any("key-0123456789" in line for line in told.lines)


class Caught(Exception):  # noqa: N818 - it carries what was looked for
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits


class NoLink:
    """Hears what the engine says before it runs."""

    inbox: Inbox = queue.SimpleQueue()

    def send(self, message: wire.FromEngine) -> None:
        pass


def test_the_pace_reaches_the_scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(J1) max_itl_ms as the front end sends it; what the scheduler makes of it is proved beside the scheduler."""
    config = read_config({"max_itl_ms": "123.5"}, {})
    start = wire.Start(model_path=str(folder), max_batch=config.max_batch, max_itl_ms=config.max_itl_ms)

    def scheduler(limits: Limits, *_: object) -> None:
        raise Caught(limits)

    monkeypatch.setattr(boot, "Scheduler", scheduler)
    with pytest.raises(Caught) as caught:
        boot.boot(start, "", cast("FrontEndLink", NoLink()))
    assert (caught.value.limits.max_itl_ms, caught.value.limits.max_batch) == (123.5, 32)


def test_deterministic_answers_are_promised_or_refused(folder: Path, launch: Launch) -> None:
    """The promise is told with its price, nothing is guessed, and what cannot be promised is said at start."""
    with launch(command(folder, "--deterministic", "on", "--max-batch", "4")) as server, client_of(server) as client:
        (model,) = client.get("/v1/models").json()["data"]
        told = model["millpond"]
        assert "forwards have " in told["deterministic"]
        assert "times as long as usual" in told["deterministic"]
        assert told["speculation"] == []
        assert "deterministic" in told["speculation_reason"]
        assert sorted(rows for group in told["row_counts_alike"] for rows in group) == [1, 2, 3, 4, 5, 6, 7, 8, 32]
        body = {"prompt": "abc" * 40, "max_tokens": 5, "temperature": 0, "logprobs": 2}
        first, again = (client.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
        assert first == again
    with launch(command(folder, "--deterministic", "on", "--draft-model", "any"), ready=False) as server:
        server.wait_for_line("must be left out when deterministic is on")
