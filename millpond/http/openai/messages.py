"""Chat messages as clients send them, and the answer that they predict.

Content is a string or a list of text parts, for an assistant's message also null; anything else is refused by name,
never dropped.
"""

from __future__ import annotations

from millpond.http.errors import ApiError, bad_value, missing, unsupported
from millpond.http.generation_request import Message, Text

PREDICTION = 'an object like {"type": "content", "content": "…"}'
ROLES = ("system", "developer", "user", "assistant", "tool")


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
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        if value.get(name):
            raise unsupported(f"{where}.{name}", value[name], "none")
    given = value.get("content")
    if given is None and role == "assistant":
        given = ""  # clients send back what they got, and an answer may be without a text
    text = read_content(given, f"{where}.content")
    extra = [_text_or_none(value.get(name), f"{where}.{name}") for name in ("name", "tool_call_id")]
    return Message(role, (Text(text),), *extra)


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
