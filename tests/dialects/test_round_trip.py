"""(M2) Whatever arguments are: written as a family's template writes them, cut anywhere, they are read as they were."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from answers_read import read, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from test_families import BY_NAME

from millpond.dialects.families import BAR

NAMES = st.text("abc_XYZ09", min_size=1, max_size=8).map(lambda name: "k" + name)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
PLAIN = TEXTS.filter(lambda text: "<" not in text)
"""Without what might be one of a family's marks."""
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)


def values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[object]:
    scalars: st.SearchStrategy[object] = SCALARS | texts
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


Arguments = dict[str, object]


def dumped(arguments: Arguments) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def python(value: object) -> str:
    return repr(value)


def gemma(value: object, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return "[" + ",".join(gemma(part, quote) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{gemma(part, quote)}" for name, part in value.items()) + "}"
    return json.dumps(value)


def raw(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


WRITTEN: dict[str, Callable[[Arguments], str]] = {
    "hermes": lambda all_: f'<tool_call>\n{{"name": "f", "arguments": {dumped(all_)}}}\n</tool_call>',
    "llama": lambda all_: f'{{"name": "f", "parameters": {dumped(all_)}}}',
    "mistral": lambda all_: f"[TOOL_CALLS]f[ARGS]{dumped(all_)}",
    "deepseek": lambda all_: (
        f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>f<{BAR}tool▁sep{BAR}>{dumped(all_)}"
        f"<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>"
    ),
    "kimi": lambda all_: (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        f"{dumped(all_)}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "harmony": lambda all_: f"<|channel|>commentary to=functions.f<|message|>{dumped(all_)}<|call|>",
    "lfm2": lambda all_: (
        f"<|tool_call_start|>[f({', '.join(f'{name}={python(value)}' for name, value in all_.items())})]"
        "<|tool_call_end|>"
    ),
    "gemma4": lambda all_: f"<|tool_call>call:f{gemma(all_, '<|' + chr(34) + '|>')}<tool_call|>",
    "qwen_coder": lambda all_: (
        "<tool_call>\n<function=f>\n"
        + "".join(f"<parameter={name}>\n{raw(value)}\n</parameter>\n" for name, value in all_.items())
        + "</function>\n</tool_call>"
    ),
    "glm": lambda all_: (
        "<tool_call>f\n"
        + "".join(f"<arg_key>{name}</arg_key>\n<arg_value>{raw(value)}</arg_value>\n" for name, value in all_.items())
        + "</tool_call>"
    ),
    "minimax": lambda all_: (
        '<minimax:tool_call>\n<invoke name="f">\n'
        + "".join(f'<parameter name="{name}">{raw(value)}</parameter>\n' for name, value in all_.items())
        + "</invoke>\n</minimax:tool_call>"
    ),
    "deepseek_v32": lambda all_: (
        f'<{BAR}DSML{BAR}function_calls>\n<{BAR}DSML{BAR}invoke name="f">\n'
        + "".join(
            f'<{BAR}DSML{BAR}parameter name="{name}" string="{str(isinstance(value, str)).lower()}">{raw(value)}'
            f"</{BAR}DSML{BAR}parameter>\n"
            for name, value in all_.items()
        )
        + f"</{BAR}DSML{BAR}invoke>\n</{BAR}DSML{BAR}function_calls>"
    ),
}
RAW = ("qwen_coder", "glm", "minimax", "deepseek_v32")
"""Texts stand as they are there, so that only the type in the schema tells `1` from `"1"`."""


def schema_of(arguments: Arguments) -> dict[str, object]:
    types = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return {"properties": {name: {"type": types.get(type(value), "null")} for name, value in arguments.items()}}


@pytest.mark.often("hermes", "harmony", "qwen_coder", "mistral", "deepseek_v32")
@pytest.mark.parametrize("name", WRITTEN)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject) -> None:
    texts = PLAIN if name == "gemma4" or name in RAW else TEXTS
    arguments = data.draw(st.dictionaries(NAMES, values(texts), max_size=4))
    dialect = BY_NAME[name]
    wire = WRITTEN[name](arguments)
    marks = dialect.marks if data.draw(st.booleans()) or name == "harmony" else ()
    parts = [
        (is_mark, piece)
        for is_mark, whole in tokens_of(wire, marks)
        for piece in ([whole] if is_mark else cut(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=4))))
    ]
    found = read(dialect, parts, {"f": schema_of(arguments)}, marks)
    ((called, text),) = found.calls
    assert (called, json.loads(text), found.whole, found.said) == ("f", arguments, [True], "")


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, *places, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]
