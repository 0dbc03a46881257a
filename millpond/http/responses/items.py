"""The items of a response's input, made into messages that every chat template knows: thoughts, texts and calls of an
answer that follow each other are one message of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from millpond.http.errors import ApiError, bad_value, missing, unsupported
from millpond.http.generation_request import Call, Message, Part, Reasoning, Text
from millpond.http.responses.thoughts import opened
from millpond.http.responses.tools import Toolbox
from millpond.http.tool_fields import checked_arguments

ROLES = ("user", "assistant", "system", "developer")
ITEMS = "a string or a list of items, not empty"
_TEXTS = ("input_text", "output_text", "text", "refusal")
_CALLS = ("function_call", "custom_tool_call")
_RESULTS = ("function_call_output", "custom_tool_call_output")
KINDS = ("message", "reasoning", *_CALLS, *_RESULTS)
Item = Mapping[str, object]


def read_input(
    value: object, instructions: str | None, box: Toolbox, before: Sequence[Item] = ()
) -> tuple[Message, ...]:
    """Check an ``input`` value, which comes behind the items ``before``. Raises ApiError 400."""
    messages = [Message("system", (Text(instructions),), where="instructions")] if instructions else []
    items = [{"role": "user", "content": value}] if isinstance(value, str) and value else value
    if not isinstance(items, list) or not items:
        raise bad_value("input", value, ITEMS)
    answer: list[Part] = []
    begun = ""
    for index, item in enumerate([*before, *items], -len(before)):
        where = f"input[{index}]" if index >= 0 else f"previous_response_id[{index}]"
        if not isinstance(item, dict):
            raise bad_value(where, item, "an object with a type")
        part = _part(item, where, box)
        if isinstance(part, Message) and part.role != "assistant":
            messages += (*_answered(answer, begun), part)
            answer = []
        elif part is not None:
            begun = begun if answer else where
            answer += part.parts if isinstance(part, Message) else (part,)
    return (*messages, *_answered(answer, begun))


def _answered(parts: list[Part], where: str) -> list[Message]:
    """What an assistant thought, said and called, as one message; nothing where there is nothing."""
    if not parts:
        return []
    thoughts = "\n".join(part.text for part in parts if isinstance(part, Reasoning))
    said = "\n".join(part.text for part in parts if isinstance(part, Text) and part.text)
    calls = [part for part in parts if isinstance(part, Call)]
    return [Message("assistant", (*([Reasoning(thoughts)] if thoughts else []), Text(said), *calls), where=where)]


def _part(item: Item, where: str, box: Toolbox) -> Message | Reasoning | Call | None:
    kind = item.get("type", "message")
    if kind == "message":
        return _message(item, where)
    if kind == "reasoning":
        thought = _thought(item)
        return Reasoning(thought) if thought else None
    if kind in _CALLS:
        return _call(item, where, box)
    if kind in _RESULTS:
        own = _string(item, "call_id", where)
        return Message("tool", (Text(_texts(item.get("output"), f"{where}.output")),), tool_call_id=own, where=where)
    wrong = unsupported if isinstance(kind, str) else bad_value
    raise wrong(f"{where}.type", kind, ", ".join(KINDS))


def _message(item: Item, where: str) -> Message:
    role = item.get("role")
    if role not in ROLES:
        raise bad_value(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if item.get("content") is None:
        raise missing(f"{where}.content", "a string or a list of parts")
    return Message(str(role), (Text(_texts(item["content"], f"{where}.content")),), where=where)


def _texts(value: object, where: str) -> str:
    """A content: a text, or parts of which each is one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_value(where, value, "a string or a list of parts")
    return "\n".join(_text(part, f"{where}[{index}]") for index, part in enumerate(value))


def _text(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise bad_value(where, part, "an object with a type")
    kind = part.get("type")
    if kind not in _TEXTS:
        raise _wrong_kind(kind, where)
    found = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(found, str):
        raise bad_value(f"{where}.text", found, "a string")
    return found


def _wrong_kind(kind: object, where: str) -> ApiError:
    wrong = unsupported if isinstance(kind, str) else bad_value
    return wrong(f"{where}.type", kind, "input_text or output_text")


def _string(item: Item, name: str, where: str) -> str:
    found = item.get(name)
    if not isinstance(found, str):
        raise bad_value(f"{where}.{name}", found, "a string")
    return found


def _call(item: Item, where: str, box: Toolbox) -> Call:
    name, own, space = _string(item, "name", where), _string(item, "call_id", where), item.get("namespace")
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({"input": _string(item, "input", where)}, ensure_ascii=False)
    else:
        arguments = checked_arguments(_string(item, "arguments", where), f"{where}.arguments")
    return Call(own, box.shown(name, space) if isinstance(space, str) else name, arguments)


def _thought(item: Item) -> str:
    """What was thought, as far as the client has it: what we gave it to keep, else what it was shown."""
    kept = item.get("encrypted_content")
    if isinstance(kept, str) and (found := opened(kept)) is not None:
        return found
    for name in ("content", "summary"):
        parts = item.get(name)
        shown = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        if found := "\n".join(text for text in shown if isinstance(text, str)):
            return found
    return ""
