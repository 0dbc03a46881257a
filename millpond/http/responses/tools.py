"""Tools as Responses have them: functions, groups of them (namespaces), and tools whose input is a text (custom).

What the service behind the official API runs itself, such as a web search, nobody runs here. Agents name such tools in
every request: they are left out, and that is said, where others remain and the choice is the model's; asked for by
themselves they are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from millpond.dialects.json_values import whole_text
from millpond.http.errors import bad_value, unsupported
from millpond.http.generation_request import Tool
from millpond.http.tool_fields import MOST_TOOLS, check_names, checked_tool, tool_name

TOOLS = f"a list of at most {MOST_TOOLS} tools"
CHOICE = (
    '"none", "auto", "required", or an object of type function or custom with the name of a tool, or of type '
    "allowed_tools with a mode and a list of tools"
)
HOSTED = (
    *("web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation", "tool_search"),
    *("local_shell", "mcp", "computer", "computer_use_preview", "shell", "apply_patch"),
)
INPUT: Mapping[str, object] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""The arguments of a custom tool."""


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request, as the model is shown them, and what its client calls them."""

    tools: tuple[Tool, ...] = ()
    spaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Shown name → the group and the name within it, of those that are in one."""
    custom: frozenset[str] = frozenset()
    """Shown names of those whose input is a text."""
    dropped: tuple[str, ...] = ()
    """Types that nobody runs here."""
    ignored: tuple[str, ...] = ()
    """What else of them is not seen to."""

    def shown(self, name: str, space: str) -> str:
        """The name under which the model is shown a tool."""
        return next((shown for shown, found in self.spaces.items() if found == (space, name)), name)


@dataclass(frozen=True, slots=True)
class ToolPick:
    """Which of them an answer may call; names are those that are shown."""

    none: bool = False
    required: bool = False
    only: frozenset[str] | None = None
    one: bool = False


def read_tools(value: object) -> Toolbox:
    """Check a ``tools`` value. Raises ApiError 400."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise bad_value("tools", value, TOOLS)
    tools, custom, dropped, ignored = list[Tool](), set[str](), list[str](), list[str]()
    grouped: list[tuple[str, Tool]] = []
    for index, tool in enumerate(value):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise bad_value(where, tool, "an object with a type")
        match tool.get("type"):
            case "function":
                tools.append(checked_tool(tool, where, "parameters"))
            case "custom":
                made = checked_tool({**tool, "parameters": INPUT, "strict": True}, where, "parameters")
                tools.append(made)
                custom.add(made.name)
                if isinstance(tool.get("format"), dict) and tool["format"].get("type") != "text":
                    ignored.append(f"{where}.format")
            case "namespace":
                grouped += _grouped(tool, where)
            case str(kind) if _hosted(kind):
                dropped.append(kind)
            case kind:
                wrong = unsupported if isinstance(kind, str) else bad_value
                raise wrong(f"{where}.type", kind, "function, custom or namespace")
    alone = [tool.name for tool in tools]
    inner = [tool.name for _, tool in grouped]
    spaces: dict[str, tuple[str, str]] = {}
    for space, tool in grouped:
        taken = tool.name in alone or inner.count(tool.name) > 1
        shown = f"{space}__{tool.name}" if taken else tool.name
        spaces[tool_name(shown, tool.where)] = (space, tool.name)
        tools.append(Tool(shown, tool.description, tool.parameters, tool.strict, tool.where))
    check_names([tool.name for tool in tools], "tools")
    if len(tools) > MOST_TOOLS:
        raise bad_value("tools", f"{len(tools)} tools", TOOLS)
    return Toolbox(tuple(tools), spaces, frozenset(custom), tuple(dict.fromkeys(dropped)), tuple(ignored))


def _hosted(kind: str) -> bool:
    """Some have the date of their version behind the name."""
    return re.sub(r"(_20\d\d_\d\d_\d\d|_preview.*)$", "", kind) in HOSTED


def _grouped(value: Mapping[str, object], where: str) -> Iterator[tuple[str, Tool]]:
    name, tools, description = (
        tool_name(value.get("name"), f"{where}.name"),
        value.get("tools"),
        value.get("description"),
    )
    if description is not None and not isinstance(description, str):
        raise bad_value(f"{where}.description", description, "a string")
    if not isinstance(tools, list):
        raise bad_value(f"{where}.tools", tools, "a list of functions")
    for index, tool in enumerate(tools):
        place = f"{where}.tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise bad_value(place, tool, "an object of type function")
        made = checked_tool(tool, place, "parameters")
        told = "\n".join(filter(None, (description, made.description)))
        yield name, Tool(made.name, told, made.parameters, made.strict, made.where)


def read_choice(value: object, box: Toolbox) -> ToolPick:
    """Check a ``tool_choice`` value. Raises ApiError 400."""
    choice = _choice(value, box)
    known = {tool.name for tool in box.tools}
    if choice.required and not known:
        raise bad_value("tool_choice", value, "absent, none or auto where there are no tools")
    for name in sorted((choice.only or frozenset()) - known):
        raise bad_value("tool_choice", name, f"the name of one of the tools ({', '.join(sorted(known)) or 'none'})")
    if box.dropped and not choice.none and (not known or (choice.required and choice.only is None)):
        raise unsupported("tools", box.dropped[0], "tools that the client runs itself: nobody runs this one here")
    return choice


def _choice(value: object, box: Toolbox) -> ToolPick:
    match value:
        case None | "auto":
            return ToolPick()
        case "none":
            return ToolPick(none=True)
        case "required":
            return ToolPick(required=True)
        case {"type": "function" | "custom", "name": str(name)}:
            return ToolPick(required=True, only=frozenset((_named(value, name, box),)), one=True)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools)}:
            names = frozenset(_allowed(tool, box) for tool in tools)
            return ToolPick(required=mode == "required", only=names)
        case {"type": str(kind)} if _hosted(kind):
            raise unsupported("tool_choice.type", kind, CHOICE)
    raise bad_value("tool_choice", value, CHOICE)


def _allowed(value: object, box: Toolbox) -> str:
    match value:
        case {"type": "function" | "custom", "name": str(name)}:
            return _named(value, name, box)
    raise bad_value("tool_choice.tools", value, "an object of type function or custom with the name of a tool")


def _named(value: object, name: str, box: Toolbox) -> str:
    space = value.get("namespace") if isinstance(value, Mapping) else None
    return box.shown(name, space) if isinstance(space, str) else name


def text_input(arguments: str) -> str:
    """What a custom tool is called with; a call that has nothing of the kind is told as it is."""
    try:
        found = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    given = found.get("input") if isinstance(found, dict) else None
    return whole_text(given) if isinstance(given, str) else arguments
