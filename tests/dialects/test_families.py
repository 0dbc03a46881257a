"""(M2) Each family's writing is read: calls as they were meant, at every cut, with marks as tokens and as letters."""

from __future__ import annotations

import json

import pytest
from answers_read import cuts, read, tokens_of

from millpond.dialects.families import BAR, BY_NAME

SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "deep": {"type": "object"},
        "on": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
TOOLS = {"write": SCHEMA, "now": {}}
ARGUMENTS = {"path": "/a b/ü.txt", "text": 'He said: "no\\n"\n  {x: [1, 2}\n</b>\n', "count": 9007199254740993}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = f'{{"name": "write", "arguments": {JSON}}}'
NOW = '{"name": "now", "arguments": {}}'
PYTHON = ", ".join(f"{name}={value!r}" for name, value in ARGUMENTS.items())


def tagged(opening: str, closing: str) -> str:
    return "\n".join(opening.format(name) + str(value) + closing for name, value in ARGUMENTS.items())


def gemma(quote: str) -> str:
    said = (
        f"{name}:{quote}{value}{quote}" if isinstance(value, str) else f"{name}:{value}"
        for name, value in ARGUMENTS.items()
    )
    return "call:write{" + ",".join(said) + "}"


WIRES = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
    "qwen_coder": "<tool_call>\n<function=write>\n"
    + tagged("<parameter={}>\n", "\n</parameter>")
    + "\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "<tool_call>write\n"
    + tagged("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>")
    + "\n</tool_call>\n<tool_call>now\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="write">\n'
    + tagged('<parameter name="{}">', "</parameter>")
    + '\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "deepseek_v32": f'<{BAR}DSML{BAR}function_calls>\n<{BAR}DSML{BAR}invoke name="write">\n'
    + "\n".join(
        f'<{BAR}DSML{BAR}parameter name="{name}" string="{str(isinstance(value, str)).lower()}">{value}'
        f"</{BAR}DSML{BAR}parameter>"
        for name, value in ARGUMENTS.items()
    )
    + f'\n</{BAR}DSML{BAR}invoke>\n<{BAR}DSML{BAR}invoke name="now">\n</{BAR}DSML{BAR}invoke>\n'
    f"</{BAR}DSML{BAR}function_calls>",
    "deepseek": (
        f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>write<{BAR}tool▁sep{BAR}>{JSON}<{BAR}tool▁call▁end{BAR}>"
        f"<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>now\n```json\n{{}}\n```<{BAR}tool▁call▁end{BAR}>"
        f"<{BAR}tool▁calls▁end{BAR}>"
    ),
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>"
    f"{JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "mistral": f"[TOOL_CALLS]write[CALL_ID]a1b2c3d4e[ARGS]{JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "mistral_v3": f"[TOOL_CALLS][{CALL}, {NOW}]",
    "deepseek_v3": f"<{BAR}tool▁calls▁begin{BAR}>"
    + "\n".join(
        f"<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>{name}\n```json\n{arguments}\n```<{BAR}tool▁call▁end{BAR}>"
        for name, arguments in (("write", JSON), ("now", "{}"))
    )
    + f"<{BAR}tool▁calls▁end{BAR}>",
    "lfm2": f"<|tool_call_start|>[write({PYTHON}), now()]<|tool_call_end|>",
    "llama4": f"<|python_start|>[write({PYTHON}), now()]<|python_end|>",
    "llama": f"<|python_tag|>{CALL.replace('arguments', 'parameters')}; {NOW}",
    "granite": f"<|tool_call|>[{CALL}, {NOW}]",
    "functools": f"functools[{CALL}, {NOW}]",
    "command": f"<|START_ACTION|>[\n{CALL.replace('name', 'tool_name', 1)},\n{NOW}\n]<|END_ACTION|>",
    "gemma4": f"<|tool_call>{gemma('<|' + chr(34) + '|>')}<tool_call|><|tool_call>call:now{{}}<tool_call|>",
    "functiongemma": f"<start_function_call>{gemma('<escape>')}<end_function_call>"
    "<start_function_call>call:now{}<end_function_call>",
    "harmony": "<|channel|>commentary to=functions.write <|constrain|>json<|message|>"
    f"{JSON}<|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}<|call|>",
    "json": f"{CALL}\n{NOW}",
}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("by_token", [True, False])
def test_calls_are_read_at_every_cut(name: str, by_token: bool) -> None:
    dialect, wire = BY_NAME[name], WIRES[name]
    marks = dialect.marks if by_token else ()
    for parts in cuts(tokens_of(wire, marks)):
        found = read(dialect, parts, TOOLS, marks)
        assert [call[0] for call in found.calls] == ["write", "now"], found
        assert json.loads(found.calls[0][1], strict=True) == ARGUMENTS
        assert found.calls[1][1] == "{}"
        assert found.whole == [True, True]
        assert (found.said, found.thought) == ("", "")


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"harmony", "json"}))
@pytest.mark.parametrize("by_token", [True, False])
def test_text_around_calls(name: str, by_token: bool) -> None:
    dialect = BY_NAME[name]
    marks = dialect.marks if by_token else ()
    wire = f"I will look. {{1}}\n\n{WIRES[name]}"
    for parts in cuts(tokens_of(wire, marks)):
        found = read(dialect, parts, TOOLS, marks)
        assert (found.said, [call[0] for call in found.calls]) == ("I will look. {1}", ["write", "now"])


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_called_where_there_are_no_tools(name: str) -> None:
    dialect = BY_NAME[name]
    if dialect.messages:
        return
    for parts in cuts(tokens_of(WIRES[name], ())):
        found = read(dialect, parts, None)
        assert (found.said, found.calls) == (WIRES[name], [])


@pytest.mark.parametrize(
    "text", ["", "Hello.", " a < b\n", "<tool", "{", '{"a": 1}', "[1, 2]", "[write", "\n\n", "x" * 50]
)
@pytest.mark.parametrize("name", BY_NAME)
def test_text_is_text(name: str, text: str) -> None:
    for parts in cuts([(False, text)] if text else []):
        found = read(BY_NAME[name], parts, TOOLS, BY_NAME[name].marks)
        assert (found.said, found.calls) == (text, [])


def test_white_space_at_the_end_of_a_message_is_told_once() -> None:
    wire = (
        "<|channel|>analysis<|message|>Well.\n\n<|end|><|start|>assistant<|channel|>final<|message|>Yes. \n<|return|>"
    )
    dialect = BY_NAME["harmony"]
    for parts in cuts(tokens_of(wire, dialect.marks)):
        found = read(dialect, parts, TOOLS, dialect.marks)
        assert (found.thought, found.said) == ("Well.\n\n", "Yes. \n")
