"""(M5) Anthropic's API, with its official client: blocks, events in their order, counts, and refusals in its words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import anthropic
import httpx
import httpx2
import pytest
from in_process import scripted, served, serving, writing
from model_infos import SMALL
from tool_tokenizer import TEMPLATE, write_tool_tokenizer

from millpond.http.anthropic.schemas import parse as parse_messages
from millpond.http.openai.schemas import ChatRequest
from millpond.http.openai.schemas import parse as parse_chat
from millpond.http.prompts import read_prompts
from millpond.text.tokenizer import Tokenizer

TOOL = {
    "name": "read_file",
    "description": "Reads files.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"path": {"type": "string"}},
        "required": ["path"],
    },
}
ASKED = [{"role": "user", "content": "What is in a?"}]
CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a", "n": 9007199254740993}}\n</tool_call>'
THOUGHT = "<think>\nI read it.\n</think>\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tool_tokenizer(tmp_path / "model")


@contextlib.asynccontextmanager
async def answering(
    folder: Path, answers: Sequence[str], step: int = 1, script: str = "context=4000"
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, httpx.AsyncClient]]:
    """The official client of a server whose model answers so, in turn."""
    async with writing(folder, answers, f"{script},step={step}") as (http, _):
        assert isinstance(http._transport, httpx.ASGITransport)
        transport = httpx2.ASGITransport(http._transport.app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as own:
            yield anthropic.AsyncAnthropic(base_url="http://test", api_key="x", http_client=own, max_retries=0), http


async def events(http: httpx.AsyncClient, **more: object) -> list[tuple[str, dict[str, object]]]:
    """The names and values of a stream's events."""
    body = {"model": "m", "messages": ASKED, "max_tokens": 200, "stream": True, **more}
    answer = await http.post("/v1/messages?beta=true", json=body)
    assert answer.status_code == 200, answer.text
    found = []
    for frame in answer.text.split("\n\n"):
        if frame.startswith("event: "):
            head, _, data = frame.partition("\n")
            found.append((head.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == value["type"] for name, value in found)
    return found


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.anyio
async def test_thoughts_texts_and_calls_as_blocks(folder: Path, step: int) -> None:
    answer = f"{THOUGHT}I look. \n{CALL}"
    async with answering(folder, [answer] * 3, step) as (client, http):
        whole = await client.messages.create(model="m", max_tokens=200, messages=ASKED, tools=[TOOL])  # type: ignore[arg-type,list-item]
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        thought, text, call = whole.content
        assert (thought.thinking, text.text) == ("I read it.", "I look.")  # type: ignore[union-attr]
        assert (call.name, call.input) == ("read_file", {"path": "a", "n": 9007199254740993})  # type: ignore[union-attr]
        assert call.id.startswith("toolu_")  # type: ignore[union-attr]
        assert (whole.stop_reason, whole.stop_sequence, whole.role, whole.type) == (
            "tool_use",
            None,
            "assistant",
            "message",
        )
        async with client.messages.stream(model="m", max_tokens=200, messages=ASKED, tools=[TOOL]) as stream:  # type: ignore[arg-type,list-item]
            streamed = await stream.get_final_message()
        assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
        assert streamed.content[0] == thought, "with the same signature"
        assert streamed.content[1].text == "I look."  # type: ignore[union-attr]
        assert streamed.content[2].input == call.input  # type: ignore[union-attr]
        assert streamed.stop_reason == "tool_use"
        assert streamed.usage.output_tokens == whole.usage.output_tokens

        names = [name for name, _ in await events(http, tools=[TOOL]) if name != "content_block_delta"]
        block = ["content_block_start", "content_block_stop"]
        assert names == ["message_start", *block * 3, "message_delta", "message_stop"]


@pytest.mark.anyio
async def test_a_stream_begins_with_what_its_prompt_costs(folder: Path) -> None:
    """Claude Code reads it there, and nowhere else."""
    async with answering(folder, ["Hello.", "Hello."]) as (client, http):
        (first, start), *_, (_, end), (last, _) = await events(http)
        counted = await client.messages.count_tokens(model="m", messages=ASKED)  # type: ignore[arg-type]
        assert (first, last) == ("message_start", "message_stop")
        message = start["message"]
        assert isinstance(message, dict)
        assert message["content"] == []
        usage = message["usage"]
        total = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
        assert total == counted.input_tokens > 0
        assert usage["output_tokens"] == 1
        assert end["usage"]["input_tokens"] == usage["input_tokens"]  # type: ignore[index]
        assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


@pytest.mark.anyio
async def test_nothing_empty_is_opened(folder: Path) -> None:
    """A call right behind a thought, and an answer that says nothing."""
    now = {"name": "now", "input_schema": {"type": "object"}}
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    async with answering(folder, [f"{THOUGHT}{call}", ""]) as (_, http):
        told = await events(http, tools=[now])
        opened = [value["content_block"]["type"] for name, value in told if name == "content_block_start"]  # type: ignore[index]
        assert opened == ["thinking", "tool_use"]
        partial = [v["delta"]["partial_json"] for n, v in told if "partial_json" in v.get("delta", {})]  # type: ignore[index,operator]
        assert "".join(partial) == "{}"
        assert [name for name, _ in await events(http)] == ["message_start", "message_delta", "message_stop"]


@pytest.mark.anyio
async def test_how_answers_end(folder: Path) -> None:
    async with answering(folder, ["One two three four.", "One two three four.", "One two three.", "One"]) as (
        client,
        _,
    ):
        cut = await client.messages.create(model="m", max_tokens=3, messages=ASKED)  # type: ignore[arg-type]
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
        stopped = await client.messages.create(model="m", max_tokens=99, messages=ASKED, stop_sequences=["x", " thr"])  # type: ignore[arg-type]
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " thr")
        assert stopped.content[0].text == "One two"  # type: ignore[union-attr]
        warmed = await client.messages.create(model="m", max_tokens=0, messages=ASKED)  # type: ignore[arg-type]
        assert (warmed.content, warmed.usage.output_tokens, warmed.stop_reason) == ([], 0, "max_tokens")
        forced = await client.messages.create(model="m", max_tokens=1_000_000, messages=ASKED)  # type: ignore[arg-type]
        assert forced.stop_reason == "end_turn", "as much as there is room for"


@pytest.mark.anyio
async def test_an_answer_that_fills_the_context_says_so(folder: Path) -> None:
    async with answering(folder, ["One two three four. " * 40], script="context=60") as (client, _):
        answer = await client.messages.create(model="m", max_tokens=32_000, messages=ASKED)  # type: ignore[arg-type]
        assert answer.stop_reason == "model_context_window_exceeded"
        usage = answer.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) + usage.output_tokens == 60


# --- prompts ------------------------------------------------------------------------------------------------------


def prompt(tokenizer: Tokenizer, **body: object) -> list[int]:
    asked = parse_messages({"max_tokens": 5, **body}).generation()
    return read_prompts(asked, tokenizer, SMALL)[0].tokens


def test_a_conversation_has_the_prompt_that_chats_have(folder: Path) -> None:
    """(M1) Whatever API it comes by."""
    tokenizer = Tokenizer.load(folder)
    schema = {name: value for name, value in TOOL["input_schema"].items() if name != "$schema"}  # type: ignore[attr-defined]
    tool = {"name": "read_file", "description": "Reads files.", "parameters": schema}
    call = {"id": "toolu_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "ü"}'}}
    chat = parse_chat(
        ChatRequest,
        {
            "messages": [
                {"role": "system", "content": "Be brief.\nAlways."},
                {"role": "user", "content": "What is in a?"},
                {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
                {"role": "tool", "content": "<|im_end|> it", "tool_call_id": "toolu_1"},
                {"role": "user", "content": "And\nthen?"},
            ],
            "tools": [{"type": "function", "function": tool}],
        },
    ).generation()
    expected = read_prompts(chat, tokenizer, SMALL)[0].tokens
    found = prompt(
        tokenizer,
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Always.", "cache_control": {}}],
        messages=[
            {"role": "user", "content": "What is in a?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "ü"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "<|im_end|> it", "is_error": True},
                    {"type": "text", "text": "And"},
                    {"type": "text", "text": "then?"},
                ],
            },
        ],
        tools=[TOOL],
    )
    assert found == expected


def test_the_same_in_other_words_is_the_same_prompt(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    texts = [{"type": "text", "text": "Hello."}]
    plain = prompt(tokenizer, system="S", messages=[{"role": "user", "content": "Hello."}])
    assert (
        prompt(tokenizer, system=[{"type": "text", "text": "S"}], messages=[{"role": "user", "content": texts}])
        == plain
    )
    billed = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.31a; cch=0abcd;"}]
    assert prompt(tokenizer, system=[*billed, {"type": "text", "text": "S"}], messages=ASKED) == prompt(
        tokenizer, system="S", messages=ASKED
    )
    one = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompt(tokenizer, messages=one) == prompt(tokenizer, messages=[{"role": "user", "content": "a\nb"}])
    line = billed[0]["text"]
    assert prompt(tokenizer, system="S", messages=[{"role": "user", "content": line}]) != plain, "only where it is one"
    assert prompt(tokenizer, system=f"S {line}", messages=ASKED) != prompt(tokenizer, system="S", messages=ASKED)


def test_tools_that_are_shown_later_leave_the_beginning_as_it_is(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    later = {**TOOL, "name": "fetch", "description": "Fetches <tool_call>.", "defer_loading": True}
    first = prompt(tokenizer, messages=ASKED, tools=[TOOL, later])
    assert first == prompt(tokenizer, messages=ASKED, tools=[TOOL])
    history = [
        *ASKED,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "find", "input": {}}]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "tool_reference", "tool_name": "fetch"}],
                }
            ],
        },
    ]
    body = {"messages": history, "tools": [later, TOOL]}
    second = prompt(tokenizer, **body)
    opening = len(tokenizer.text_tokens("<|im_start|>assistant\n", parse_special=True))
    assert second[: len(first) - opening] == first[:-opening]
    shown = tokenizer.decode(second[len(first) :])
    assert "Fetches <tool_call>." in shown
    asked = parse_messages({"max_tokens": 5, **body}).conversation()
    assert [tool.name for tool in asked.callable] == ["read_file", "fetch"]
    assert [
        tool.name for tool in parse_messages({"max_tokens": 5, **body, "messages": ASKED}).conversation().callable
    ] == ["read_file"]


LATE = [
    {"role": "user", "content": "Hello."},
    {"role": "system", "content": [{"type": "text", "text": "It is late.", "cache_control": {"type": "ephemeral"}}]},
]
STRICT = TEMPLATE.replace(
    "{%- for message in messages %}",
    "{%- for message in messages %}{%- if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}",
)


@pytest.mark.parametrize("template", [TEMPLATE, STRICT])
def test_a_late_system_message_stays_where_it_is(tmp_path: Path, template: str) -> None:
    """What stands before it is as it was, so that it is found in the cache."""
    tokenizer = Tokenizer.load(write_tool_tokenizer(tmp_path / "model", template))
    turn = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"}]
    first = prompt(tokenizer, system="S", messages=LATE)
    second = prompt(tokenizer, system="S", messages=[*LATE, *turn])
    opening = len(tokenizer.text_tokens("<|im_start|>assistant\n", parse_special=True))
    assert second[: len(first) - opening] == first[:-opening]
    text = tokenizer.decode(second)
    assert text.index("Hello.") < text.index("It is late.") < text.index("And now?")
    assert ("<system-reminder>" in text) == (template is STRICT)
    as_text = [LATE[0], {"role": "system", "content": "It is late."}]
    assert prompt(tokenizer, system="S", messages=as_text) == first


def test_a_late_system_message_before_a_user(tmp_path: Path) -> None:
    """Two turns of a user's in a row are one, as strict templates want it."""
    strict = STRICT.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{%- if not loop.first and loop.previtem.role == message.role %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}",
        1,
    )
    tokenizer = Tokenizer.load(write_tool_tokenizer(tmp_path / "model", strict))
    history = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "system", "content": "C"},
        {"role": "user", "content": "D"},
        {"role": "system", "content": "E"},
    ]
    text = tokenizer.decode(prompt(tokenizer, messages=history))
    assert text.count("system-reminder") == 4
    assert text.index("C") < text.index("D") < text.index("E")


def test_an_answer_that_has_begun_goes_on(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    found = tokenizer.decode(prompt(tokenizer, messages=[*ASKED, {"role": "assistant", "content": "It is"}]))
    assert found.endswith("It is")


# --- what is wrong ------------------------------------------------------------------------------------------------


WRONG: list[tuple[str, object, str]] = [
    ("max_tokens", None, "max_tokens: is required and must be an integer of at least 0"),
    ("max_tokens", -1, "max_tokens: must be an integer of at least 0, got -1"),
    ("messages", [], "messages: must be a non-empty list of messages"),
    ("messages", [{"role": "tool", "content": ""}], "messages[0].role: must be one of user, assistant, system"),
    ("messages", [{"role": "user"}], "messages[0].content: is required"),
    ("messages", [{"role": "user", "content": [{"type": "image"}]}], 'messages[0].content[0].type: "image" is not'),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text: must be a string",
    ),
    ("messages", [{"role": "user", "content": [{"type": "tool_use"}]}], "messages[0].content[0].type:"),
    (
        "messages",
        [
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"a": [0] * 20_000}}],
            }
        ],
        "messages[0].content[0].input: must be at most 20000 values",
    ),
    ("system", 3, "system: must be a string or a list of blocks"),
    ("tools", [{"name": "a b", "input_schema": {}}], "tools[0].name: must be 1 to 128"),
    ("tools", [{"name": "f"}], "tools[0].input_schema: is required"),
    ("tools", [TOOL, TOOL], "tools[1].name: must be a name that no other tool has"),
    (
        "tools",
        [{"type": "web_search_20250305", "name": "web_search"}],
        'tools[0].type: "web_search_20250305" is not',
    ),
    ("tool_choice", {"type": "tool", "name": "x"}, "tool_choice.name: must be one of the tools (read_file)"),
    ("tool_choice", "auto", "tool_choice: must be an object of type auto, any, none or tool"),
    ("thinking", {"type": "enabled"}, "thinking.budget_tokens: must be an integer of at least 1,"),
    ("thinking", {"type": "enabled", "budget_tokens": 10**30}, "thinking.budget_tokens: must be an integer"),
    ("output_config", {"effort": "some"}, "output_config.effort: must be one of none, minimal"),
    ("output_config", {"format": {"type": "xml"}}, "output_config.format: must be an object of type json_schema"),
    ("stop_sequences", [""], "stop_sequences: must be a list of at most 16 strings"),
    ("mcp_servers", [{"url": "x"}], "mcp_servers: "),
    ("container", "x", "container: "),
    ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}, "context_management.edits[0]: "),
    ("temperature", 3, "temperature: must be a number from 0 to 2, got 3"),
]


@pytest.mark.anyio
async def test_what_is_wrong_is_named(folder: Path) -> None:
    async with answering(folder, ["Hello."]) as (client, _):
        for field, value, message in WRONG:
            body = {"model": "m", "messages": ASKED, "max_tokens": 9, "tools": [TOOL], field: value}
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.post("/v1/messages", body=body, cast_to=httpx2.Response)
            assert caught.value.body["type"] == "error"  # type: ignore[index]
            error = caught.value.body["error"]  # type: ignore[index]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(message), error["message"]


@pytest.mark.anyio
async def test_what_is_neutral_is_taken(folder: Path) -> None:
    """As Claude Code sends it."""
    async with answering(folder, ["Hello."]) as (client, _):
        answer = await client.messages.create(
            model="m",
            max_tokens=32_000,
            messages=ASKED,  # type: ignore[arg-type]
            metadata={"user_id": "somebody"},
            thinking={"type": "adaptive"},
            extra_headers={"anthropic-beta": "a,b"},
            extra_body={
                "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
                "output_config": {"effort": "high"},
                "service_tier": "auto",
            },
        )
        assert answer.content[0].text == "Hello."  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(folder: Path) -> None:
    async with answering(folder, [], script="context=60") as (client, _):
        for text in ("a b c d " * 40, "a b c d " * 40_000):
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": text}])
            message = caught.value.body["error"]["message"]  # type: ignore[index]
            assert message.startswith("prompt is too long: ")
            assert message.endswith(" tokens > 60 maximum")
        counted = await client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "a b c d " * 40}])
        assert counted.input_tokens > 60


@pytest.mark.anyio
async def test_paths_and_models(folder: Path) -> None:
    async with answering(folder, ["Hello."]) as (client, http):
        listed = await client.models.list()
        assert [(model.id, model.type, model.display_name) for model in listed.data] == [("m", "model", "m")]
        assert (await client.models.retrieve("m")).id == "m"
        assert (await http.head("/api/hello")).status_code == 200
        doubled = await http.post("/v1/v1/messages", json={"model": "m", "max_tokens": 5, "messages": ASKED})
        assert doubled.json()["content"][0]["text"] == "Hello."
        assert doubled.headers["request-id"] == doubled.headers["x-request-id"]
        unknown = await http.post("/v1/messages", json={"model": "other", "max_tokens": 5, "messages": ASKED})
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
        broken = await http.post("/v1/messages/count_tokens", content=b"{")
        assert (broken.status_code, broken.json()["type"]) == (400, "error")


@pytest.mark.anyio
async def test_a_failure_in_the_middle_ends_the_stream_with_an_error(folder: Path) -> None:
    client = scripted("context=4000,crash_after=3")
    async with serving(served("m", client, lambda: Tokenizer.load(folder))) as (http, _):
        told = await events(http)
        assert told[0][0] == "message_start"
        assert told[-1][0] == "error"
        assert told[-1][1]["error"]["type"] == "api_error"  # type: ignore[index]


# --- what a reader found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 200])
@pytest.mark.anyio
async def test_every_call_has_an_id_of_its_own(folder: Path, step: int) -> None:
    """However many come in one step."""
    async with answering(folder, [f"{CALL}\n{CALL}\n{CALL}"] * 2, step) as (client, _):
        whole = await client.messages.create(model="m", max_tokens=900, messages=ASKED, tools=[TOOL])  # type: ignore[arg-type,list-item]
        async with client.messages.stream(model="m", max_tokens=900, messages=ASKED, tools=[TOOL]) as stream:  # type: ignore[arg-type,list-item]
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert len({block.id for block in message.content}) == 3  # type: ignore[union-attr]


def test_what_was_said_behind_a_call_is_behind_its_result(folder: Path) -> None:
    """As Claude Code keeps an answer that called, heard the result and went on; the turn before is found again."""
    tokenizer = Tokenizer.load(folder)
    think = {"type": "thinking", "signature": "x"}
    call = {"type": "tool_use", "id": "t", "name": "read_file", "input": {"path": "a"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "It is a."}
    turn = [*ASKED, {"role": "assistant", "content": [{**think, "thinking": "One."}, call]}]
    turn += [{"role": "user", "content": [result]}]
    first = prompt(tokenizer, messages=turn)
    later = [
        *ASKED,
        {
            "role": "assistant",
            "content": [
                {**think, "thinking": "One."},
                call,
                {**think, "thinking": "Two."},
                {**think, "thinking": "Three."},
                {"type": "text", "text": "Done."},
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "Thanks."}]},
    ]
    second = prompt(tokenizer, messages=later)
    opening = len(tokenizer.text_tokens("<|im_start|>assistant\n", parse_special=True))
    assert second[: len(first) - opening] == first[:-opening]
    text = tokenizer.decode(second)
    assert text.index("It is a.") < text.index("Two.\nThree.") < text.index("Done.") < text.index("Thanks.")


def test_a_call_at_the_end_is_in_the_prompt(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    call = {"type": "tool_use", "id": "t", "name": "read_file", "input": {"path": "x y z " * 50}}
    said = [{"type": "text", "text": "Look"}]
    without = prompt(tokenizer, messages=[*ASKED, {"role": "assistant", "content": said}])
    assert (
        len(prompt(tokenizer, messages=[*ASKED, {"role": "assistant", "content": [*said, call]}])) > len(without) + 50
    )


@pytest.mark.anyio
async def test_a_call_that_must_be_and_cannot_is_refused(folder: Path) -> None:
    later = {**TOOL, "defer_loading": True}
    async with answering(folder, ["Hello."]) as (client, http):
        for choice in ({"type": "any"}, {"type": "tool", "name": "read_file"}):
            with pytest.raises(anthropic.BadRequestError, match="there is no tool that may be called"):
                await client.messages.create(
                    model="m",
                    max_tokens=9,
                    messages=ASKED,  # type: ignore[arg-type]
                    tools=[later],  # type: ignore[list-item]
                    tool_choice=choice,  # type: ignore[arg-type]
                )
        allowed = {"type": "allowed_tools", "mode": "required", "tools": []}
        tool = {"type": "function", "name": "f"}
        body = {"model": "m", "input": "x", "tools": [tool], "tool_choice": allowed}
        assert (await http.post("/v1/responses", json=body)).status_code == 400


@pytest.mark.parametrize("arguments", ["hello", '{"x": abc}', "[1]", '"\\ud800"', '{"x": "\\ud800"}', '{"x": 1'])
@pytest.mark.anyio
async def test_arguments_that_are_none_are_told_as_json(folder: Path, arguments: str) -> None:
    """Of a model that no grammar holds: whatever it writes, answers can be read, and a call that breaks off is none."""
    call = f'<tool_call>\n{{"name": "read_file", "arguments": {arguments}}}\n</tool_call>'
    async with answering(folder, [call] * 6, step=5) as (client, http):
        whole = await client.messages.create(model="m", max_tokens=900, messages=ASKED, tools=[TOOL])  # type: ignore[arg-type,list-item]
        assert all(isinstance(block.input, dict) for block in whole.content if block.type == "tool_use")
        assert (whole.stop_reason == "tool_use") == any(block.type == "tool_use" for block in whole.content)
        assert (await events(http, tools=[TOOL], max_tokens=900))[-1][0] == "message_stop"
        tool = {"type": "function", "name": "read_file", "parameters": {}}
        for body in (
            {"messages": ASKED, "tools": [{"type": "function", "function": {"name": "read_file"}}]},
            {"input": "x", "tools": [tool]},
            {"input": "x", "tools": [{"type": "custom", "name": "read_file"}], "stream": True},
            {"input": "x", "tools": [{"type": "custom", "name": "read_file"}]},
        ):
            path = "/v1/responses" if "input" in body else "/v1/chat/completions"
            answer = await http.post(path, json={"model": "m", **body})
            assert answer.status_code == 200, answer.text
            assert "response.failed" not in answer.text


@pytest.mark.anyio
async def test_a_header_has_no_more_than_a_line(folder: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "x\r\nSet-Cookie: evil=ü"}}}
    async with answering(folder, ["Hello."]) as (_, http):
        tool = {"name": "f", "input_schema": schema}
        body = {"model": "m", "max_tokens": 9, "messages": ASKED, "tools": [tool]}
        answer = await http.post("/v1/messages", json=body)
        assert "format x??Set-Cookie: evil=?" in answer.headers["x-millpond-ignored"]
