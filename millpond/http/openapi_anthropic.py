"""Anthropic's API in the OpenAPI document: what may be asked, and what is answered."""

from __future__ import annotations

from millpond.http.anthropic.blocks import ROLES
from millpond.http.anthropic.schemas import LONGEST_STOP, MOST_STOPS
from millpond.http.openapi_answers import COUNT, STRING, Schema, constant, listed, nullable, one_of, record, ref
from millpond.http.thinking import EFFORTS
from millpond.http.tool_fields import MOST_TOOLS, NAME_PATTERN

_OBJECT: Schema = {"type": "object"}
_FLAG: Schema = nullable({"type": "boolean"})


def _block(kind: str, *optional: str, **fields: Schema) -> Schema:
    """A block of that type; others of its fields are nobody's business."""
    return record({"type": constant(kind), **fields}, *optional, more=True)


_TEXT = _block("text", text=STRING)
_RESULT = _block(
    "tool_result", "content", tool_use_id=STRING, content={"anyOf": [STRING, listed(_TEXT), {"type": "null"}]}
)
_SAID: list[Schema] = [
    _TEXT,
    _block("thinking", thinking=STRING),
    _block("redacted_thinking"),
    _block("tool_use", id=STRING, name=STRING, input=_OBJECT),
]
_MESSAGE: Schema = {
    "anyOf": [
        record({"role": one_of(role), "content": {"anyOf": [STRING, listed({"anyOf": blocks})]}}, more=True)
        for role, blocks in zip(ROLES, ([_TEXT, _RESULT], _SAID, [_TEXT]), strict=True)
    ]
}
_TOOL = record(
    {
        "type": nullable(constant("custom")),
        "name": {"type": "string", "pattern": NAME_PATTERN},
        "description": nullable(STRING),
        "input_schema": _OBJECT,
        "strict": _FLAG,
        "defer_loading": _FLAG,
    },
    *("type", "description", "strict", "defer_loading"),
    more=True,
)
_CHOICE: Schema = {
    "anyOf": [
        record({"type": one_of("auto", "none"), "disable_parallel_tool_use": _FLAG}, "disable_parallel_tool_use"),
        record({"type": constant("any"), "disable_parallel_tool_use": _FLAG}, "disable_parallel_tool_use"),
        record({"type": constant("tool"), "name": STRING}),
    ]
}
_THINKING: Schema = {
    "anyOf": [
        record(
            {"type": constant("enabled"), "budget_tokens": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}},
            more=True,
        ),
        record({"type": one_of("adaptive", "disabled")}, more=True),
    ]
}
_CONFIG = record(
    {
        "effort": nullable(one_of(*EFFORTS)),
        "format": nullable(record({"type": constant("json_schema"), "schema": _OBJECT}, more=True)),
    },
    "effort",
    "format",
    more=True,
)
_ASKED: dict[str, Schema] = {
    "model": nullable(STRING),
    "messages": {**listed(_MESSAGE), "minItems": 1},
    "max_tokens": {**COUNT, "description": "More than the context has room for is as much as it has."},
    "system": nullable({"anyOf": [STRING, listed(_TEXT)]}),
    "tools": nullable({**listed(_TOOL), "maxItems": MOST_TOOLS}),
    "tool_choice": nullable(_CHOICE),
    "stop_sequences": nullable(
        {**listed({"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}), "maxItems": MOST_STOPS}
    ),
    "temperature": nullable({"type": "number", "minimum": 0, "maximum": 2}),
    "top_p": nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": nullable({"type": "integer", "minimum": -1, "maximum": 2**31 - 1}),
    "stream": _FLAG,
    "thinking": nullable(_THINKING),
    "output_config": nullable(_CONFIG),
    "metadata": nullable(record({"user_id": nullable(STRING)}, "user_id", more=True)),
}
_OPTIONAL = tuple(name for name in _ASKED if name not in ("messages", "max_tokens"))
_USAGE = record(
    {
        "input_tokens": {**COUNT, "description": "Without those found in the prefix cache."},
        "cache_creation_input_tokens": COUNT,
        "cache_read_input_tokens": COUNT,
        "output_tokens": COUNT,
    }
)
_REASON = one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded")
_ANSWERED: Schema = {
    "anyOf": [
        record({"type": constant("text"), "text": STRING}),
        record({"type": constant("thinking"), "thinking": STRING, "signature": STRING}),
        record({"type": constant("tool_use"), "id": STRING, "name": STRING, "input": _OBJECT}),
    ]
}
_ENDING: dict[str, Schema] = {"stop_reason": nullable(_REASON), "stop_sequence": nullable(STRING)}
_PART: Schema = {
    "anyOf": [
        record({"type": constant("text_delta"), "text": STRING}),
        record({"type": constant("thinking_delta"), "thinking": STRING}),
        record({"type": constant("signature_delta"), "signature": STRING}),
        record({"type": constant("input_json_delta"), "partial_json": STRING}),
    ]
}

ANTHROPIC_SCHEMAS: dict[str, Schema] = {
    "MessagesRequest": record(_ASKED, *_OPTIONAL, more=True),
    "CountTokensRequest": record({**_ASKED, "max_tokens": nullable(COUNT)}, *_OPTIONAL, "max_tokens", more=True),
    "TokenCount": record({"input_tokens": COUNT}),
    "AnsweredMessage": record(
        {
            "id": STRING,
            "type": constant("message"),
            "role": constant("assistant"),
            "model": STRING,
            "content": listed(_ANSWERED),
            **_ENDING,
            "usage": _USAGE,
        }
    ),
    "MessageEvent": {
        "anyOf": [
            record({"type": constant("message_start"), "message": ref("AnsweredMessage")}),
            record({"type": constant("content_block_start"), "index": COUNT, "content_block": _ANSWERED}),
            record({"type": constant("content_block_delta"), "index": COUNT, "delta": _PART}),
            record({"type": constant("content_block_stop"), "index": COUNT}),
            record({"type": constant("message_delta"), "delta": record(_ENDING), "usage": _USAGE}),
            record({"type": one_of("message_stop", "ping")}),
        ]
    },
    "MessageError": record({"type": constant("error"), "error": record({"type": STRING, "message": STRING})}),
    "NamedModel": record({"type": constant("model"), "id": STRING, "display_name": STRING, "created_at": STRING}),
}
