"""(M10) The lines that start coding agents: what `millpond agents` and a server's start print can be pasted."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from millpond.cli.agents import lines

if TYPE_CHECKING:
    from conftest import Server, StartServer

SERVER = str(Path(__file__).with_name("scripted_server.py"))
AGENTS = ("Claude Code", "Codex", "opencode")


def printed(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millpond.cli.main", "agents", *arguments]
    environment = os.environ | {"MILLPOND_API_KEY": key}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_server_says_how_agents_use_it(server: Server) -> None:
    done = printed("--url", f"{server.url}/v1")
    assert (done.returncode, done.stderr) == (0, "")
    expected = lines(server.url, "test-model", 512, "none")
    assert done.stdout == "".join(f"# {name}\n{line}\n\n" for name, line in expected.items())


def started(folder: Path, *flags: str) -> tuple[str, str]:
    """What a server writes, the lines and the log, from its start to its end."""
    process = subprocess.Popen(
        [sys.executable, SERVER, "plain", str(folder), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in AGENTS]
    process.send_signal(signal.SIGTERM)
    rest, log = process.communicate(timeout=30)
    return "".join(told) + rest, log


def test_a_start_prints_them(byte_tokenizer: Path) -> None:
    """Behind the log, not in it; no key is shown."""
    told, log = started(byte_tokenizer, "api_key", "a-secret-key")
    found = re.search(r"url=(\S+)", log)
    assert found is not None
    assert told == "".join(f"{name}: {line}\n" for name, line in lines(found[1], "test-model", 512, "KEY").items())
    assert "a-secret-key" not in log


def test_with_a_key(start_server: StartServer) -> None:
    with start_server("plain", "api_key", "a-secret-key", "log_format", "json", ready=False) as server:
        server.wait_for_line('"ready"')
        url = json.loads(server.wait_for_line('"listening"'))["url"]
        refused = printed("--url", url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "wants a key: set MILLPOND_API_KEY" in refused.stderr
        done = printed("--url", url, key="a-secret-key")
        assert done.stdout.count("a-secret-key") == len(AGENTS)
        assert all(json.loads(line) for line in server.lines), "a log of JSON is one"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:1/else"])
def test_nobody_there(url: str) -> None:
    done = printed("--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"millpond agents: there is no server to be asked at {url}: ")
    assert "Traceback" not in done.stderr


def test_the_shell_gives_each_agent_what_was_meant() -> None:
    """Whatever a model is called."""
    name = """it's "q" $HOME;{}\\ö"""
    shell = "\n".join(lines("http://[::1]:8000/v1/", name, 8192, "k").values())
    told = [shlex.split(line) for line in shell.splitlines()]
    claude, codex, opencode = [dict(word.split("=", 1) for word in words if "=" in word) for words in told]
    assert claude["ANTHROPIC_BASE_URL"] == "http://[::1]:8000"
    assert claude["ANTHROPIC_MODEL"] == name
    assert claude["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "8192"
    assert tomllib.loads(f"model={codex['model']}")["model"] == name
    provider = tomllib.loads(f"p={codex['model_providers.millpond']}")["p"]
    assert provider == {
        "name": "Millpond",
        "base_url": "http://[::1]:8000/v1",
        "env_key": "MILLPOND_KEY",
        "wire_api": "responses",
    }
    config = json.loads(opencode["OPENCODE_CONFIG_CONTENT"])
    assert config["provider"]["millpond"]["models"] == {name: {"limit": {"context": 8192, "output": 2048}}}
    assert config["model"] == f"millpond/{name}"
