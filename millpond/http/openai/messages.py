"""Chat messages as clients send them, turned into what a chat template takes.

Content is a string or a list of text parts, for an assistant's message also null; anything else is refused by name,
never dropped.
"""

from __future__ import annotations

from millpond.http.errors import ApiError, bad_value, missing, unsupported

Message = dict[str, object]
"""role, content, and name or tool_call_id where given."""

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
    message: Message = {"role": role, "content": read_content(given, f"{where}.content")}
    for name in ("name", "tool_call_id"):
        extra = value.get(name)
        if isinstance(extra, str):
            message[name] = extra
        elif extra is not None:
            raise bad_value(f"{where}.{name}", extra, "a string")
    return message


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
        raise _wrong_part(kind, where)
    text = value.get("text")
    if not isinstance(text, str):
        raise bad_value(f"{where}.text", text, "a string")
    return text


def _wrong_part(kind: object, where: str) -> ApiError:
    if isinstance(kind, str):
        return unsupported(f"{where}.type", kind, '"text"')
    return bad_value(f"{where}.type", kind, '"text"')
