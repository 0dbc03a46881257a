"""Messages as Anthropic's clients send them, made into those that every chat template knows.

Results of tools stand first in a user's message there, and are messages of their own here. What a client is billed by
is no part of a conversation: a line of that kind, of Claude Code, would be another one in each session and keep all of
its prompt from being found in the prefix cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from millpond.http.errors import bad_value, missing, unsupported
from millpond.http.generation_request import Call, Message, Part, Reasoning, Text, Tool
from millpond.http.tool_fields import MOST_VALUES
from millpond.http.values import deeper_than, holds_more_than

ROLES = ("user", "assistant", "system")
MOST_DEEP = 64
BILLING = re.compile(r"x-anthropic-billing-header: [^\n]*")
BETWEEN = "\n"
"""Put between the texts of a message."""
Block = Mapping[str, object]


def read_system(value: object) -> tuple[Message, ...]:
    """The system prompt: a text or a list of them. Raises ApiError 400."""
    if isinstance(value, str):
        return (Message("system", (Text(value),), where="system"),) if value else ()
    texts = [_text(block, where) for block, where in _blocks(value, "system", "text")]
    shared = marked(value)
    if texts and BILLING.fullmatch(texts[0]):
        del texts[0]
    return (Message("system", (Text(BETWEEN.join(texts)),), where="system", shared=shared),) if texts else ()


def read_messages(value: object, tools: Mapping[str, Tool]) -> tuple[Message, ...]:
    """Check a ``messages`` value; ``tools`` are those that results may refer to. Raises ApiError 400."""
    if not isinstance(value, list) or not value:
        raise bad_value("messages", value, "a non-empty list of messages")
    found: list[Message] = []
    held: list[Message] = []
    """What an answer said behind its calls: it had heard their results by then."""
    for index, message in enumerate(value):
        made = list(_messages(message, f"messages[{index}]", tools))
        if marked(message.get("content")):
            made[-1] = replace(made[-1], shared=True)
        if made[0].role == "assistant":
            _append(found, *held, made[0])
            held = made[1:]
        else:
            results = [one for one in made if one.role == "tool"]
            _append(found, *results, *held, *made[len(results) :])
            held = []
    _append(found, *held)
    return tuple(found)


def _append(found: list[Message], *messages: Message) -> None:
    """Two of one role, one behind the other, are one: clients may send them, and templates may not take them."""
    for message in messages:
        if found and found[-1].role == message.role and message.role in ("user", "assistant"):
            found[-1] = _in_order(message.role, (*found[-1].parts, *message.parts), found[-1].where)
        else:
            found.append(message)


def _in_order(role: str, parts: Sequence[Part], where: str) -> Message:
    """As templates show a message: thoughts, what is said, calls."""
    said = BETWEEN.join(part.text for part in parts if isinstance(part, Text) and part.text)
    thoughts = [part for part in parts if isinstance(part, Reasoning)]
    return Message(role, (*thoughts, Text(said), *(part for part in parts if isinstance(part, Call))), where=where)


def _messages(value: object, where: str, tools: Mapping[str, Tool]) -> Iterator[Message]:
    if not isinstance(value, dict):
        raise bad_value(where, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise bad_value(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, str):
        yield Message(role, (Text(content),), where=where)
        return
    parts, results = list[Part](), list[Message]()
    for block, place in _blocks(content, f"{where}.content", *_KINDS[role]):
        match block["type"]:
            case "text":
                parts.append(Text(_text(block, place)))
            case "thinking":
                parts.append(Reasoning(_string(block, "thinking", place)))
            case "tool_use":
                parts.append(_call(block, place))
            case "tool_result":
                results.append(_result(block, place, tools))
    yield from results
    behind = max((place for place, part in enumerate(parts, start=1) if isinstance(part, Call)), default=len(parts))
    if parts or not results:
        yield _in_order(role, parts[:behind], where)
    if behind < len(parts):
        yield _in_order(role, parts[behind:], where)


_KINDS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


def _blocks(value: object, where: str, *kinds: str) -> Iterator[tuple[Block, str]]:
    """Each block of a content, with its place. Raises ApiError 400 for a kind that is none of ``kinds``."""
    if value is None:
        raise missing(where, "a string or a list of blocks")
    if not isinstance(value, list):
        raise bad_value(where, value, "a string or a list of blocks")
    for index, block in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(block, dict):
            raise bad_value(place, block, "an object with a type")
        kind = block.get("type")
        if kind not in kinds:
            wrong = unsupported if isinstance(kind, str) else bad_value
            raise wrong(f"{place}.type", kind, " or ".join(f'"{name}"' for name in kinds))
        yield block, place


def _text(block: Block, where: str) -> str:
    return _string(block, "text", where)


def _string(block: Block, name: str, where: str) -> str:
    found = block.get(name)
    if not isinstance(found, str):
        raise bad_value(f"{where}.{name}", found, "a string")
    return found


def _call(block: Block, where: str) -> Call:
    name, own, given = _string(block, "name", where), _string(block, "id", where), block.get("input")
    if not isinstance(given, dict) or deeper_than(given, MOST_DEEP):
        raise bad_value(f"{where}.input", given, f"an object at most {MOST_DEEP} levels deep")
    if holds_more_than(given, MOST_VALUES):
        raise bad_value(f"{where}.input", given, f"at most {MOST_VALUES} values")
    return Call(own, name, json.dumps(given, ensure_ascii=False))


def _result(block: Block, where: str, tools: Mapping[str, Tool]) -> Message:
    own, content = _string(block, "tool_use_id", where), block.get("content")
    if content is None or isinstance(content, str):
        return Message("tool", (Text(content or ""),), tool_call_id=own, where=where)
    texts = []
    for part, place in _blocks(content, f"{where}.content", "text", "tool_reference"):
        if part["type"] == "text":
            texts.append(_text(part, place))
            continue
        tool = tools.get(_string(part, "tool_name", place))
        if tool is None:
            raise bad_value(f"{place}.tool_name", part["tool_name"], "the name of one of the tools")
        texts.append(json.dumps(tool.for_template(), ensure_ascii=False))
    return Message("tool", (Text(BETWEEN.join(texts)),), tool_call_id=own, where=where)


def marked(blocks: object) -> bool:
    """Whether the client says of one of these that the next request will be alike up to its end."""
    return isinstance(blocks, list) and any(isinstance(one, dict) and one.get("cache_control") for one in blocks)


def referred(messages: Sequence[object]) -> set[str]:
    """Names of tools that results have introduced; of messages that have been checked."""
    found: set[str] = set()
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for block in content if isinstance(content, list) else ():
            inner = block.get("content") if isinstance(block, dict) else None
            for part in inner if isinstance(inner, list) else ():
                if isinstance(part, dict) and part.get("type") == "tool_reference":
                    found.add(str(part.get("tool_name")))
    return found
