"""(M10) Coding agents as people install them finish a tool run: their own programs, their own requests, a real command.

The model is scripted, so that every agent gets exactly the call that it is to carry out; all around it is real.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agents import AGENTS, missing
from tool_tokenizer import write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from conftest import Launch

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
    tokenizer = Tokenizer.load(folder)
    name, arguments = CALLS[agent]
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    answers = [f"<think>\nI shall.\n</think>\n\nI run it.\n{call}", DONE]
    written = tmp_path / "answers.json"
    written.write_text(json.dumps([tokenizer.text_tokens(answer, parse_special=True) for answer in answers]))
    monkeypatch.setenv("SCRIPTED_ANSWERS", str(written))
    heard = tokenizer.vocabulary["<tool_response>"]
    script = f"written,context=200000,step=7,result={heard}"
    with launch([sys.executable, SERVER, script, str(folder)]) as server:
        ran = AGENTS[agent](server.url, "test-model", "Write a proof with a command.", tmp_path / "home")
        assert ran.status == 0, ran.output[-3000:]
        assert "millpond-ok" in ran.output
        assert DONE in ran.output
        assert (ran.folder / "proof.txt").read_text() == "millpond-ok\n"
        asked = [line for line in server.lines if f"path={PATHS[agent]} " in line and "status=200" in line]
        assert len(asked) >= 2
        assert not [line for line in server.lines if " error " in line or "Traceback" in line]
        refused = [line for line in server.lines if "status=4" in line or "status=5" in line]
        assert not refused, refused
