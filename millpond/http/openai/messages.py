"""Chat messages as clients send them, and the answer that they predict.

Content is a string or a list of text parts, for an assistant's message also null; anything else is refused by name,
never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from millpond.http.errors import ApiError, bad_value, missing, unsupported
from millpond.http.generation_request import Message, Part, Reasoning, Text
from millpond.http.openai.tools import read_calls

PREDICTION = 'an object like {"type": "content", "content": "…"}'
ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names under which clients send thoughts back."""


def read_messages(value: object) -> tuple[Message, ...]:
    """Check a ``messages`` value. Raises ApiError 400."""
    if not isinstance(value, list) or not value:
        raise bad_value("messages", value, "a non-empty list of messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise bad_value(where, value, "an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise bad_value(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    for name in ("function_call", "audio", "refusal"):
        if value.get(name):
            raise unsupported(f"{where}.{name}", value[name], "none")
    given = value.get("content")
    if (given is None or given == []) and role in ("assistant", "tool"):
        given = ""  # clients send back what they got, and an answer or a tool may be without a text
    parts: tuple[Part, ...] = (Text(read_content(given, f"{where}.content")),)
    if role == "assistant":
        parts = (*_thoughts(value, where), *parts, *read_calls(value.get("tool_calls"), f"{where}.tool_calls"))
    elif value.get("tool_calls"):
        raise bad_value(f"{where}.tool_calls", value["tool_calls"], "absent but for role assistant")
    speaker, own = (_text_or_none(value.get(name), f"{where}.{name}") for name in ("name", "tool_call_id"))
    return Message(role, parts, speaker, own, where)


def _thoughts(value: Mapping[str, object], where: str) -> Iterator[Reasoning]:
    """What an assistant's message has thought: clients send it back under the name under which they got it."""
    for name in THOUGHTS:
        found = _text_or_none(value.get(name), f"{where}.{name}")
        if found:
            yield Reasoning(found)
            return
    details = value.get("reasoning_details")
    texts = [part.get("text") for part in details if isinstance(part, dict)] if isinstance(details, list) else []
    if found := "\n".join(text for text in texts if isinstance(text, str)):
        yield Reasoning(found)


def _text_or_none(value: object, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise bad_value(where, value, "a string")


def read_content(value: object, where: str) -> str:
    """Check a content: a text, or a list of text parts, which are put together. Raises ApiError 400."""
    allowed = "a string or a list of text parts"
    if value is None:
        raise missing(where, allowed)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad_value(where, value, allowed)
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict):
        raise bad_value(where, value, 'an object like {"type": "text", "text": "…"}')
    kind = value.get("type")
    if kind != "text":
        raise _wrong_kind(kind, f"{where}.type", '"text"')
    text = value.get("text")
    if not isinstance(text, str):
        raise bad_value(f"{where}.text", text, "a string")
    return text


def _wrong_kind(kind: object, where: str, allowed: str) -> ApiError:
    wrong = unsupported if isinstance(kind, str) else bad_value
    return wrong(where, kind, allowed)


def read_prediction(value: object) -> str:
    """The text of a ``prediction`` value. Raises ApiError 400 naming the part at fault."""
    if not isinstance(value, dict):
        raise bad_value("prediction", value, PREDICTION)
    kind = value.get("type")
    if kind is None:
        raise missing("prediction.type", '"content"')
    if kind != "content":
        raise _wrong_kind(kind, "prediction.type", '"content"')
    return read_content(value.get("content"), "prediction.content")
