"""Tools, the choice among them, and calls of them, as clients of chat completions send them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from millpond.http.errors import bad_value, unsupported
from millpond.http.generation_request import Call, Tool
from millpond.http.values import deeper_than

MOST_TOOLS = 1024
MOST_DEEP = 64
"""Levels of a schema."""
NAME_PATTERN = r"^[A-Za-z0-9_.\-]{1,128}$"
NAME = "1 to 128 letters, digits, underscores, dots or hyphens"
TOOLS = f"a list of at most {MOST_TOOLS} tools, each an object with type and function"
CHOICE = '"none" or "auto"'


def read_tools(value: object) -> tuple[Tool, ...]:
    """Check a ``tools`` value. Raises ApiError 400 naming the part at fault."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise bad_value("tools", value, TOOLS)
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(value))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise bad_value(f"tools[{index}].function.name", tool.name, "a name that no other tool has")
        seen.add(tool.name)
    return tools


def _tool(value: object, where: str) -> Tool:
    if not isinstance(value, dict):
        raise bad_value(where, value, "an object with type and function")
    if value.get("type") != "function":
        wrong = unsupported if isinstance(value.get("type"), str) else bad_value
        raise wrong(f"{where}.type", value.get("type"), '"function"')
    function = value.get("function")
    if not isinstance(function, dict):
        raise bad_value(f"{where}.function", function, "an object with name, description and parameters")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise bad_value(f"{where}.function.description", description, "a string")
    parameters = function.get("parameters")
    if parameters is not None and (not isinstance(parameters, dict) or deeper_than(parameters, MOST_DEEP)):
        allowed = f"a JSON schema, at most {MOST_DEEP} levels deep"
        raise bad_value(f"{where}.function.parameters", parameters, allowed)
    if function.get("strict") not in (None, False):
        raise unsupported(f"{where}.function.strict", function["strict"], "false")
    return Tool(_name(function.get("name"), f"{where}.function.name"), description or "", parameters or {})


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME_PATTERN[1:-1], value):
        raise bad_value(where, value, NAME)
    return value


def read_choice(value: object) -> str:
    """Check a ``tool_choice`` value. Raises ApiError 400."""
    if value in ("none", "auto") and isinstance(value, str):
        return value
    known = value == "required" or (isinstance(value, dict) and value.get("type") in ("function", "allowed_tools"))
    raise (unsupported if known else bad_value)("tool_choice", value, CHOICE)


def read_calls(value: object, where: str) -> Sequence[Call]:
    """Check the ``tool_calls`` of an assistant's message. Raises ApiError 400."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise bad_value(where, value, "a list of calls")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(value)]


def _call(value: object, where: str) -> Call:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping):
        raise bad_value(where, value, "an object with id and function")
    own, name, arguments = value.get("id"), function.get("name"), function.get("arguments")
    if own is not None and not isinstance(own, str):
        raise bad_value(f"{where}.id", own, "a string")
    if not isinstance(name, str) or not name:
        raise bad_value(f"{where}.function.name", name, "a string")
    if arguments is not None and not isinstance(arguments, str):
        raise bad_value(f"{where}.function.arguments", arguments, "a string")
    return Call(own or "", name, arguments or "")
