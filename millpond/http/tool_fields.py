"""What the APIs have in common about tools: names, schemas, and how many there may be."""

from __future__ import annotations

import re
from collections.abc import Mapping

from millpond.http.errors import bad_value
from millpond.http.generation_request import Tool
from millpond.http.values import deeper_than, more_values_than

MOST_TOOLS = 1024
MOST_DEEP = 64
"""Levels of a schema."""
MOST_VALUES = 20_000
"""And names in the arguments of a call: reading and writing them holds the interpreter."""
NAME_PATTERN = r"^[A-Za-z0-9_.\-]{1,128}$"
NAME = "1 to 128 letters, digits, underscores, dots or hyphens"


def tool_name(value: object, where: str) -> str:
    """Check the name of a tool. Raises ApiError 400."""
    if not isinstance(value, str) or not re.fullmatch(NAME_PATTERN[1:-1], value):
        raise bad_value(where, value, NAME)
    return value


def checked_arguments(text: str, where: str) -> str:
    """What a model wrote, or a client in its name. Raises ApiError 400 where there is too much in it."""
    if more_values_than(bytearray(text.encode()), MOST_VALUES):
        raise bad_value(where, text, f"at most {MOST_VALUES} values and names")
    return text


def checked_tool(fields: Mapping[str, object], where: str, schema_field: str) -> Tool:
    """The tool that an object describes: name, description, strict, and its schema under ``schema_field``. Raises
    ApiError 400."""
    description, schema, strict = (fields.get(name) for name in ("description", schema_field, "strict"))
    if description is not None and not isinstance(description, str):
        raise bad_value(f"{where}.description", description, "a string")
    if schema is not None and (not isinstance(schema, dict) or deeper_than(schema, MOST_DEEP)):
        raise bad_value(f"{where}.{schema_field}", schema, f"a JSON schema, at most {MOST_DEEP} levels deep")
    if strict is not None and not isinstance(strict, bool):
        raise bad_value(f"{where}.strict", strict, "true or false")
    shown = f"{where}.{schema_field}"
    return Tool(tool_name(fields.get("name"), f"{where}.name"), description or "", schema or {}, bool(strict), shown)


def check_names(names: list[str], where: str) -> None:
    """Raises ApiError 400 where two tools have one name; ``where`` has a place for the index."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise bad_value(where.format(index), name, "a name that no other tool has")
        seen.add(name)
