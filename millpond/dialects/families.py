"""The families of models whose way of writing thoughts and calls is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from millpond.dialects import channels
from millpond.dialects.call_grammar import json_objects, with_arguments
from millpond.dialects.dialect import Dialect
from millpond.dialects.json_calls import objects
from millpond.dialects.literals import marked_string
from millpond.dialects.marked_calls import deepseek, kimi, mistral
from millpond.dialects.program_calls import functions, named_objects
from millpond.dialects.program_grammar import PYTHON, listed, named, single
from millpond.dialects.tagged_calls import Tags, Tools, calls
from millpond.dialects.tagged_grammar import section
from millpond.dialects.tape import Reading, Tape

BAR = "\uff5c"
"""As DeepSeek's marks have it."""
THINK = ("<think>", "</think>")
"""What nearly all families put around thoughts."""


def of_objects(*ends: str) -> partial[Reading[None]]:
    return partial(_read_objects, ends)


def _read_objects(ends: tuple[str, ...], tape: Tape, _tools: Tools) -> Reading[None]:
    return objects(tape, *ends)


def _functions(*ends: str) -> partial[Reading[None]]:
    return partial(_of_functions, ends)


def _of_functions(ends: tuple[str, ...], tape: Tape, _tools: Tools) -> Reading[None]:
    return functions(tape, *ends)


def _leading_objects(tape: Tape, tools: Tools) -> Reading[None]:
    return objects(tape, known=tools)


def _leading_functions(tape: Tape, tools: Tools) -> Reading[None]:
    return functions(tape, known=tools)


def _tagged(tags: Tags) -> partial[Reading[None]]:
    return partial(_of_tags, tags)


def _of_tags(tags: Tags, tape: Tape, tools: Tools) -> Reading[None]:
    return calls(tape, tags, tools)


def _mistral(tape: Tape, _tools: Tools) -> Reading[None]:
    return mistral(tape)


QWEN_CODER = Tags(
    call="<function=",
    name_end=(">",),
    key="<parameter=",
    key_end=">",
    value_end="</parameter>",
    call_end="</function>",
    end="</tool_call>",
    framed=True,
)
GLM = Tags(
    call="",
    name_end=("\n",),
    key="<arg_key>",
    key_end="</arg_key>",
    value_begin="<arg_value>",
    value_end="</arg_value>",
    call_end="",
    end="</tool_call>",
)
MINIMAX = Tags(
    call='<invoke name="',
    name_end=('">',),
    key='<parameter name="',
    key_end='">',
    value_end="</parameter>",
    call_end="</invoke>",
    end="</minimax:tool_call>",
)
DSML = Tags(
    call=f'<{BAR}DSML{BAR}invoke name="',
    name_end=('">',),
    key=f'<{BAR}DSML{BAR}parameter name="',
    key_end=">",
    value_end=f"</{BAR}DSML{BAR}parameter>",
    call_end=f"</{BAR}DSML{BAR}invoke>",
    end=f"</{BAR}DSML{BAR}function_calls>",
    typed=True,
)
DEEPSEEK = tuple(f"<{BAR}tool▁{name}{BAR}>" for name in ("calls▁end", "call▁begin", "sep", "call▁end"))
KIMI = tuple(f"<|tool_{name}|>" for name in ("calls_section_end", "call_begin", "call_argument_begin", "call_end"))
HERMES = Dialect(
    "hermes",
    {"<tool_call>": of_objects("</tool_call>")},
    section=json_objects("</tool_call>"),
    repeated=True,
    inner=("</tool_call>",),
)
LLAMA = Dialect(
    "llama",
    {"<|python_tag|>": of_objects()},
    leading=_leading_objects,
    section=json_objects("", arguments="parameters"),
)
DEEPSEEK_CALLS = {f"<{BAR}tool▁calls▁begin{BAR}>": lambda tape, _: deepseek(tape, *DEEPSEEK)}
MISTRAL_MARKS = ("[CALL_ID]", "[ARGS]")

FAMILIES: tuple[tuple[tuple[str, ...], Dialect], ...] = (
    (("<|channel|>", "<|message|>", "<|call|>"), Dialect("harmony", messages=True, inner=channels.MARKS)),
    (
        ("<|tool_call>", "<tool_call|>"),
        Dialect(
            "gemma4",
            {"<|tool_call>": lambda tape, _: named_objects(tape, marked_string('<|"|>'), "<tool_call|>")},
            section=partial(single, named('<|"|>'), "<tool_call|>"),
            repeated=True,
            thoughts=("<|channel>", "<channel|>"),
            label="thought",
            inner=("<tool_call|>", '<|"|>'),
        ),
    ),
    (
        ("<start_function_call>",),
        Dialect(
            "functiongemma",
            {
                "<start_function_call>": lambda tape, _: named_objects(
                    tape, marked_string("<escape>"), "<end_function_call>"
                )
            },
            section=partial(single, named("<escape>"), "<end_function_call>"),
            repeated=True,
            inner=("<end_function_call>", "<escape>"),
        ),
    ),
    (
        (f"{BAR}DSML{BAR}",),
        Dialect(
            "deepseek_v32",
            {
                f"<{BAR}DSML{BAR}function_calls>": _tagged(DSML),
                f"<{BAR}DSML{BAR}tool_calls>": _tagged(replace(DSML, end=f"</{BAR}DSML{BAR}tool_calls>")),
            },
            section=partial(section, DSML),
        ),
    ),
    (
        (f"<{BAR}tool▁calls▁begin{BAR}>", "```json"),
        Dialect(
            "deepseek_v3",
            DEEPSEEK_CALLS,
            section=with_arguments(
                f"{DEEPSEEK[1]}function{DEEPSEEK[2]}", "\n```json\n", f"\n```{DEEPSEEK[3]}", DEEPSEEK[0]
            ),
            inner=DEEPSEEK,
        ),
    ),
    (
        (f"<{BAR}tool▁calls▁begin{BAR}>",),
        Dialect(
            "deepseek",
            DEEPSEEK_CALLS,
            section=with_arguments(DEEPSEEK[1], DEEPSEEK[2], DEEPSEEK[3], DEEPSEEK[0]),
            inner=DEEPSEEK,
        ),
    ),
    (
        ("<|tool_calls_section_begin|>",),
        Dialect(
            "kimi",
            {"<|tool_calls_section_begin|>": lambda tape, _: kimi(tape, *KIMI)},
            section=with_arguments(f"{KIMI[1]}functions.", KIMI[2], KIMI[3], KIMI[0], own="/:[0-9]{1,3}/"),
            inner=KIMI,
        ),
    ),
    (
        ("<minimax:tool_call>",),
        Dialect(
            "minimax",
            {"<minimax:tool_call>": _tagged(MINIMAX)},
            section=partial(section, MINIMAX),
            inner=("</minimax:tool_call>",),
        ),
    ),
    (
        ("[TOOL_CALLS]", "[ARGS]"),
        Dialect(
            "mistral",
            {"[TOOL_CALLS]": _mistral},
            section=with_arguments("", "[ARGS]", ""),
            repeated=True,
            inner=MISTRAL_MARKS,
        ),
    ),
    (
        ("[TOOL_CALLS]",),
        Dialect("mistral_v3", {"[TOOL_CALLS]": _mistral}, section=json_objects("", listed=True), inner=MISTRAL_MARKS),
    ),
    (
        ("<arg_key>",),
        Dialect(
            "glm",
            {"<tool_call>": _tagged(GLM)},
            section=partial(section, GLM),
            repeated=True,
            inner=("</tool_call>", *(f"<{slash}arg_{name}>" for slash in ("", "/") for name in ("key", "value"))),
        ),
    ),
    (
        ("<function=", "<parameter="),
        Dialect(
            "qwen_coder",
            {"<tool_call>": _tagged(QWEN_CODER), "<function=": _tagged(replace(QWEN_CODER, call=""))},
            section=partial(section, QWEN_CODER),
            repeated=True,
            inner=("</tool_call>",),
        ),
    ),
    (
        ("<|tool_call_start|>",),
        Dialect(
            "lfm2",
            {"<|tool_call_start|>": _functions("<|tool_call_end|>")},
            section=partial(listed, PYTHON, "<|tool_call_end|>"),
            inner=("<|tool_call_end|>",),
        ),
    ),
    (
        ("<|START_ACTION|>",),
        Dialect(
            "command",
            {"<|START_ACTION|>": of_objects("<|END_ACTION|>")},
            section=json_objects(
                "<|END_ACTION|>",
                name="tool_name",
                arguments="parameters",
                listed=True,
                before=r'/"tool_call_id": "[0-9]{1,3}", /',
            ),
            thoughts=("<|START_THINKING|>", "<|END_THINKING|>"),
            dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            inner=("<|END_ACTION|>",),
        ),
    ),
    (
        ("<|tool_call|>",),
        Dialect(
            "granite",
            {"<|tool_call|>": of_objects("<|/tool_call|>")},
            section=json_objects("", listed=True),
            inner=("<|/tool_call|>",),
        ),
    ),
    (("<tool_call>",), HERMES),
    (("functools",), Dialect("functools", {"functools": of_objects()}, section=json_objects("", listed=True))),
    (
        ("<|python_start|>",),
        Dialect(
            "llama4",
            {"<|python_start|>": _functions("<|python_end|>")},
            leading=_leading_functions,
            section=partial(listed, PYTHON, ""),
            inner=("<|python_end|>",),
        ),
    ),
    (("<|python_tag|>",), LLAMA),
)
"""Of each family the marks that its templates, or its vocabulary, have; the first one counts whose marks are all there.
What is more special stands before what is more common."""
GENERIC = Dialect("json", leading=_leading_objects, section=json_objects(""))
"""Of models whose template shows tools in a way that no family here has."""
OTHER_THOUGHTS = (("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), THINK)
BY_NAME = {dialect.name: dialect for _, dialect in (*FAMILIES, ((), GENERIC))}
PARSERS = {
    "function_gemma": "functiongemma",
    "gemma4": "gemma4",
    "glm47": "glm",
    "json_tools": "hermes",
    "kimi_k2": "kimi",
    "minimax_m2": "minimax",
    "pythonic": "lfm2",
    "qwen3_coder": "qwen_coder",
}
"""What mlx-lm calls them, as ``tool_parser_type`` of a tokenizer_config.json has it."""
