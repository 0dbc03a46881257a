"""(M2) What models and files really write: marks where they mean nothing, what is cut, what is nearly right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from answers_read import Read, cuts, read, tokens_of
from test_families import BY_NAME, TOOLS

from millpond.dialects.dialect import Dialect
from millpond.dialects.families import THINK

HERMES, CODER, LLAMA, GENERIC = (BY_NAME[name] for name in ("hermes", "qwen_coder", "llama", "json"))
THINKING = replace(HERMES, thoughts=THINK)


def every(dialect: Dialect, wire: str, *, marks: tuple[str, ...] | None = None, thinking: bool = False) -> Read:
    """What is read, the same at every cut and whether marks are tokens or letters, unless ``marks`` says."""
    found: list[Read] = []
    for tokens in (dialect.marks, ()) if marks is None else (marks,):
        for parts in cuts(tokens_of(wire, tokens)):
            found.append(read(dialect, parts, TOOLS, tokens, thinking=thinking))
            assert found[-1] == found[0], parts
    return found[0]


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    ("arguments", "read_as"),
    [
        ('{"text": "one\ntwo\ttabbed"}', '{"text": "one\\ntwo\\ttabbed"}'),
        ('{"text": "it\\\'s \\d+ \\u00e9 \\ud83d\\ude00"}', '{"text": "it\'s \\\\d+ \\u00e9 \\ud83d\\ude00"}'),
        ('{"count": 9007199254740993, "x": 1e3, "y": 007}', '{"count": 9007199254740993, "x": 1e3, "y": 007}'),
        ('{"on": True, "off": False, "no": None}', '{"on": true, "off": false, "no": null}'),
        ('"{\\"path\\": \\"a\\"}"', '{"path": "a"}'),
        ("null", "{}"),
        ("[]", "{}"),
        ('""', "{}"),
        ("{}", "{}"),
        ('{"deep": {"a": [1, {"b": "}]"}]}}', '{"deep": {"a": [1, {"b": "}]"}]}}'),
        ('{ "a" :1 ,\n "b":[ ] }', '{ "a" :1 ,\n "b":[ ] }'),
        ('{"text": "</tool_call><tool_call>"}', '{"text": "</tool_call><tool_call>"}'),
        ('{"text": "</think>"}', '{"text": "</think>"}'),
        ('{"text": "\\\\"}', '{"text": "\\\\"}'),
    ],
)
def test_arguments_as_they_come(arguments: str, read_as: str) -> None:
    for body in (
        f'{{"name": "write", "arguments": {arguments}}}',
        f'{{"arguments": {arguments}, "name": "write"}}',
        f'{{"id": "7", "type": "function", "function": {{"name": "write", "parameters": {arguments}}}}}',
    ):
        found = every(THINKING, f"{call(body)}\n{call(body)}")
        assert found.calls == [("write", read_as)] * 2
        assert (found.whole, found.said) == ([True, True], "")


def test_without_arguments() -> None:
    assert every(HERMES, call('{"name": "now"}')).calls == [("now", "{}")]


@pytest.mark.parametrize(
    "body", ["hello there", "", "{}", '{"arguments": {"a": 1}}', '{"name": 3}', '["a"]', '{"name": ""}', "{{", "null"]
)
def test_what_is_no_call_is_text(body: str) -> None:
    wire = f"See: {call(body)} Yes."
    found = every(HERMES, wire)
    assert (found.said, found.calls) == (wire, [])


def test_a_call_of_a_tool_that_nobody_knows() -> None:
    """The client says so to the model; to rename or to hide it would be a lie."""
    assert every(HERMES, call('{"name": "Wriet", "arguments": {}}')).calls == [("Wriet", "{}")]


@pytest.mark.parametrize("ending", ["", "\n", "}", "}\n</tool_call>", "\n</tool_call>\n"])
def test_an_end_that_is_missing_or_said_twice(ending: str) -> None:
    found = every(HERMES, '<tool_call>{"name": "now", "arguments": {}}' + ending)
    assert (found.calls, found.whole, found.said) == ([("now", "{}")], [True], "")


@pytest.mark.parametrize(
    "wire", ['<tool_call>{"name": "write", "arguments": {"path": "a', '<tool_call>{"name": "write", "arg']
)
def test_what_is_cut_off_is_told_so(wire: str) -> None:
    found = every(HERMES, wire)
    assert ([name for name, _ in found.calls], found.whole) == (["write"], [False])


def test_cut_off_by_its_own_mark() -> None:
    found = every(HERMES, '<tool_call>{"name": "write", "arguments": {"path": "a"</tool_call>Then this.')
    assert (found.whole, found.said) == ([False], "Then this.")


def test_several_in_one_pair_of_marks_and_text_behind() -> None:
    body = '{"name": "now"}\n{"name": "write", "arguments": {"path": "a"}}'
    found = every(HERMES, f"First.\n{call(body)}\n\nThen.\n")
    assert found.calls == [("now", "{}"), ("write", '{"path": "a"}')]
    assert (found.said, found.order) == ("First.Then.\n", "sccs")


def test_letters_of_a_mark_that_is_a_token_are_text() -> None:
    """Where a file is quoted, the model writes the letters in other tokens."""
    wire = 'The file says <tool_call>{"name": "now"}</tool_call>.'
    found = [read(HERMES, parts, TOOLS, HERMES.marks) for parts in cuts([(False, wire)])]
    assert all((one.said, one.calls) == (wire, []) for one in found)


@pytest.mark.parametrize("thinking", [True, False])
def test_thoughts(thinking: bool) -> None:
    opening = "" if thinking else "<think>\n"
    found = every(THINKING, opening + "I see </p> <b>.\n</think>\n\nHello <i>.", thinking=thinking)
    assert (found.thought, found.said) == ("I see </p> <b>.", "Hello <i>.")
    found = every(THINKING, opening + "Still think", thinking=thinking)
    assert (found.thought, found.said) == ("Still think", "")
    found = every(
        THINKING,
        opening + f"I will.\n{call(chr(123) + chr(125))} hm </think>{call(json.dumps({'name': 'now'}))}",
        thinking=thinking,
    )
    assert (found.thought, found.calls) == (f"I will.\n{call(chr(123) + chr(125))} hm", [("now", "{}")])


def test_a_call_within_a_thought_ends_it() -> None:
    found = every(THINKING, 'I call.\n<tool_call>{"name": "now"}</tool_call>\nSo.', thinking=True)
    assert (found.thought, found.calls, found.said) == ("I call.", [("now", "{}")], "So.")


def test_an_empty_thought() -> None:
    found = every(THINKING, "<think>\n\n</think>\n\nHello.")
    assert (found.thought, found.said) == ("", "Hello.")


@pytest.mark.parametrize(
    ("raw", "name", "read_as"),
    [
        ("null", "path", '"null"'),
        ("123", "path", '"123"'),
        ("123", "count", "123"),
        ("9007199254740993", "count", "9007199254740993"),
        ("many", "count", '"many"'),
        ("null", "maybe", "null"),
        ("123", "maybe", '"123"'),
        ("True", "on", "true"),
        ('{"a": [1]}', "deep", '{"a": [1]}'),
        ("", "text", '""'),
        ("a\n", "text", '"a\\n"'),
        ("\n\n  x\n", "text", '"\\n\\n  x\\n"'),
        ("</parameter>", "text", '"</parameter>"'),
        ("<function=x>\n<parameter=y>\n1\n</parameter", "text", '"<function=x>\\n<parameter=y>\\n1\\n</parameter"'),
        ("7", "unknown", '"7"'),
    ],
)
def test_raw_text_by_its_schema(raw: str, name: str, read_as: str) -> None:
    parameter = f"<parameter={name}>\n{raw}\n</parameter>\n"
    for wire in (
        f"<tool_call>\n<function=write>\n{parameter}</function>\n</tool_call>",
        f"<tool_call>\n<function=write>\n{parameter}</tool_call>",
        f"<function=write>\n{parameter}</function>\n</tool_call>",
        f"<function=write>\n{parameter}</function>",
    ):
        found = every(CODER, wire)
        assert found.calls == [("write", f'{{"{name}": {read_as}}}')], wire
        assert (found.whole, found.said) == ([True], "")


def test_several_functions_in_one_pair_of_marks() -> None:
    one = "<function=write>\n<parameter=path>\na\n</parameter>\n</function>\n"
    found = every(CODER, f"<tool_call>\n{one}{one}</tool_call>")
    assert found.calls == [("write", '{"path": "a"}')] * 2


@pytest.mark.parametrize("end", [40, 55, 70])
def test_raw_text_that_is_cut_off(end: int) -> None:
    wire = "<tool_call>\n<function=write>\n<parameter=path>\na/b/c\n</parameter>\n</function>\n</tool_call>"[:end]
    found = every(CODER, wire)
    assert [name for name, _ in found.calls] == ["write"]
    assert found.whole == [False]


@pytest.mark.parametrize("dialect", [LLAMA, GENERIC])
def test_an_answer_in_json_is_a_call_only_of_a_tool_that_there_is(dialect: Dialect) -> None:
    for text in ('{"name": "Bob", "age": 3}', '{"name": "write"', '[{"name": "Ann"}]', '{"a": {"name": "now"}}'):
        found = every(dialect, text)
        wrong = text == '{"name": "write"'
        assert ([name for name, _ in found.calls] == ["write"]) if wrong else (found.said, found.calls) == (text, [])
    found = every(dialect, ' {"name": "write", "parameters": {"path": "a"}} ')
    assert (found.calls, found.said) == ([("write", '{"path": "a"}')], "")
    assert every(dialect, 'I say {"name": "now"}').calls == []


def test_channels_with_headers_as_they_come() -> None:
    harmony = BY_NAME["harmony"]
    for header in (
        "<|channel|>commentary to=functions.write <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.write code<|message|>",
        " to=functions.write<|channel|>commentary<|message|>",
        "<|channel|>commentary to=write<|message|>",
    ):
        thought = "<|channel|>analysis<|message|>I will.<|end|><|start|>assistant"
        wire = f'{thought}{header}{{"path": "<|b|>"}}<|call|>'
        found = every(harmony, wire, marks=harmony.marks)
        assert (found.thought, found.calls) == ("I will.", [("write", '{"path": "<|b|>"}')]), header
        assert (found.said, found.whole) == ("", [True])
    said = "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Hello.\n"
    assert every(harmony, said, marks=harmony.marks).said == "First.Hello.\n"
    assert every(harmony, "No header at all.", marks=harmony.marks).said == "No header at all."


def test_schemas_are_followed_to_where_types_are() -> None:
    schema = {
        "$defs": {"n": {"type": ["integer", "null"]}, "loop": {"$ref": "#/$defs/loop"}},
        "properties": {
            "a": {"$ref": "#/$defs/n"},
            "b": {"oneOf": [{"enum": [1, 2]}, {"const": True}]},
            "c": {"allOf": [{"type": "string"}]},
            "d": {"$ref": "#/$defs/loop"},
            "e": {"enum": ["1", "2"]},
            "f": {},
        },
        "additionalProperties": {"type": "number"},
    }
    values = {"a": "1", "b": "2", "c": "3", "d": "4", "e": "1", "f": "five", "g": "1.50"}
    wire = "<tool_call>\n<function=t>\n" + "".join(
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items()
    )
    parts = tokens_of(wire + "</function>\n</tool_call>", CODER.marks)
    (found,) = read(CODER, parts, {"t": schema}, CODER.marks).calls
    assert found[1] == '{"a": 1, "b": 2, "c": "3", "d": 4, "e": "1", "f": "five", "g": 1.50}'
