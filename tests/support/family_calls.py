"""One call of a tool ``f`` as each family of models writes it."""

from __future__ import annotations

import json
from collections.abc import Callable

from millpond.dialects.families import BAR

Arguments = dict[str, object]


def dumped(arguments: Arguments) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def python(arguments: Arguments) -> str:
    return f"[f({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]"


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


def deepseek(call: str) -> str:
    return (
        f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>{call}"
        f"<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>"
    )


WRITTEN: dict[str, Callable[[Arguments], str]] = {
    "hermes": lambda all_: f'<tool_call>\n{{"name": "f", "arguments": {dumped(all_)}}}\n</tool_call>',
    "llama": lambda all_: f'{{"name": "f", "parameters": {dumped(all_)}}}',
    "llama4": lambda all_: f"<|python_start|>{python(all_)}<|python_end|>",
    "json": lambda all_: f'{{"name": "f", "arguments": {dumped(all_)}}}',
    "functools": lambda all_: f'functools[{{"name": "f", "arguments": {dumped(all_)}}}]',
    "granite": lambda all_: f'<|tool_call|>[{{"name": "f", "arguments": {dumped(all_)}}}]',
    "command": lambda all_: (
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "f", "parameters": {dumped(all_)}}}\n]'
        "<|END_ACTION|>"
    ),
    "mistral": lambda all_: f"[TOOL_CALLS]f[ARGS]{dumped(all_)}",
    "mistral_v3": lambda all_: f'[TOOL_CALLS][{{"name": "f", "arguments": {dumped(all_)}}}]',
    "deepseek": lambda all_: deepseek(f"f<{BAR}tool▁sep{BAR}>{dumped(all_)}"),
    "deepseek_v3": lambda all_: deepseek(f"function<{BAR}tool▁sep{BAR}>f\n```json\n{dumped(all_)}\n```"),
    "kimi": lambda all_: (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        f"{dumped(all_)}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "harmony": lambda all_: f"<|channel|>commentary to=functions.f<|message|>{dumped(all_)}<|call|>",
    "lfm2": lambda all_: f"<|tool_call_start|>{python(all_)}<|tool_call_end|>",
    "gemma4": lambda all_: f"<|tool_call>call:f{gemma(all_, '<|' + chr(34) + '|>')}<tool_call|>",
    "functiongemma": lambda all_: f"<start_function_call>call:f{gemma(all_, '<escape>')}<end_function_call>",
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
MARKED = ("gemma4", "functiongemma")
"""Texts stand between marks there, which no text may have."""


def schema_of(arguments: Arguments) -> dict[str, object]:
    types = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return {"properties": {name: {"type": types.get(type(value), "null")} for name, value in arguments.items()}}
