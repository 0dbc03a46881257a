"""(M10) Coding agents as people install them finish a tool run: their own programs, their own requests, a real command.

The model is scripted, so that every agent gets exactly the call that it is to carry out; all around it is real.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from agents import AGENTS, missing, started
from middleman import between
from tool_model import tool_model
from tool_tokenizer import write_answers, write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Launch, Server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

SERVER = str(Path(__file__).with_name("scripted_server.py"))
DONE = "All is done: millpond-ok."
COMMAND = "echo millpond-ok > proof.txt"
CALLS = {
    "claude": ("Bash", {"command": COMMAND, "description": "Writes a proof."}),
    "codex": ("exec_command", {"cmd": COMMAND}),
    "opencode": ("bash", {"command": COMMAND, "description": "Writes a proof."}),
}
PATHS = {"claude": "/v1/messages", "codex": "/v1/responses", "opencode": "/v1/chat/completions"}


@pytest.mark.parametrize("agent", AGENTS)
def test_a_tool_is_run_and_its_result_heard(
    agent: str, tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns: the model calls, the agent runs the command, the model has the last word."""
    folder = write_tool_tokenizer(tmp_path / "model")
    name, arguments = CALLS[agent]
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    answers = [f"<think>\nI shall.\n</think>\n\nI run it.\n{call}", DONE]
    monkeypatch.setenv("SCRIPTED_ANSWERS", write_answers(folder, answers))
    heard = Tokenizer.load(folder).vocabulary["<tool_response>"]
    script = f"written,context=200000,step=7,result={heard}"
    with launch([sys.executable, SERVER, script, str(folder)]) as server:
        ran = started(agent, server.url, "test-model", "Write a proof with a command.", tmp_path / "home")
        assert ran.status == 0, ran.output[-3000:]
        assert "millpond-ok" in ran.output
        assert DONE in ran.output
        assert (ran.folder / "proof.txt").read_text() == "millpond-ok\n"
        asked = [line for line in server.lines if f"path={PATHS[agent]} " in line and "status=200" in line]
        assert len(asked) >= 2
        assert not [line for line in server.lines if " error " in line or "Traceback" in line]
        refused = [line for line in server.lines if "status=4" in line or "status=5" in line]
        assert not refused, refused


ARGUMENTS = {"claude": ("Bash", "command"), "codex": ("exec_command", "cmd"), "opencode": ("bash", "command")}


@pytest.fixture(scope="module")
def real(smollm2_folder: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, with a template that has tools."""
    folder = tool_model(smollm2_folder, tmp_path_factory.mktemp("models") / "tools")
    arguments = ["serve", str(folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server


def told(server: Server, agent: str) -> list[dict[str, int]]:
    """Counts of the requests with tools that the agent has made so far, in their order."""
    found = []
    for line in server.lines:
        if f"path={PATHS[agent]} " in line and "prompt_tokens=" in line:
            words = dict(word.partition("=")[::2] for word in line.split())
            found.append({name: int(words[name]) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")})
    return found


@pytest.mark.models
@pytest.mark.parametrize("agent", AGENTS)
def test_a_real_model_calls_and_is_asked_again_about_what_is_cached(agent: str, tmp_path: Path, real: Server) -> None:
    """Whatever its weights, a call that must be made is one; and the second turn finds the first one's prompt."""
    tool, argument = ARGUMENTS[agent]
    with between(real.url, tool, argument, COMMAND) as middleman:
        ran = started(agent, middleman.url, "demo", "Write a proof with a command.", tmp_path / "home", small=True)
    # The demo model may write on until it has no tokens left, which they take for a failure.
    assert ran.status == 0 or "max_output_tokens" in ran.output, ran.output[-3000:]
    assert (ran.folder / "proof.txt").read_text() == "millpond-ok\n"
    turns = [count for count in told(real, agent) if count["prompt_tokens"] > 600]
    assert len(turns) >= 2, told(real, agent)
    first, second = turns[:2]
    assert second["cached_tokens"] >= first["prompt_tokens"] - 64, turns


@pytest.mark.models
def test_a_second_session_finds_the_first_ones_system_and_tools(tmp_path: Path, real: Server) -> None:
    """(M7) Claude Code begins each with a line that is another one every time."""
    tool, argument = ARGUMENTS["claude"]
    for asked in ("Say what a pond is.", "Write a proof, please, with some command or other."):
        before = len(told(real, "claude"))
        with between(real.url, tool, argument, COMMAND) as middleman:
            started("claude", middleman.url, "demo", asked, tmp_path / "home", small=True)
    bodies = [body for body in middleman.bodies if body.get("tools")]
    assert "x-anthropic-billing-header" in json.dumps(bodies[0]["system"])
    alone = {**bodies[0], "messages": [{"role": "user", "content": "x"}]}
    shared = httpx.post(f"{real.url}/v1/messages/count_tokens", json=alone).json()["input_tokens"]
    first = next(count for count in told(real, "claude")[before:] if count["prompt_tokens"] > shared)
    assert first["cached_tokens"] >= 0.95 * shared, (first, shared)
