"""Models with recurrent layers, and with several caches in a layer, behind a real server that is killed (F1, N2)."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from architectures import folders
from prefix_client import MODEL, complete, story, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from conftest import Launch, Server
    from prefix_client import Answer

pytestmark = pytest.mark.models

KINDS = ("qwen3_5", "lfm2", "nemotron_h", "kimi_linear", "falcon_h1", "deepseek_v32")
PROMPTS = [story(topic, sentences) for topic, sentences in (("Ship", 5), ("Barge", 9), ("Raft", 14))]


def dressed(name: str, demo: Path, folder: Path) -> Path:
    """A small model with the demo's tokenizer."""
    size = json.loads((demo / "config.json").read_text())["vocab_size"]
    folders.save(name, folder, folders.with_vocabulary(folders.config_of(name), size))
    for file in demo.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors" and "index" not in file.name:
            (folder / file.name).symlink_to(file)
    return folder


def ask(server: Server) -> list[Answer]:
    """All prompts at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: complete(server, prompt, max_tokens=24, ignore_eos=True), PROMPTS))


def until_saved(server: Server) -> None:
    wait_until(server, lambda health: bool(health["prefix_cache"]) and not health["prefix_cache"]["saving_records"])


def whole(answers: Sequence[Answer]) -> list[int]:
    return [answer.prompt_tokens - 1 for answer in answers]


@pytest.mark.often("qwen3_5")
@pytest.mark.parametrize("name", KINDS)
def test_what_a_killed_server_had_read_is_read_no_more(
    name: str, smollm2_folder: Path, millpond: Launch, tmp_path: Path
) -> None:
    """Cold, warm, and after kill -9 of the engine and then of both processes; with draft tokens, in the batch."""
    folder = dressed(name, smollm2_folder, tmp_path / "model")
    flags = ["--cache-dir", str(tmp_path / "cache"), "--cache-ssd", "2GB", "--ssd-min-free", "0", "--ssd-policy", "all"]
    command = ["serve", str(folder), "--port", "0", "--model-name", MODEL, "--spec", "ngram", *flags]
    with millpond(command) as server:
        listed = httpx.get(f"{server.url}/v1/models", verify=False).json()["data"][0]
        assert listed["millpond"]["lane"] == "slots"
        cold = ask(server)
        assert [answer.cached for answer in cold] == [0, 0, 0]
        warm = ask(server)
        assert [answer.cached for answer in warm] == whole(cold)
        until_saved(server)
        restarts = server.health()["engine"]["restarts"]
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(server, lambda health: health["engine"]["restarts"] == restarts + 1 and not health["reasons"])
        revived = ask(server)
        assert [answer.cached for answer in revived] == whole(cold)
        assert any(answer.disk for answer in revived)
        until_saved(server)
        engine = server.engine_pid()
        server.process.kill()
        os.kill(engine, signal.SIGKILL)
        server.process.wait()
    with millpond(command) as server:
        restarted = ask(server)
        assert [answer.cached for answer in restarted] == whole(cold)
    texts = [answer.text for answer in cold]
    for later in (warm, revived, restarted):
        assert [answer.text for answer in later] == texts
