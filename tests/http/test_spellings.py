"""(M7) Calls that clients write anew are given to the template as the model wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import writing
from model_infos import SMALL
from tool_tokenizer import write_tool_tokenizer

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Said
from millpond.http.anthropic.schemas import parse as parse_messages
from millpond.http.openai.schemas import ChatRequest
from millpond.http.openai.schemas import parse as parse_chat
from millpond.http.prompts import read_prompts
from millpond.http.responses.schemas import parse as parse_responses
from millpond.http.spellings import LONGEST, Listener, Spellings
from millpond.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
WRITTEN = '{"path":"a/\\u00e9",  "lines": [1,2], "mark": "<|x|>"}'
ARGUMENTS = json.loads(WRITTEN)
CALL = f'<tool_call>\n{{"name": "read_file", "arguments": {WRITTEN}}}\n</tool_call>'
ASKED = "What is in a?"


def known(*texts: str, salt: str = "ann") -> Spellings:
    spellings = Spellings()
    for text in texts:
        spellings.keep(salt, "f", text)
    return spellings


@given(st.dictionaries(st.text(max_size=3), st.recursive(st.integers() | st.text(max_size=3), st.lists, max_leaves=4)))
def test_the_same_call_however_it_is_written(arguments: dict[str, object]) -> None:
    written = json.dumps(arguments, indent=1)
    anew = json.dumps(dict(reversed(arguments.items())), separators=(",", ":"), ensure_ascii=False)
    spellings = known(written)
    assert spellings.find("ann", "f", anew) == written
    assert spellings.find("ann", "g", anew) == ""
    assert spellings.find("bob", "f", anew) == "", "nobody else's"
    assert spellings.find("ann", "f", json.dumps({**arguments, "more": 1})) == ""


def test_other_values_are_another_call() -> None:
    spellings = known('{"a":1}')
    for other in ('{"a":1.0}', '{"a":"1"}', '{"a":true}', '{"a":[1]}', "{}", "[1]", "1", "", "{", "[" * 100_000):
        assert spellings.find("ann", "f", other) == ""
    assert known("[1]", "{", "1").find("ann", "f", "[1]") == ""


def test_only_so_much_is_kept() -> None:
    spellings = Spellings(most_bytes=40)
    texts = [json.dumps({"a": f"{number:06d}"}) for number in range(4)]  # 15 bytes each
    for text in texts[:2]:
        spellings.keep("ann", "f", text)
    assert spellings.find("ann", "f", texts[0])
    spellings.keep("ann", "f", texts[2])
    assert [bool(spellings.find("ann", "f", text)) for text in texts] == [True, False, True, False]
    spellings.keep("ann", "f", json.dumps({"a": "x" * LONGEST}))
    assert [bool(spellings.find("ann", "f", text)) for text in texts] == [True, False, True, False]
    for _ in range(10):
        spellings.keep("ann", "f", texts[0])
    assert [bool(spellings.find("ann", "f", text)) for text in texts] == [True, False, True, False]


def test_calls_that_broke_off_are_none() -> None:
    spellings = Spellings()
    listener = Listener(spellings, "ann")
    listener.hear([Said("x"), CallBegun("f"), CallText('{"a":')])
    listener.hear([CallText("1 }"), CallEnded(), CallBegun("f"), CallText('{"a":2 }'), CallEnded(whole=False)])
    assert spellings.find("ann", "f", '{"a":1}') == '{"a":1 }'
    assert spellings.find("ann", "f", '{"a":2}') == ""


@pytest.mark.anyio
async def test_the_next_prompt_goes_on_where_the_answer_ended(tmp_path: Path) -> None:
    """By each API, with the arguments as clients in other languages write them."""
    folder = write_tool_tokenizer(tmp_path / "model")
    tokenizer = Tokenizer.load(folder)
    drawn = tokenizer.text_tokens(CALL, parse_special=True)
    tool = {"name": "read_file", "description": "", "parameters": SCHEMA}
    async with writing(folder, [CALL]) as (http, front):
        asked = {"messages": [{"role": "user", "content": ASKED}], "tools": [{"type": "function", "function": tool}]}
        answer = await http.post("/v1/chat/completions", json=asked)
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == ARGUMENTS
        spelling = front.model.spellings

    anew = json.dumps(ARGUMENTS, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    chat_call = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": anew}}
    result = {"role": "tool", "content": "b", "tool_call_id": "c1"}
    chat = parse_chat(
        ChatRequest,
        {**asked, "messages": [*asked["messages"], {"role": "assistant", "tool_calls": [chat_call]}, result]},
    ).generation()
    use = {"type": "tool_use", "id": "c1", "name": "read_file", "input": json.loads(anew)}
    heard = {"type": "tool_result", "tool_use_id": "c1", "content": "b"}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [heard]}]
    messages = parse_messages(
        {
            "max_tokens": 5,
            "messages": [*asked["messages"], *turns],
            "tools": [{"name": "read_file", "description": "", "input_schema": SCHEMA}],
        }
    ).generation()
    items = [
        {"role": "user", "content": ASKED},
        {"type": "function_call", "call_id": "c1", "name": "read_file", "arguments": anew},
        {"type": "function_call_output", "call_id": "c1", "output": "b"},
    ]
    request = parse_responses({"input": items, "tools": [{"type": "function", **tool}]})
    responses = request.generation(items, ())
    first = read_prompts(parse_chat(ChatRequest, asked).generation(), tokenizer, SMALL)[0].tokens
    for following in (chat, messages, responses):

        def find(name: str, text: str) -> str:
            return spelling.find("", name, text)

        tokens = read_prompts(following, tokenizer, SMALL, find)[0].tokens
        whole = tokenizer.decode(tokens)
        assert f'"arguments": {WRITTEN}}}' in whole
        assert tokens[: len(first)] == first
        assert tokens[len(first) : len(first) + len(drawn)] == drawn or WRITTEN in tokenizer.decode(
            tokens[len(first) :]
        )
        assert WRITTEN not in tokenizer.decode(read_prompts(following, tokenizer, SMALL)[0].tokens)
