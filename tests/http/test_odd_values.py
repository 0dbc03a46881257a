"""Whatever stands in place of any value of a request, the answer is one or a 400 that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from in_process import scripted, served, serving
from tool_tokenizer import write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

JSON = {"content-type": "application/json"}
ODD: tuple[object, ...] = ([None, None], {"a": [1]}, [[]], 1.5, -1, True, "", "\ud800", None)
"""Things that are no key of anything, are no text, or are none of either."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CHAT = {
    "model": "m",
    "max_completion_tokens": 1,
    "messages": [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "r",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}],
        },
        {"role": "tool", "content": "o", "tool_call_id": "1"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "logit_bias": {"5": 1},
    "stop": ["x"],
    "stream_options": {"include_usage": True},
    "include_reasoning": True,
    "chat_template_kwargs": {"enable_thinking": True},
    "prediction": {"type": "content", "content": [{"type": "text", "text": "p"}]},
}
FORM = {
    "messages": [{"role": "user", "content": "u"}],
    "max_tokens": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    "speculative": {"mode": "off", "tokens": 1},
}
MESSAGES = {
    "model": "m",
    "max_tokens": 1,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {"role": "system", "content": "l"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "h", "signature": "z"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "text", "text": "o"}, {"type": "tool_reference", "tool_name": "f"}],
                }
            ],
        },
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA, "defer_loading": False}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": "u"},
    "stop_sequences": ["x"],
}
RESPONSES = {
    "model": "m",
    "instructions": "i",
    "max_output_tokens": 1,
    "input": [
        {"type": "message", "id": "msg_1", "role": "user", "content": [{"type": "input_text", "text": "t"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "h"}], "encrypted_content": "e"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "namespace": "n"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "o"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "{}"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "o"},
    ],
    "tools": [
        {"type": "function", **FUNCTION},
        {"type": "custom", "name": "g", "description": "d", "format": {"type": "text"}},
        {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", **FUNCTION}]},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"k": "v"},
    "store": True,
}
REFERRING = {"input": [{"type": "item_reference", "id": "msg_1"}]}
CASES = {
    "chat": ("/v1/chat/completions", CHAT),
    "forms": ("/v1/chat/completions", FORM),
    "plain": ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "logit_bias": {"5": 1}, "logprobs": 1}),
    "messages": ("/v1/messages", MESSAGES),
    "responses": ("/v1/responses", RESPONSES),
    "references": ("/v1/responses", REFERRING),
    "going on": ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
    "embeddings": ("/v1/embeddings", {"input": [[1], [2]], "encoding_format": "float", "dimensions": 2}),
    "explain": ("/v1/cache/explain", FORM),
    "tokenize": ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": CHAT["tools"]}),
    "detokenize": ("/detokenize", {"tokens": [1, 2]}),
}


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a body values stand."""
    if path:
        yield path
    steps: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield from places(part, (*path, step))


@pytest.mark.often("chat", "messages", "tokenize", "explain", "detokenize", "embeddings", "plain", "references")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.anyio
async def test_anything_in_place_of_anything(case: str, tmp_path: Path) -> None:
    """(B4, L4)"""
    path, body = CASES[case]
    folder = write_tool_tokenizer(tmp_path / "model")
    async with serving(served("m", scripted("context=4000,embeds=8"), lambda: Tokenizer.load(folder))) as (http, _):
        for place in places(body):
            for odd in ODD:
                changed: Any = deepcopy(body)
                inner = changed
                for step in place[:-1]:
                    inner = inner[step]
                inner[place[-1]] = odd
                answer = await http.post(path, content=json.dumps(changed), headers=JSON)
                assert answer.status_code in (200, 400, 404), (place, odd, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"], (place, odd)
