"""Tools, the choice among them, and calls of them, as clients of chat completions send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.http.errors import bad_value, unsupported
from millpond.http.generation_request import Call, Tool
from millpond.http.tool_fields import MOST_TOOLS, check_names, checked_arguments, checked_tool

TOOLS = f"a list of at most {MOST_TOOLS} tools, each an object with type and function"
CHOICE = (
    '"none", "auto", "required", or an object of type function with the name of a tool, or of type allowed_tools with '
    "a mode and a list of tools"
)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which of the tools an answer may call."""

    none: bool = False
    required: bool = False
    only: frozenset[str] | None = None
    """None: any."""
    one: bool = False
    """Exactly one call."""


AUTO = ToolChoice()


def read_tools(value: object) -> tuple[Tool, ...]:
    """Check a ``tools`` value. Raises ApiError 400 naming the part at fault."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise bad_value("tools", value, TOOLS)
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(value))
    check_names([tool.name for tool in tools], "tools[{}].function.name")
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
    return checked_tool(function, f"{where}.function", "parameters")


def read_choice(value: object) -> ToolChoice:
    """Check a ``tool_choice`` value. Raises ApiError 400."""
    match value:
        case "auto":
            return AUTO
        case "none":
            return ToolChoice(none=True)
        case "required":
            return ToolChoice(required=True)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice(required=True, only=frozenset((name,)), one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            return ToolChoice(required=mode == "required", only=frozenset(map(_allowed, tools)))
        case {"type": "custom"}:
            raise unsupported("tool_choice", value, CHOICE)
    raise bad_value("tool_choice", value, CHOICE)


def _allowed(value: object) -> str:
    match value:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise bad_value("tool_choice.allowed_tools.tools", value, "an object of type function with the name of a tool")


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Raises ApiError 400 for a choice that these tools do not offer."""
    if choice.required and not tools:
        raise bad_value("tool_choice", "required", "absent, none or auto where there are no tools")
    known = {tool.name for tool in tools}
    for name in choice.only or ():
        if name not in known:
            raise bad_value("tool_choice", name, f"the name of one of the tools ({', '.join(sorted(known)) or 'none'})")


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
    return Call(own or "", name, checked_arguments(arguments or "", f"{where}.function.arguments"))
