"""A client hears which part of its request is the first that the prefix cache does not know."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import INFO
from tool_tokenizer import TEMPLATE, write_tool_tokenizer

from millpond.http.anthropic.schemas import parse as parse_messages
from millpond.http.generation_request import GenerationRequest
from millpond.http.openai.schemas import ChatRequest, parse
from millpond.http.places import HEADER_TOKENS
from millpond.http.prompts import TokenPrompt, read_prompts
from millpond.http.responses.schemas import parse as parse_responses
from millpond.text.tokenizer import Tokenizer

Json = dict[str, Any]
Change = Callable[[Json], None]
ROOM = msgspec.structs.replace(INFO, context_length=1 << 20)
FUNCTIONS = [
    {"name": name, "description": f"Looks {name} up.", "parameters": {"type": "object", "properties": {}}}
    for name in ("town", "river")
]
CHAT: Json = {
    "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
    "messages": [
        {"role": "system", "content": "You know all towns."},
        {"role": "user", "content": "Where is Uppsala?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "town", "arguments": '{"a": "Uppsala"}'}}
            ],
        },
        {"role": "tool", "content": "In Sweden.", "tool_call_id": "1"},
        {"role": "assistant", "content": "In Sweden, they say."},
        {"role": "user", "content": "And Lund?"},
    ],
}
MESSAGES: Json = {
    "max_tokens": 9,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0;"},
        {"type": "text", "text": "You know all towns."},
    ],
    "tools": [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in FUNCTIONS],
    "messages": [
        {"role": "user", "content": "Where is Uppsala?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "1", "name": "town", "input": {"a": "Uppsala"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "In Sweden."},
                {"type": "text", "text": "And Lund?"},
            ],
        },
    ],
}
RESPONSES: Json = {
    "instructions": "You know all towns.",
    "tools": [{"type": "function", **function} for function in FUNCTIONS],
    "input": [
        {"role": "user", "content": "Where is Uppsala?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm, Uppsala."}]},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "1", "name": "town", "arguments": '{"a": "Uppsala"}'},
        {"type": "function_call_output", "call_id": "1", "output": "In Sweden."},
        {"role": "user", "content": "And Lund?"},
    ],
}


def asked_chat(body: Json) -> GenerationRequest:
    return parse(ChatRequest, body).generation()


def asked_messages(body: Json) -> GenerationRequest:
    return parse_messages(body).generation()


def asked_responses(body: Json) -> GenerationRequest:
    request = parse_responses(body)
    return request.generation(request.input, [])


def set_to(*path: str | int, value: object) -> Change:
    def change(body: Json) -> None:
        inner: Any = body
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    return change


def added(name: str, value: object) -> Change:
    return lambda body: body[name].append(value)


CASES: dict[str, tuple[Callable[[Json], GenerationRequest], Json, Change, str]] = {
    "nothing": (asked_chat, CHAT, lambda _: None, ""),
    "its system message": (asked_chat, CHAT, set_to("messages", 0, "content", value="You know towns."), "messages[0]"),
    "more of it": (asked_chat, CHAT, set_to("messages", 0, "content", value="You know all towns. All."), "messages[0]"),
    "less of it": (asked_chat, CHAT, set_to("messages", 0, "content", value="You know all towns"), "messages[0]"),
    "a tool": (asked_chat, CHAT, set_to("tools", 1, "function", "description", value="Of rivers."), "tools"),
    "a tool more": (asked_chat, CHAT, added("tools", {"type": "function", "function": {"name": "lake"}}), "tools"),
    "the first tool": (asked_chat, CHAT, lambda body: body["tools"].pop(0) and None, "tools"),
    "a question": (asked_chat, CHAT, set_to("messages", 1, "content", value="Where is Umeå?"), "messages[1]"),
    "its end": (asked_chat, CHAT, set_to("messages", 1, "content", value="Where is Uppsala? Say."), "messages[1]"),
    "an answer": (asked_chat, CHAT, set_to("messages", 2, "content", value="I see."), "messages[2]"),
    "a call": (
        asked_chat,
        CHAT,
        set_to("messages", 2, "tool_calls", 0, "function", "arguments", value='{"a": "Umeå"}'),
        "messages[2].tool_calls",
    ),
    "a result": (asked_chat, CHAT, set_to("messages", 3, "content", value="In Finland."), "messages[3]"),
    "what is new": (asked_chat, CHAT, added("messages", {"role": "user", "content": "And Umeå?"}), "messages[6]"),
    "who says it": (asked_chat, CHAT, set_to("messages", 4, "role", value="user"), "messages[4]"),
    "a message less": (asked_chat, CHAT, lambda body: body["messages"].pop(4) and None, "messages[4]"),
    "messages: another bill": (
        asked_messages,
        MESSAGES,
        set_to("system", 0, "text", value="x-anthropic-billing-header: cc_version=2; cch=77;"),
        "",
    ),
    "messages: system": (asked_messages, MESSAGES, set_to("system", 1, "text", value="You know."), "system"),
    "messages: a tool": (asked_messages, MESSAGES, set_to("tools", 0, "description", value="Towns."), "tools"),
    "messages: a call": (
        asked_messages,
        MESSAGES,
        set_to("messages", 1, "content", 1, "input", value={"a": "Umeå"}),
        "messages[1].tool_calls",
    ),
    "messages: a result": (
        asked_messages,
        MESSAGES,
        set_to("messages", 2, "content", 0, "content", value="Nowhere."),
        "messages[2].content[0]",
    ),
    "messages: a question": (
        asked_messages,
        MESSAGES,
        set_to("messages", 2, "content", 1, "text", value="And Umeå?"),
        "messages[2]",
    ),
    "responses: instructions": (asked_responses, RESPONSES, set_to("instructions", value="You."), "instructions"),
    "responses: a tool": (asked_responses, RESPONSES, set_to("tools", 0, "description", value="Towns."), "tools"),
    "responses: an answer": (asked_responses, RESPONSES, set_to("input", 2, "content", value="I see."), "input[1]"),
    "responses: a call": (
        asked_responses,
        RESPONSES,
        set_to("input", 3, "arguments", value="{}"),
        "input[1].tool_calls",
    ),
    "responses: a result": (asked_responses, RESPONSES, set_to("input", 4, "output", value="Nowhere."), "input[4]"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tool_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def prompt_of(asked: GenerationRequest, tokenizer: Tokenizer) -> TokenPrompt:
    return read_prompts(asked, tokenizer, ROOM)[0]


def known(now: TokenPrompt, before: TokenPrompt) -> int:
    """Leading tokens that a cache would know."""
    pairs = zip(now.tokens, before.tokens, strict=False)
    return next(
        (index for index, (new, old) in enumerate(pairs) if new != old), min(len(now.tokens), len(before.tokens))
    )


@pytest.mark.parametrize("case", CASES)
def test_what_changed_is_named(tokenizer: Tokenizer, case: str) -> None:
    """(M7) As the client knows it, by whichever API it asks."""
    asked, body, change, name = CASES[case]
    changed = deepcopy(body)
    change(changed)
    now = prompt_of(asked(changed), tokenizer)
    assert now.places.at(known(now, prompt_of(asked(body), tokenizer))) == name


WORDS = st.text(st.sampled_from('aeinst .,\n"\\<é中🎉'), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(WORDS, min_size=2, max_size=9), data=st.data())
def test_a_message_that_changed_is_named(tokenizer: Tokenizer, texts: list[str], data: st.DataObject) -> None:
    """(M7) Whatever it says, and whatever the others do."""
    index, other = data.draw(st.integers(0, len(texts) - 1)), data.draw(WORDS)

    def made(texts: list[str]) -> TokenPrompt:
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
        return prompt_of(asked_chat({"messages": messages}), tokenizer)

    before, now = made(texts), made([*texts[:index], other, *texts[index + 1 :]])
    differs = known(now, before)
    named = {f"messages[{index}]" if differs < len(now.tokens) else ""}
    if index % 2 and now.tokens[differs : differs + 1] == tokenizer.encode("<|im_end|>", parse_special=True):
        # An answer that was longer before looks like one that was drawn so and goes on.
        named |= {f"messages[{index + 1}]" if index + 1 < len(texts) else ""}
    assert now.places.at(differs) in named


@pytest.mark.parametrize(
    ("asked", "body", "last", "name"),
    [
        (asked_chat, CHAT, 3, "messages[3]"),
        (asked_chat, CHAT, 5, "messages[5]"),
        (asked_messages, MESSAGES, 2, "messages[2].content[0]"),
        (asked_responses, RESPONSES, 4, "input[4]"),
    ],
)
def test_a_conversation_that_goes_on(
    tokenizer: Tokenizer, asked: Callable[[Json], GenerationRequest], body: Json, last: int, name: str
) -> None:
    """(M7) An answer is known without the token that ended it: the next turn leaves it at its first new message."""
    field = "input" if "input" in body else "messages"
    now = prompt_of(asked({**body, field: body[field][: last + 1]}), tokenizer)
    before = prompt_of(asked({**body, field: body[field][:last]}), tokenizer)
    ended = [place for place in range(known(now, before)) if now.tokens[place] in tokenizer.eos_token_ids]
    assert now.places.at(ended[-1]) == name


def test_what_a_template_says_by_itself(tmp_path: Path) -> None:
    """(M7) Another day is not the client's doing."""
    days = [
        Tokenizer.load(
            write_tool_tokenizer(tmp_path / day, f"Today is {day}, and so on until the evening.\n{TEMPLATE}")
        )
        for day in ("Monday the 1st", "Tuesday the 2nd")
    ]
    asked = asked_chat({"messages": [{"role": "user", "content": "Hello!"}]})
    before, now = (prompt_of(asked, day) for day in days)
    assert now.places.at(known(now, before)) == "template"
    assert now.places.at(len(now.tokens) - HEADER_TOKENS) == "messages[0]"


def test_tools_behind_the_beginning(tmp_path: Path) -> None:
    """(M7) Some templates show them before the last question."""
    template = """
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]\n{% endif %}{{ message.content + '<|im_end|>' }}{% endfor %}"""
    model = Tokenizer.load(write_tool_tokenizer(tmp_path / "model", template))
    body = {"messages": [{"role": "user", "content": "user"}] * 3, "tools": deepcopy(CHAT["tools"])}
    before = prompt_of(asked_chat(body), model)
    set_to("tools", 0, "function", "description", value="Another one.")(body)
    now = prompt_of(asked_chat(body), model)
    assert now.places.at(known(now, before)) == "tools"


def test_a_template_that_says_things_twice(tmp_path: Path) -> None:
    """Nothing is named rather than the wrong thing."""
    model = Tokenizer.load(write_tool_tokenizer(tmp_path / "model", TEMPLATE + "{{ messages[0].content }}"))
    assert prompt_of(asked_chat({"messages": [{"role": "user", "content": "Hello!"}]}), model).places.names == ()


def test_a_real_tokenizer(smollm2_folder: Path) -> None:
    """(M7) Words of many letters, and white space that belongs to them."""
    tokenizer = Tokenizer.load(smollm2_folder)
    texts = ("Hi <b>\n there", " Né. ", "and 中 then <|im_end|> 🎉", "so")
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    body: Json = {"messages": messages}
    before = prompt_of(asked_chat(body), tokenizer)
    for index in range(4):
        changed = deepcopy(body)
        changed["messages"][index]["content"] += ", or not"
        now = prompt_of(asked_chat(changed), tokenizer)
        assert now.places.at(known(now, before)) == f"messages[{index}]"


def test_marks_of_a_client_are_positions(tokenizer: Tokenizer) -> None:
    """(M7) Up to the next message's own text: tools behind the first system message, and its head, are shared, too."""
    body = deepcopy(MESSAGES)
    body["tools"][1]["cache_control"] = body["messages"][1]["content"][1]["cache_control"] = {"type": "ephemeral"}
    now = prompt_of(asked_messages(body), tokenizer)
    shared = [b"".join(tokenizer.spelled(now.tokens[:position])).decode() for position in now.shared]
    assert [text.rpartition("\n")[2] for text in shared] == ["", ""]
    assert shared[0].endswith("</tool_call><|im_end|>\n<|im_start|>user\n")
    assert shared[1].endswith("<tool_response>\n")
    assert "Looks river up." in shared[0]
    set_to("messages", 0, "content", value="Who are you?")(body)
    other = prompt_of(asked_messages(body), tokenizer)
    assert other.shared[0] == now.shared[0] <= known(other, now)
    assert prompt_of(asked_messages(MESSAGES), tokenizer).shared == ()


@pytest.mark.parametrize("place", [("system", 1), ("messages", 2, "content", 1)])
def test_a_mark_where_nothing_is_behind_or_much(tokenizer: Tokenizer, place: tuple[str | int, ...]) -> None:
    """(M7) The end of a prompt is kept in any case."""
    body = deepcopy(MESSAGES)
    set_to(*place, "cache_control", value={"type": "ephemeral"})(body)
    assert len(prompt_of(asked_messages(body), tokenizer).shared) == (place[0] == "system")
