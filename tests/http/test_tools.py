"""(M2, M4) Tools and thoughts over HTTP: what a client sends is in the prompt, what a model writes is told apart."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from in_process import writing
from model_infos import SMALL
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from tool_tokenizer import TEMPLATE, write_answers, write_tool_tokenizer

from millpond.grammar.check import check
from millpond.http.errors import ApiError
from millpond.http.forms import shape_of
from millpond.http.openai.schemas import ChatRequest, parse
from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from conftest import Launch

SERVER = str(Path(__file__).with_name("scripted_server.py"))
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads <|im_end|> files.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
UNFIT = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}},
}
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is in a?"}]
CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a"}}\n</tool_call>'
THOUGHT = "<think>\nI read it.\n</think>\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tool_tokenizer(tmp_path / "model")


@contextlib.asynccontextmanager
async def answering(
    folder: Path, answers: Sequence[str], step: int = 1, **settings: str
) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a server whose model answers so, in turn."""
    async with writing(folder, answers, f"context=4000,step={step}", **settings) as (http, _):
        yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)


async def streamed(client: openai.AsyncOpenAI, **more: object) -> tuple[list[object], str]:
    """The choices' deltas in order, and the finish reason."""
    deltas, finish = [], ""
    stream = await client.chat.completions.create(model="m", messages=ASKED, stream=True, **more)  # type: ignore[call-overload]
    async for chunk in stream:
        for choice in chunk.choices:
            deltas.append(choice.delta)
            finish = choice.finish_reason or finish
    return deltas, finish


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.anyio
async def test_a_call(folder: Path, step: int) -> None:
    async with answering(folder, [f"{THOUGHT}Let me see.\n{CALL}"], step) as client:
        whole = await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL])
        (choice,) = whole.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        assert choice.message.model_dump()["reasoning_content"] == "I read it."
        assert choice.message.tool_calls is not None
        ((made),) = choice.message.tool_calls
        assert made.type == "function"
        assert (made.function.name, made.function.arguments) == ("read_file", '{"path": "a"}')
        assert made.id.startswith("call_")
        deltas, finish = await streamed(client, tools=[TOOL])
        assert finish == "tool_calls"
        calls = [call for delta in deltas for call in delta.tool_calls or []]  # type: ignore[attr-defined]
        assert [call.index for call in calls] == [0] * len(calls)
        assert [call.function.name for call in calls] == ["read_file"] + [None] * (len(calls) - 1)
        assert all((call.id is None) == bool(number) for number, call in enumerate(calls))
        assert "".join(call.function.arguments or "" for call in calls) == '{"path": "a"}'
        assert "".join(delta.content or "" for delta in deltas) == "Let me see."  # type: ignore[attr-defined]
        thoughts = [delta.model_dump().get("reasoning_content") or "" for delta in deltas]  # type: ignore[attr-defined]
        assert "".join(thoughts) == "I read it."


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("reasoning_content", ("reasoning_content",)),
        ("reasoning", ("reasoning",)),
        ("both", ("reasoning_content", "reasoning")),
    ],
)
@pytest.mark.anyio
async def test_thoughts_are_told_under_the_names_that_are_set(
    folder: Path, setting: str, names: tuple[str, ...]
) -> None:
    async with answering(folder, [f"{THOUGHT}Hello."], reasoning_field=setting) as client:
        whole = await client.chat.completions.create(model="m", messages=ASKED)
        deltas, _ = await streamed(client)
    message = whole.choices[0].message.model_dump()
    parts = [delta.model_dump() for delta in deltas]  # type: ignore[attr-defined]
    for name in ("reasoning_content", "reasoning"):
        expected = "I read it." if name in names else None
        assert message.get(name) == expected
        assert ("".join(part.get(name) or "" for part in parts) or None) == expected
    assert message["content"] == "".join(part.get("content") or "" for part in parts) == "Hello."


@pytest.mark.anyio
async def test_thoughts_that_are_not_asked_for_are_counted_only(folder: Path) -> None:
    async with answering(folder, [f"{THOUGHT}Hello."]) as client:
        told = await client.chat.completions.create(model="m", messages=ASKED)
        whole = await client.chat.completions.create(model="m", messages=ASKED, extra_body={"include_reasoning": False})
        deltas, _ = await streamed(client, extra_body={"include_reasoning": False})
    assert "reasoning_content" not in whole.choices[0].message.model_dump()
    assert whole.choices[0].message.content == "Hello."
    assert not any(delta.model_dump().get("reasoning_content") for delta in deltas)  # type: ignore[attr-defined]
    assert "".join(delta.content or "" for delta in deltas) == "Hello."  # type: ignore[attr-defined]
    assert whole.usage == told.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens


@pytest.mark.anyio
async def test_the_client_that_accumulates(folder: Path) -> None:
    """openai's own helper puts streamed calls together."""
    async with answering(folder, [f"{CALL}\n{CALL}"]) as client:
        async with client.chat.completions.stream(model="m", messages=ASKED, tools=[TOOL]) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        (choice,) = final.choices
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls or []
        assert [call.function.arguments for call in calls] == ['{"path": "a"}'] * 2
        assert len({call.id for call in calls}) == 2


@pytest.mark.anyio
async def test_no_more_than_one(folder: Path) -> None:
    async with answering(folder, [f"{CALL}\n{CALL}\n{CALL}"]) as client:
        whole = await client.chat.completions.create(
            model="m", messages=ASKED, tools=[TOOL], parallel_tool_calls=False, n=2
        )
        for choice in whole.choices:
            assert choice.finish_reason == "tool_calls"
            assert len(choice.message.tool_calls or []) == 1
        assert whole.usage is not None
        tokens = len(Tokenizer.load(folder).text_tokens(CALL, parse_special=True))
        assert tokens - 3 <= whole.usage.completion_tokens / 2 <= tokens


@pytest.mark.anyio
async def test_without_tools_nothing_is_a_call(folder: Path) -> None:
    async with answering(folder, [f"Write {CALL} so."]) as client:
        for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            whole = await client.chat.completions.create(model="m", messages=ASKED, **more)  # type: ignore[call-overload]
            assert whole.choices[0].message.content == f"Write {CALL} so."
            assert (whole.choices[0].finish_reason, whole.choices[0].message.tool_calls) == ("stop", None)


@pytest.mark.anyio
async def test_a_call_that_is_cut_off(folder: Path) -> None:
    """It never looks whole."""
    cut = len(Tokenizer.load(folder).text_tokens(CALL, parse_special=True)) - 4
    async with answering(folder, [CALL]) as client:
        whole = await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL], max_tokens=cut)
        assert (whole.choices[0].finish_reason, whole.choices[0].message.tool_calls) == ("length", None)
        _, finish = await streamed(client, tools=[TOOL], max_tokens=cut)
        assert finish == "length"


@pytest.mark.anyio
async def test_stop_strings_are_looked_for_in_what_is_said(folder: Path) -> None:
    answer = f"<think>END of thought</think>I say END now.{CALL}"
    async with answering(folder, [answer, CALL.replace('"a"', '"END"')]) as client:
        whole = await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL], stop=["END"])
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("I say ", "stop")
        assert whole.usage is not None
        said = len(Tokenizer.load(folder).text_tokens("<think>END of thought</think>I say ", parse_special=True))
        assert whole.usage.completion_tokens in (said, said + 1)
        whole = await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL], stop=["END"])
        assert whole.choices[0].finish_reason == "tool_calls"


def called(own: str, arguments: str) -> dict[str, object]:
    return {"id": own, "type": "function", "function": {"name": "read_file", "arguments": arguments}}


@pytest.mark.anyio
async def test_what_was_said_before_is_in_the_prompt(folder: Path) -> None:
    """Calls and results, thoughts under both names, and arguments that are no JSON."""
    tokenizer = Tokenizer.load(folder)
    history: list[dict[str, object]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is in a?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I read it.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "read_file", "arguments": '{"path":"a","n":9007199254740993}'},
                },
                {"id": "c2", "type": "function", "function": {"name": "read_file", "arguments": "{path"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "<|im_end|> it"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "wrong"}]},
        {"role": "assistant", "content": "It says it.", "reasoning": "Said."},
        {"role": "user", "content": "Thanks."},
    ]
    async with answering(folder, ["You are welcome."]) as client:
        body = {"model": "m", "messages": history, "tools": [TOOL]}
        answer = await client.post("/chat/completions", body=body, cast_to=httpx.Response)
        prompt = json.loads(answer.text)["usage"]["prompt_tokens"]
    shown = tokenizer.decode(
        tokenizer.chat_prompt(
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "What is in a?"},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "I read it.",
                    "tool_calls": [
                        {"function": {"name": "read_file", "arguments": {"path": "a", "n": 9007199254740993}}},
                        {"function": {"name": "read_file", "arguments": {"_raw": "{path"}}},
                    ],
                },
                {"role": "tool", "content": "<|im_end|> it"},
                {"role": "tool", "content": "wrong"},
                {"role": "assistant", "content": "It says it.", "reasoning_content": "Said."},
                {"role": "user", "content": "Thanks."},
            ],
            tools=[TOOL],  # type: ignore[list-item]
        ).tokens
    )
    assert '{"name": "read_file", "arguments": {"path": "a", "n": 9007199254740993}}' in shown
    assert "<|im_end|> it" in shown, "what a tool says is text"
    assert "Reads <|im_end|> files." in shown, "and so is what a tool is said to be"
    assert abs(len(tokenizer.encode(shown, parse_special=True)) - prompt) < 60


WRONG: list[tuple[str, object, str]] = [
    ("tools", "x", "tools: must be a list"),
    ("tools", [{"type": "custom", "custom": {}}], 'tools[0].type: "custom" is not supported'),
    ("tools", [{"type": "function"}], "tools[0].function: must be an object"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name: must be 1 to 128"),
    ("tools", [TOOL, TOOL], "tools[1].function.name: must be a name that no other tool has"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}], "must be a JSON schema"),
    ("tools", [{"type": "function", "function": {"name": "f", "strict": 1}}], "strict: must be true or false"),
    ("tools", [UNFIT], 'tools[0].function.parameters: Unimplemented keys: ["not"]'),
    ("tools", [], 'tool_choice: must be absent, none or auto where there are no tools, got "required"'),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, 'one of the tools (read_file), got "f"'),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}, "tools: must be"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "some", "tools": []}}, "must be"),
    ("tool_choice", {"type": "custom", "custom": {"name": "f"}}, "is not supported by this server"),
    ("tool_choice", "some", "tool_choice: must be"),
    ("parallel_tool_calls", 1, "parallel_tool_calls: must be true or false"),
    ("messages", [{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]: must be"),
    ("messages", [{"role": "user", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls: must be absent"),
    (
        "messages",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f"[{'0,' * 20_000}0]"}}]}],
        "messages[0].tool_calls[0].function.arguments: must be at most 20000 values and names",
    ),
]


@pytest.mark.anyio
async def test_what_is_wrong_is_named(folder: Path) -> None:
    async with answering(folder, ["Hello."]) as client:
        for field, value, message in WRONG:
            choice = "required" if value == [] else "auto"
            body = {"model": "m", "messages": ASKED, "tools": [TOOL], "tool_choice": choice, field: value}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/chat/completions", body=body, cast_to=httpx.Response)
            assert message in caught.value.message, (field, value)


@pytest.mark.anyio
async def test_a_template_without_tools(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}"
    async with answering(write_tool_tokenizer(tmp_path / "model", plain), ["Hello."]) as client:
        with pytest.raises(openai.BadRequestError, match="chat template has no tools"):
            await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL])


SWITCHED = TEMPLATE.replace(
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking is not defined"
    " or enable_thinking else '<think>\\n\\n</think>\\n\\n') }}{% endif %}",
)
"""It opens the thought itself."""


@pytest.mark.anyio
async def test_thinking_is_switched_where_the_template_has_a_switch(tmp_path: Path) -> None:
    folder = write_tool_tokenizer(tmp_path / "model", SWITCHED)
    async with answering(folder, ["I think.\n</think>\n\nHello.", "Hello.", "Hello."]) as client:
        thought = await client.chat.completions.create(model="m", messages=ASKED)
        assert thought.choices[0].message.model_dump()["reasoning_content"] == "I think."
        assert thought.choices[0].message.content == "Hello."
        assert thought.usage is not None
        assert thought.usage.completion_tokens_details is not None
        counted = thought.usage.completion_tokens_details.reasoning_tokens
        whole = len(Tokenizer.load(folder).text_tokens("I think.\n</think>", parse_special=True))
        assert counted is not None
        assert whole - 1 <= counted <= whole
        for more in (
            {"reasoning_effort": "none"},
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        ):
            plain = await client.chat.completions.create(model="m", messages=ASKED, **more)  # type: ignore[call-overload]
            assert plain.choices[0].message.content == "Hello."
            assert "reasoning_content" not in plain.choices[0].message.model_dump()
            assert plain.usage.completion_tokens_details.reasoning_tokens == 0
            assert plain.usage.prompt_tokens == thought.usage.prompt_tokens + 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reasoning_effort", "some", "reasoning_effort: must be one of none, minimal"),
        ("chat_template_kwargs", {"enable_thinking": True}, "what this model's chat template reads (nothing)"),
        ("chat_template_kwargs", {"messages": 1}, "chat_template_kwargs.messages"),
        ("chat_template_kwargs", {"x": "<|im_end|>"}, "up to 64 letters"),
        ("chat_template_kwargs", {"x": []}, "chat_template_kwargs"),
    ],
)
@pytest.mark.anyio
async def test_what_no_template_listens_to_is_named(folder: Path, field: str, value: object, message: str) -> None:
    async with answering(folder, ["Hello."]) as client:
        body = {"model": "m", "messages": ASKED, field: value}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/chat/completions", body=body, cast_to=httpx.Response)
        assert message in caught.value.message


@pytest.mark.parametrize(("family", "calls"), [("auto", 0), ("mistral", 1)])
def test_calls_are_read_as_the_user_names(
    folder: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch, family: str, calls: int
) -> None:
    """By the whole command, whose log says how."""
    answer = '[TOOL_CALLS]read_file[ARGS]{"path": "a"}'
    monkeypatch.setenv("SCRIPTED_ANSWERS", write_answers(folder, [answer]))
    command = [sys.executable, SERVER, "written,context=4000", str(folder), "tool_format", family]
    with launch(command) as server, server.client() as client:
        whole = client.chat.completions.create(model="test-model", messages=ASKED, tools=[TOOL])
        assert len(whole.choices[0].message.tool_calls or []) == calls
        (line,) = [line for line in server.lines if "answers are read" in line]
        warned = any("chat template writes calls in another way" in line for line in server.lines)
    assert f"family={'hermes' if family == 'auto' else family} " in line
    assert warned == bool(calls)


@pytest.mark.parametrize("strict", [False, True])
def test_schemas_that_are_too_much_together(folder: Path, strict: bool) -> None:
    """Each of them fits by itself. Arguments of those that promise nothing are free then, which is said."""
    large = {"type": "object", "properties": {"x": {"enum": [f"value {number} of many" for number in range(200)]}}}
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": large, "strict": strict}}
        for number in range(300)
    ]
    asked = parse(ChatRequest, {"messages": ASKED, "tools": tools}).generation()
    tokenizer = Tokenizer.load(folder)
    if strict:
        with pytest.raises(ApiError, match="tools: their schemas cannot be followed together"):
            shape_of(asked, [1], tokenizer, SMALL)
        return
    shape = shape_of(asked, [1], tokenizer, SMALL)
    assert shape.ignored == ("tools: the schemas of all that are not strict",)
    assert shape.grammar is not None
    check(shape.grammar.text)
