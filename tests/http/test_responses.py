"""(M6) Responses, with the official client and its own assertions: items, numbered events, tools of every kind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest
from in_process import scripted, served, serving, writing
from model_infos import SMALL
from tool_tokenizer import TEMPLATE, write_tool_tokenizer

from millpond.http.errors import ApiError
from millpond.http.openai.schemas import ChatRequest
from millpond.http.openai.schemas import parse as parse_chat
from millpond.http.prompts import read_prompts
from millpond.http.responses.schemas import parse
from millpond.http.responses.thoughts import opened, sealed
from millpond.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"type": "function", "name": "read_file", "description": "Reads files.", "parameters": SCHEMA, "strict": False}
CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a"}}\n</tool_call>'
THOUGHT = "<think>\nI read it.\n</think>\n\n"
ASKED = "What is in a?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tool_tokenizer(tmp_path / "model")


@contextlib.asynccontextmanager
async def answering(
    folder: Path, answers: Sequence[str], step: int = 1, script: str = "context=4000"
) -> AsyncIterator[tuple[openai.AsyncOpenAI, httpx.AsyncClient]]:
    async with writing(folder, answers, f"{script},step={step}") as (http, _):
        yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0), http


async def events(http: httpx.AsyncClient, **more: object) -> list[dict[str, object]]:
    answer = await http.post("/v1/responses", json={"model": "m", "input": ASKED, "stream": True, **more})
    assert answer.status_code == 200, answer.text
    found = []
    for frame in answer.text.split("\n\n"):
        if frame.startswith("event: "):
            head, _, data = frame.partition("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert head == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.anyio
async def test_items_streamed_and_whole(folder: Path, step: int) -> None:
    async with answering(folder, [f"{THOUGHT}I look.\n{CALL}\n{CALL}"] * 3, step) as (client, http):
        whole = await client.responses.create(model="m", input=ASKED, tools=[TOOL])  # type: ignore[list-item]
        kinds = ["reasoning", "message", "function_call", "function_call"]
        assert [item.type for item in whole.output] == kinds
        thought, said, call, again = whole.output
        assert thought.content[0].text == "I read it."  # type: ignore[union-attr,index]
        assert whole.output_text == said.content[0].text == "I look."  # type: ignore[union-attr]
        assert (call.name, json.loads(call.arguments), call.status) == ("read_file", {"path": "a"}, "completed")  # type: ignore[union-attr]
        assert call.call_id != again.call_id  # type: ignore[union-attr]
        assert (whole.status, whole.incomplete_details, whole.error) == ("completed", None, None)
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        async with client.responses.stream(model="m", input=ASKED, tools=[TOOL]) as stream:  # type: ignore[list-item]
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == kinds
        assert final.output[2].arguments == call.arguments  # type: ignore[union-attr]
        assert final.usage == whole.usage

        told = await events(http, tools=[TOOL])
        names = [event["type"] for event in told if not str(event["type"]).endswith(".delta")]
        item = ["response.output_item.added", "response.output_item.done"]
        assert names == [
            "response.created",
            "response.in_progress",
            item[0],
            "response.reasoning_text.done",
            item[1],
            item[0],
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            item[1],
            *[item[0], "response.function_call_arguments.done", item[1]] * 2,
            "response.completed",
        ]
        done = [event["item"] for event in told if event["type"] == item[1]]
        assert done == told[-1]["response"]["output"]  # type: ignore[index]


@pytest.mark.anyio
async def test_an_answer_that_is_cut_off(folder: Path) -> None:
    """A call of which something is missing is no call that anybody may carry out."""
    async with answering(folder, [f"Well. {CALL}"] * 2) as (client, http):
        cut = await client.responses.create(model="m", input=ASKED, tools=[TOOL], max_output_tokens=45)  # type: ignore[list-item]
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert [item.type for item in cut.output] == ["message"]
        told = await events(http, tools=[TOOL], max_output_tokens=45)
        assert told[-1]["type"] == "response.incomplete"
        assert told[-1]["response"]["output"][-1]["status"] == "incomplete"  # type: ignore[index]
        assert "response.function_call_arguments.done" not in [event["type"] for event in told]


@pytest.mark.anyio
async def test_thoughts_that_the_client_keeps(folder: Path) -> None:
    """What it sends back is in the next prompt, without anything being kept here."""
    tokenizer = Tokenizer.load(folder)
    async with answering(folder, [f"{THOUGHT}Yes."] * 2) as (client, http):
        kept = await client.responses.create(
            model="m", input=ASKED, store=False, include=["reasoning.encrypted_content"]
        )
        sent = [item.model_dump(exclude_none=True) for item in kept.output]
        assert opened(sent[0]["encrypted_content"]) == "I read it."
        assert (await events(http, include=["reasoning.encrypted_content"]))[-1]["response"]["output"][0][  # type: ignore[index]
            "encrypted_content"
        ] == sent[0]["encrypted_content"]
    history = [{"role": "user", "content": ASKED}, *sent, {"role": "user", "content": "Sure?"}]
    assert "I read it." in tokenizer.decode(prompt(tokenizer, input=history))
    sent[0]["content"] = []
    assert "I read it." in tokenizer.decode(prompt(tokenizer, input=history))
    sent[0]["encrypted_content"] = "AAAA" + sent[0]["encrypted_content"]
    assert "I read it." not in tokenizer.decode(prompt(tokenizer, input=history))


def test_a_kept_thought_that_was_changed_is_none() -> None:
    kept = sealed("Tö\n")
    assert opened(kept) == "Tö\n"
    assert opened(kept[:-4]) is None
    assert opened("x") is None
    assert opened("") is None


# --- prompts ------------------------------------------------------------------------------------------------------


def prompt(tokenizer: Tokenizer, **body: object) -> list[int]:
    asked = parse(body)
    return read_prompts(asked.generation(asked.input, ()), tokenizer, SMALL)[0].tokens


def test_a_conversation_has_the_prompt_that_chats_have(folder: Path) -> None:
    """(M1) Whatever API it comes by."""
    tokenizer = Tokenizer.load(folder)
    call = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "ü"}'}}
    tool = {name: value for name, value in TOOL.items() if name not in ("type", "strict")}
    chat = parse_chat(
        ChatRequest,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Always."},
                {"role": "user", "content": "What is in a?"},
                {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
                {"role": "tool", "content": "<|im_end|> it", "tool_call_id": "c1"},
                {"role": "user", "content": "And\nthen?"},
            ],
            "tools": [{"type": "function", "function": tool}],
        },
    ).generation()
    found = prompt(
        tokenizer,
        instructions="Be brief.",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Always."}]},
            {"role": "user", "content": "What is in a?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "read_file", "arguments": '{"path": "ü"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "<|im_end|> it"},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "then?"}],
            },
        ],
        tools=[TOOL],
    )
    assert found == read_prompts(chat, tokenizer, SMALL)[0].tokens


GROUP = {"type": "namespace", "name": "files", "tools": [{**TOOL, "name": "close"}, {**TOOL, "name": "read_file"}]}
PATCH = {"type": "custom", "name": "patch", "description": "Patches.", "format": {"type": "text"}}


@pytest.mark.anyio
async def test_groups_and_tools_whose_input_is_a_text(folder: Path) -> None:
    calls = "".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'
        for name, arguments in (
            ("close", '{"path": "a"}'),
            ("files__read_file", '{"path": "b"}'),
            ("read_file", '{"path": "c"}'),
            ("patch", '{"input": "*** <x>\\n"}'),
        )
    )
    tools = [TOOL, GROUP, PATCH]
    async with answering(folder, [calls] * 2, step=3) as (client, http):
        whole = await client.responses.create(model="m", input=ASKED, tools=tools)  # type: ignore[arg-type]
        told = [item.model_dump(exclude_none=True) for item in whole.output]
        assert [(item["type"], item["name"], item.get("namespace")) for item in told] == [
            ("function_call", "close", "files"),
            ("function_call", "read_file", "files"),
            ("function_call", "read_file", None),
            ("custom_tool_call", "patch", None),
        ]
        assert told[3]["input"] == "*** <x>\n"
        streamed = await events(http, tools=tools)
        assert [item["type"] for item in streamed[-1]["response"]["output"]] == [item["type"] for item in told]  # type: ignore[index]
        inputs = [e for e in streamed if str(e["type"]).startswith("response.custom_tool_call_input")]
        assert [event.get("delta") or event.get("input") for event in inputs] == ["*** <x>\n"] * 2
    tokenizer = Tokenizer.load(folder)
    history = [
        {"role": "user", "content": ASKED},
        *told,
        {"type": "custom_tool_call_output", "call_id": "x", "output": "ok"},
    ]
    shown = tokenizer.decode(prompt(tokenizer, input=history, tools=tools))
    assert '"name": "files__read_file", "arguments": {"path": "b"}' in shown
    assert '"name": "patch", "arguments": {"input": "*** <x>\\n"}' in shown


@pytest.mark.anyio
async def test_tools_that_nobody_runs_here(folder: Path) -> None:
    """An agent names them in every request; who asks for nothing else hears that there is none."""
    search = {"type": "web_search", "external_web_access": True}
    async with answering(folder, ["Hello."]) as (client, _):
        raw = await client.responses.with_raw_response.create(model="m", input=ASKED, tools=[TOOL, search])  # type: ignore[list-item]
        assert raw.headers["x-millpond-ignored"] == "tools: web_search"
        assert [tool.type for tool in raw.parse().tools] == ["function"]
        for more in ({"tools": [search]}, {"tools": [TOOL, search], "tool_choice": "required"}):
            with pytest.raises(openai.BadRequestError, match="nobody runs this one here"):
                await client.responses.create(model="m", input=ASKED, **more)  # type: ignore[call-overload]


WRONG: list[tuple[str, object, str]] = [
    ("input", [], "input: must be a string or a list of items, not empty"),
    ("input", [{"type": "item_reference", "id": "x"}], "input[0].id: x is not kept here"),
    ("input", [{"role": "tool", "content": ""}], "input[0].role: must be one of user, assistant"),
    ("input", [{"role": "user", "content": [{"type": "input_image"}]}], 'input[0].content[0].type: "input_image"'),
    ("input", [{"type": "function_call", "name": "f"}], "input[0].call_id: must be a string"),
    ("input", [{"role": "user"}], "input[0].content: is required"),
    (
        "input",
        [{"type": "function_call", "name": "f", "call_id": "a", "arguments": f"[{'0,' * 20_000}0]"}],
        "input[0].arguments: must be at most 20000 values and names",
    ),
    ("tools", [{"type": "function"}], "tools[0].name: must be 1 to 128"),
    ("tools", [{"type": "robot"}], 'tools[0].type: "robot" is not supported'),
    ("tools", [{"type": "namespace", "name": "n", "tools": [{}]}], "tools[0].tools[0]: must be"),
    ("tool_choice", {"type": "function", "name": "x"}, "tool_choice: must be the name of one of the tools"),
    ("tool_choice", "some", "tool_choice: must be"),
    ("text", {"format": {"type": "xml"}}, "text.format.type: must be text, json_object or json_schema"),
    ("text", {"format": {"type": "json_schema", "schema": 3}}, "text.format.schema: must be a JSON schema"),
    ("reasoning", {"effort": "some"}, "reasoning.effort: must be one of"),
    ("previous_response_id", "resp_1", "previous_response_id: resp_1 is not kept here"),
    ("background", True, "background: true is not supported"),
    ("truncation", "auto", 'truncation: "auto" is not supported'),
    ("max_output_tokens", 0, "max_output_tokens: must be an integer of at least 1"),
    ("max_output_tokens", 9000, "max_output_tokens: must be at most"),
]


@pytest.mark.anyio
async def test_what_is_wrong_is_named(folder: Path) -> None:
    async with answering(folder, ["Hello."]) as (client, _):
        for field, value, message in WRONG:
            body = {"model": "m", "input": ASKED, "tools": [TOOL], field: value}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/responses", body=body, cast_to=httpx.Response)
            assert message in caught.value.message, (field, value)


@pytest.mark.anyio
async def test_a_failure_in_the_middle(folder: Path) -> None:
    client = scripted("context=4000,crash_after=3")
    async with serving(served("m", client, lambda: Tokenizer.load(folder))) as (http, _):
        told = await events(http)
        assert told[-1]["type"] == "response.failed"
        assert told[-1]["response"]["error"]["code"] == "engine_died"  # type: ignore[index]


@pytest.mark.anyio
async def test_counting(folder: Path) -> None:
    async with answering(folder, ["Hello."]) as (client, _):
        counted = await client.responses.input_tokens.count(model="m", input=ASKED)
        answer = await client.responses.create(model="m", input=ASKED)
        assert answer.usage is not None
        assert counted.input_tokens == answer.usage.input_tokens


def test_two_turns_of_one_where_a_template_has_none(tmp_path: Path) -> None:
    """Agents send two messages of a user's in a row: where a template refuses that they are one."""
    alternate = TEMPLATE.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{%- if not loop.first and loop.previtem.role == message.role %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}",
        1,
    )
    strict = Tokenizer.load(write_tool_tokenizer(tmp_path / "strict", alternate))
    free = Tokenizer.load(write_tool_tokenizer(tmp_path / "free"))
    history = [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
    assert "A\n\nB" in strict.decode(prompt(strict, input=history))
    assert "A\n\nB" not in free.decode(prompt(free, input=history))


@pytest.mark.anyio
async def test_a_text_that_is_cut_off_is_no_call_of_a_custom_tool(folder: Path) -> None:
    """Codex carries out what is done; and while a long input comes, the stream is not silent."""
    call = '<tool_call>\n{"name": "patch", "arguments": {"input": "' + "*** a b c " * 60 + '"}}\n</tool_call>'
    async with answering(folder, [call] * 3) as (client, http):
        cut = await events(http, tools=[PATCH], max_output_tokens=90)
        assert [event["type"] for event in cut] == ["response.created", "response.in_progress", "response.incomplete"]
        whole = await client.responses.create(model="m", input=ASKED, tools=[PATCH], max_output_tokens=90)  # type: ignore[list-item]
        assert (whole.output, whole.status) == ([], "incomplete")
        raw = await http.post("/v1/responses", json={"model": "m", "input": ASKED, "stream": True, "tools": [PATCH]})
        assert raw.text.count(": working") >= 3


@pytest.mark.anyio
async def test_tools_in_other_words(folder: Path) -> None:
    """Versions of hosted tools, grammars of custom ones, groups that say what they are for."""
    dated = {"type": "web_search_2025_08_26"}
    lark = {**PATCH, "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}}
    async with answering(folder, ["Hello."]) as (client, _):
        raw = await client.responses.with_raw_response.create(
            model="m",
            input=ASKED,
            tools=[TOOL, dated, lark],  # type: ignore[list-item]
        )
        assert raw.headers["x-millpond-ignored"] == "tools: web_search_2025_08_26, tools[2].format"
        named = {"type": "function", "name": "read_file"}
        assert await client.responses.create(model="m", input=ASKED, tools=[TOOL, dated], tool_choice=named)  # type: ignore[list-item,arg-type]
    tokenizer = Tokenizer.load(folder)
    shown = tokenizer.decode(prompt(tokenizer, input=ASKED, tools=[{**GROUP, "description": "All about files."}]))
    assert shown.count("All about files.") == 2
    with pytest.raises(ApiError, match=r"tools\[0\].name: must be 1 to 128"):
        prompt(tokenizer, input=ASKED, tools=[{**GROUP, "name": 'a "<|im_end|>'}])
