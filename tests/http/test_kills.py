"""A real engine is killed while it reads a prompt, while it restores one, and while it draws tokens (A2, L15 to L17).

Whoever waits is told at once, another engine takes over, and what it answers is right.
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from prefix_client import MODEL, settled, until_ssd, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Launch, Server
    from prefix_client import Health

WORDS = "the miller counts sacks of grain while water turns the heavy wheel below"
ANSWER_SECONDS = 60


def body(**more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": f"{WORDS} " * 60, "temperature": 0, "max_tokens": 8, **more}


def ask(server: Server, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(**more), timeout=ANSWER_SECONDS, verify=False)


def killed_when(server: Server, condition: Callable[[Health], bool], **more: object) -> None:
    """Ask, kill the engine as soon as the condition holds, and see that the answer is an error and the engine back."""
    with ThreadPoolExecutor(1) as pool:
        victim = server.engine_pid()
        asked = pool.submit(ask, server, **more)
        wait_until(server, condition)
        os.kill(victim, signal.SIGKILL)
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_died")
    wait_until(server, lambda health: health["status"] == "ok")  # type: ignore[comparison-overlap]
    assert server.engine_pid() != victim


@pytest.mark.slow
@pytest.mark.models
def test_killed_while_it_reads_restores_and_draws(smollm2_folder: Path, tmp_path: Path, launch: Launch) -> None:
    flags = ["--cache-dir", str(tmp_path / "cache"), "--cache-ssd", "1GB", "--ssd-policy", "all", "--ssd-min-free", "0"]
    command = [sys.executable, "-m", "millpond.cli.main", "serve", str(smollm2_folder), "--model-name", MODEL]
    with launch([*command, "--port", "0", *flags]) as server:
        killed_when(server, lambda health: health["prefix_cache"]["ram_blocks"] > 2)
        right = ask(server).json()["choices"][0]["text"]
        settled(server)
        until_ssd(server, lambda figures: figures["writes"] >= 10)
        killed_when(server, lambda health: health["engine"]["running"] > 0, max_tokens=400, ignore_eos=True)
        # Restoring takes some tenths of a second: the kill falls into it, or into the first steps behind it.
        killed_when(server, lambda health: health["requests"]["running"] > 0, max_tokens=100, ignore_eos=True)
        again = ask(server).json()
        assert again["choices"][0]["text"] == right
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert settled(server)["engine"]["restarts"] == 3


SHAPES: tuple[dict[str, object], ...] = (
    {"structured_outputs": {"regex": "[a-z ]{300,}"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "minItems": 90}}}},
    {"structured_outputs": {"choice": ["yes " * 60, "no " * 60]}},
    {"ignore_eos": True},
)


@pytest.mark.slow
@pytest.mark.models
def test_killed_while_it_follows_grammars(smollm2_folder: Path, launch: Launch) -> None:
    """(M3, L16) The next engine compiles them anew, and each answer is what it would have been."""
    command = [sys.executable, "-m", "millpond.cli.main", "serve", str(smollm2_folder), "--model-name", MODEL]
    with launch([*command, "--port", "0"]) as server, ThreadPoolExecutor(len(SHAPES)) as pool:

        def asked(most: int) -> list[httpx.Response]:
            found = [
                pool.submit(ask, server, max_tokens=most, temperature=0.8, seed=number, prompt=WORDS, **shape)
                for number, shape in enumerate(SHAPES)
            ]
            return [answer.result() for answer in found]

        before = [answer.json()["choices"][0]["text"] for answer in asked(40)]
        victim = server.engine_pid()
        dying = [pool.submit(ask, server, max_tokens=300, prompt=WORDS, **shape) for shape in SHAPES]
        wait_until(server, lambda health: health["engine"]["running"] == len(SHAPES))
        os.kill(victim, signal.SIGKILL)
        for answer in dying:
            assert answer.result().json()["error"]["code"] == "engine_died"
        wait_until(server, lambda health: health["status"] == "ok")  # type: ignore[comparison-overlap]
        assert [answer.json()["choices"][0]["text"] for answer in asked(40)] == before
