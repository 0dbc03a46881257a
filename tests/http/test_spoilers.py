"""A session of ten turns with all that agents do to their prompts: what was read is not read again.

What they change is in docs/coding-agents.md. The model is the demo model, with a template that shows tools; calls are
made because they must be.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tool_model import tool_model
from tool_tokenizer import TEMPLATE

if TYPE_CHECKING:
    from conftest import Launch, Server

pytestmark = [pytest.mark.models, pytest.mark.slow]

Json = dict[str, Any]
TURNS = 10
CACHED = 0.95
"""Of a prompt, from the second turn on."""
RULES = " ".join(f"Rule {number}: before step {number * 7} look at file_{number}.txt." for number in range(110))
NAMES = ("read_file", "write_file", "list_folder", "run_command", "search_text", "fetch_page", "make_plan", "ask_user")
PROPERTIES = {"path": {"enum": ["a.txt", "b é.txt"]}, "lines": {"type": "integer", "minimum": 0, "maximum": 99}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["path", "lines"], "additionalProperties": False}
REFUSED = """
{%- for message in messages[1:] if message.role == 'system' %}{{ raise_exception('not there') }}{% endfor %}"""


@pytest.fixture(scope="module", params=["late systems shown", "late systems refused"])
def real(
    request: pytest.FixtureRequest, smollm2_folder: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    template = TEMPLATE if request.param.endswith("shown") else REFUSED + TEMPLATE
    folder = tool_model(smollm2_folder, tmp_path_factory.mktemp("models") / "tools", template)
    arguments = ["serve", str(folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server


def posted(server: Server, path: str, body: Json) -> tuple[Json, httpx.Headers]:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json(), answer.headers


def reordered(arguments: Mapping[str, object]) -> dict[str, object]:
    """As a client sends it back that keeps names in an order of its own."""
    return dict(sorted(arguments.items(), reverse=next(ORDERS)))


ORDERS = itertools.cycle((True, False))


def test_a_session_by_messages(real: Server) -> None:
    """(M7) As Claude Code has it: bills, late system messages, tools that come later, marks that move, a helper."""
    tools = [{"name": name, "description": f"Use {name} when told.", "input_schema": SCHEMA} for name in NAMES]
    later = {"name": "a_late_tool", "description": "Comes later.", "input_schema": SCHEMA, "defer_loading": True}
    messages: list[Json] = []
    shares = []
    for turn in range(TURNS):
        asked: Json = {"type": "text", "text": f"Go on with file {turn}.", "cache_control": {"type": "ephemeral"}}
        results: list[Json] = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": f"Line {turn} of it."}
            for block in (messages[-1]["content"] if messages else ())
            if block["type"] == "tool_use"
        ]
        if turn == 4 and results:
            results[0]["content"] = [{"type": "tool_reference", "tool_name": later["name"]}]
        for message in messages:  # the mark moves on
            for block in message["content"]:
                block.pop("cache_control", None)
        messages.append({"role": "user", "content": [*results, asked]})
        messages.append({"role": "system", "content": [{"type": "text", "text": f"{9000 - turn} tokens are left."}]})
        bill = f"x-anthropic-billing-header: cc_version=2.1.332.{secrets.token_hex(2)}; cch={secrets.token_hex(3)};"
        body = {
            "model": "demo",
            "max_tokens": 48,
            "temperature": 0,
            "system": [{"type": "text", "text": bill}, {"type": "text", "text": RULES}],
            "tools": [*tools[:3], later, *tools[3:]] if turn > 2 else tools,
            "tool_choice": {"type": "any" if turn % 3 else "auto"},
            "messages": messages,
            "metadata": {"user_id": secrets.token_hex(8)},
        }
        answer, headers = posted(real, "/v1/messages?beta=true", body)
        usage = answer["usage"]
        read = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
        shares.append((usage["cache_read_input_tokens"] / read, headers["x-millpond-prefix-cache"]))
        messages.append({"role": "assistant", "content": answer["content"] or [{"type": "text", "text": "."}]})
        for block in messages[-1]["content"]:
            if block["type"] == "tool_use":
                block["input"] = reordered(block["input"])
        posted(real, "/v1/messages", {"model": "demo", "max_tokens": 2, "messages": messages[:1], "system": "A title?"})
    assert all(share >= CACHED for share, _ in shares[1:]), "\n".join(map(str, shares))
    # The prompt leaves what is known at what is new: in the turn's own message, or in an answer that broke off.
    for turn, (_, header) in enumerate(shares[1:], start=1):
        assert re.search(rf'at="messages\[({3 * turn - 1}|{3 * turn})\]', header), shares


def test_a_session_by_chats(real: Server) -> None:
    """(M7) As opencode has it: arguments in other words, reminders that are messages."""
    tools = [
        {"type": "function", "function": {"name": name, "description": f"Use {name} when told.", "parameters": SCHEMA}}
        for name in NAMES
    ]
    messages: list[Json] = [{"role": "system", "content": RULES + " By chat."}]
    shares = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Go on with file {turn}."})
        if turn % 2:
            messages.append({"role": "system", "content": f"{9000 - turn} tokens are left."})
        body = {
            "model": "demo",
            "max_tokens": 48,
            "temperature": 0,
            "tools": tools,
            "tool_choice": "required" if turn % 3 else "auto",
            "messages": messages,
            "user": secrets.token_hex(8),
        }
        answer, headers = posted(real, "/v1/chat/completions", body)
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        shares.append((cached / usage["prompt_tokens"], headers["x-millpond-prefix-cache"]))
        message = answer["choices"][0]["message"]
        messages.append(message)
        for call in message.get("tool_calls") or ():
            given = reordered(json.loads(call["function"]["arguments"]))
            call["function"]["arguments"] = json.dumps(given, indent=2, ensure_ascii=bool(turn % 2))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"Line {turn} of it."})
    assert all(share >= CACHED for share, _ in shares[1:]), "\n".join(map(str, shares))
