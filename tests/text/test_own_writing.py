"""(M2) How a model writes calls and thoughts is found in what its own chat template writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizers import byte_level_backend, write_folder
from tokenizers import AddedToken
from tool_tokenizer import TEMPLATE, write_tool_tokenizer

from millpond.dialects.families import BY_NAME, PARSERS
from millpond.dialects.pieces import CallBegun, CallText, Piece, Said, Thought
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import Tokenizer

TURNS = """
{%%- if tools %%}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%% endif %%}
{%%- for m in messages %%}
{{- '<|im_start|>' + m.role + '\\n' }}
{%%- if m.reasoning_content %%}{{ '%(think)s\\n' + m.reasoning_content + '\\n%(thought)s\\n\\n' }}{%% endif %%}
{{- m.content or '' }}
{%%- for call in m.tool_calls or [] %%}%(call)s{%% endfor %%}
{{- '<|im_end|>\\n' }}
{%%- endfor %%}
{%%- if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"""
JSON = """{"name": "{{ call.function.name }}", "%s": {{ call.function.arguments | tojson }}}"""
HERMES = f"<tool_call>\n{JSON % 'arguments'}\n</tool_call>"
CODER = (
    "<tool_call>\n<function={{ call.function.name }}>\n{% for k, v in call.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
GLM = (
    "<tool_call>{{ call.function.name }}\n{% for k, v in call.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>"
)
MISTRAL = "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
LEADING = JSON % "parameters"
ODD = f"<longcat_tool_call>\n{JSON % 'arguments'}\n</longcat_tool_call>"
MARKS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<arg_key>", "</arg_key>"),
    *("<|calls|>", "<|/calls|>", "<longcat_tool_call>", "</longcat_tool_call>"),
)
LISTED = f"<|calls|>[{JSON % 'parameters'}]<|/calls|>"


def folder_of(
    path: Path,
    call: str,
    *,
    marks: tuple[str, ...] = (),
    think: str = "<think>",
    thought: str = "</think>",
    **more: object,
) -> Path:
    """A model whose template writes calls so, with those added tokens."""
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    template = TURNS % {"call": call, "think": think, "thought": thought}
    settings = {"chat_template": template, "eos_token": "<|im_end|>", **more}
    return write_folder(path, backend, settings, {"model_type": "llama", "vocab_size": 1000})


def read(tokenizer: Tokenizer, answer: str) -> list[Piece]:
    tools = {"f": {"type": "object", "properties": {"path": {"type": "string"}}}}
    reading = tokenizer.read_answer(StopStrings(()), [], tools)
    tokens = tokenizer.text_tokens(answer, parse_special=True)
    return [*reading.add(tokens).pieces, *reading.finish().pieces]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (HERMES, "hermes"),
        (CODER, "qwen_coder"),
        (GLM, "glm"),
        (MISTRAL, "mistral"),
        (LEADING, "json"),
        (ODD, "template"),
        (LISTED, "template"),
    ],
)
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
def test_what_the_template_writes_is_read(tmp_path: Path, call: str, name: str, tokens: bool) -> None:
    marks = (
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<arg_key>",
        "</arg_key>",
        "<|calls|>",
        "<|/calls|>",
    )
    own = tuple(mark for mark in (*marks, "<longcat_tool_call>", "</longcat_tool_call>") if mark in call)
    tokenizer = Tokenizer.load(folder_of(tmp_path, call, marks=own if tokens else ()))
    assert tokenizer.dialect.name == name
    assert (tokenizer.family.how, tokenizer.family.read) == ("what its chat template writes", True)
    written = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"path": "a"}}\n</tool_call>',
        "qwen_coder": "<tool_call>\n<function=f>\n<parameter=path>\na\n</parameter>\n</function>\n</tool_call>",
        "glm": "<tool_call>f\n<arg_key>path</arg_key>\n<arg_value>a</arg_value>\n</tool_call>",
        "mistral": '[TOOL_CALLS]f[ARGS]{"path": "a"}',
        "json": '{"name": "f", "parameters": {"path": "a"}}',
    }
    odd = {ODD: '<longcat_tool_call>\n{"name": "f", "arguments": {"path": "a"}}\n</longcat_tool_call>'}
    listed = {LISTED: '<|calls|>[{"name": "f", "parameters": {"path": "a"}}]<|/calls|>'}
    pieces = read(tokenizer, written.get(name) or {**odd, **listed}[call])
    assert [piece.name for piece in pieces if isinstance(piece, CallBegun)] == ["f"]
    assert json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallText))) == {"path": "a"}
    assert not "".join(piece.text for piece in pieces if isinstance(piece, Said)).strip()


def test_marks_that_are_there_for_another_reason(tmp_path: Path) -> None:
    """As in the vocabulary of a model that was trained on with another template."""
    folder = folder_of(tmp_path, HERMES, marks=("<|python_tag|>", "<|tool_call_start|>", "[TOOL_CALLS]", "[ARGS]"))
    family = Tokenizer.load(folder).family
    assert (family.dialect.name, family.how) == ("hermes", "what its chat template writes")


@pytest.mark.parametrize(("parser", "name"), PARSERS.items())
def test_what_the_folder_declares(tmp_path: Path, parser: str, name: str) -> None:
    """It counts where the template shows no call, and not where the template writes otherwise."""
    silent = folder_of(tmp_path / "silent", "{{ '' }}", tool_parser_type=parser)
    family = Tokenizer.load(silent).family
    assert (family.dialect.name, family.how) == (name, f"tool_parser_type {parser}")
    spoken = folder_of(tmp_path / "spoken", MISTRAL, marks=("[TOOL_CALLS]", "[ARGS]"), tool_parser_type=parser)
    assert Tokenizer.load(spoken).family.dialect.name == "mistral"


def test_a_parser_that_nobody_knows(tmp_path: Path) -> None:
    assert Tokenizer.load(folder_of(tmp_path, HERMES, tool_parser_type="xlam")).dialect.name == "hermes"


@pytest.mark.parametrize("name", BY_NAME)
def test_what_the_user_names_counts(tmp_path: Path, name: str) -> None:
    """It is said where the template writes otherwise."""
    family = Tokenizer.load(folder_of(tmp_path, HERMES, marks=("<tool_call>", "</tool_call>")), name).family
    assert (family.dialect.name, family.how) == (name, "--tool-format")
    assert family.read == (name in ("hermes", "harmony"))  # the second is not tried


def test_a_writing_that_nobody_reads(tmp_path: Path) -> None:
    odd = "~~{{ call.function.name }}~~{{ call.function.arguments | tojson }}~~"
    family = Tokenizer.load(folder_of(tmp_path, odd)).family
    assert (family.dialect.name, family.read) == ("json", False)


def test_thoughts_as_the_template_writes_them(tmp_path: Path) -> None:
    marks = ("<musing>", "</musing>")
    tokenizer = Tokenizer.load(folder_of(tmp_path, HERMES, marks=marks, think=marks[0], thought=marks[1]))
    assert tokenizer.dialect.thoughts == marks
    thought = [
        piece for piece in read(tokenizer, "<musing>\nI see.\n</musing>\n\nHello.") if isinstance(piece, Thought)
    ]
    assert "".join(piece.text for piece in thought) == "I see."


def test_thoughts_as_the_folder_declares_them(tmp_path: Path) -> None:
    """In a template that shows none."""
    declared = {"fields": {"reasoning_content": {"open": "<|muse|>", "close": "<|/muse|>", "content": "text"}}}
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    folder = write_tool_tokenizer(tmp_path, template)
    assert Tokenizer.load(folder).dialect.thoughts == ("<think>", "</think>")  # its vocabulary has them
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": declared}))
    assert Tokenizer.load(folder).dialect.thoughts == ("<|muse|>", "<|/muse|>")


@pytest.mark.parametrize(
    "declared", [{"fields": 1}, {"fields": {"thinking": 1}}, {"fields": {"thinking": {"open": 1}}}, 1]
)
def test_a_declaration_that_is_none(tmp_path: Path, declared: object) -> None:
    assert Tokenizer.load(folder_of(tmp_path, HERMES, response_template=declared)).dialect.thoughts == (
        "<think>",
        "</think>",
    )


def test_without_tools_in_the_template_nothing_is_called(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{%- if tools %}", "{%- if false %}").replace("for tool in tools", "for tool in []")
    tokenizer = Tokenizer.load(write_tool_tokenizer(tmp_path, template), "hermes")
    assert not tokenizer.dialect.calls_tools


def test_a_vocabulary_that_cannot_spell_the_call(tmp_path: Path) -> None:
    """It is loaded all the same: the marks are all that there is to go by."""
    folder = folder_of(tmp_path, HERMES, marks=("<tool_call>", "</tool_call>"))
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    added = [token | {"id": 1 + number} for number, token in enumerate(stored["added_tokens"])]
    (folder / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": added}))
    family = Tokenizer.load(folder).family
    assert (family.dialect.name, family.how) == ("hermes", "its marks")
