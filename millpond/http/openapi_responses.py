"""Responses in the OpenAPI document: what may be asked, and what is answered."""

from __future__ import annotations

from millpond.http.openapi_answers import COUNT, STRING, Schema, constant, listed, nullable, one_of, record, ref
from millpond.http.responses.items import ROLES
from millpond.http.responses.schemas import LONGEST_ID, LONGEST_USER
from millpond.http.thinking import EFFORTS
from millpond.http.tool_fields import MOST_TOOLS, NAME_PATTERN

_OBJECT: Schema = {"type": "object"}
_FLAG: Schema = nullable({"type": "boolean"})
_NAME: Schema = {"type": "string", "pattern": NAME_PATTERN}


def _of_type(kind: str, *optional: str, **fields: Schema) -> Schema:
    """An object of that type; others of its fields are nobody's business."""
    return record({"type": constant(kind), **fields}, *optional, more=True)


_PARTS = listed({"anyOf": [_of_type(kind, text=STRING) for kind in ("input_text", "output_text")]})
_CONTENT: Schema = {"anyOf": [STRING, _PARTS]}
_ITEM: Schema = {
    "anyOf": [
        record({"role": one_of(*ROLES), "content": _CONTENT}),
        _of_type("message", role=one_of(*ROLES), content=_CONTENT),
        _of_type("item_reference", id=STRING),
        _of_type("reasoning", "encrypted_content", encrypted_content=nullable(STRING)),
        _of_type("function_call", call_id=STRING, name=STRING, arguments=STRING),
        _of_type("function_call_output", call_id=STRING, output=_CONTENT),
        _of_type("custom_tool_call", call_id=STRING, name=STRING, input=STRING),
        _of_type("custom_tool_call_output", call_id=STRING, output=_CONTENT),
    ]
}
_FUNCTION = _of_type(
    "function",
    *("description", "parameters", "strict"),
    name=_NAME,
    description=nullable(STRING),
    parameters=nullable(_OBJECT),
    strict=_FLAG,
)
_TOOL: Schema = {
    "anyOf": [
        _FUNCTION,
        _of_type("custom", "description", name=_NAME, description=nullable(STRING)),
        _of_type("namespace", name={**STRING, "minLength": 1}, tools=listed(_FUNCTION)),
    ]
}
_NAMED: Schema = {"anyOf": [record({"type": one_of("function", "custom"), "name": STRING}, more=True)]}
_CHOICE: Schema = {
    "anyOf": [
        one_of("none", "auto", "required"),
        _NAMED,
        record({"type": constant("allowed_tools"), "mode": one_of("auto", "required"), "tools": listed(_NAMED)}),
    ]
}
_FORMAT: Schema = {
    "anyOf": [
        _of_type("text"),
        _of_type("json_object"),
        _of_type("json_schema", "strict", schema=_OBJECT, strict=_FLAG),
    ]
}
_ASKED: dict[str, Schema] = {
    "model": nullable(STRING),
    "input": {"anyOf": [{**STRING, "minLength": 1}, {**listed(_ITEM), "minItems": 1}]},
    "instructions": nullable(STRING),
    "tools": nullable({**listed(_TOOL), "maxItems": MOST_TOOLS}),
    "tool_choice": nullable(_CHOICE),
    "parallel_tool_calls": _FLAG,
    "reasoning": nullable(record({"effort": nullable(one_of(*EFFORTS))}, "effort", more=True)),
    "text": nullable(record({"format": nullable(_FORMAT)}, "format", more=True)),
    "max_output_tokens": nullable({"type": "integer", "minimum": 1}),
    "temperature": nullable({"type": "number", "minimum": 0, "maximum": 2}),
    "top_p": nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "stream": _FLAG,
    "store": {**_FLAG, "description": "Whether the answer is kept, for previous_response_id; by default it is."},
    "previous_response_id": nullable({"type": "string", "maxLength": LONGEST_ID}),
    "include": nullable(listed(STRING)),
    "metadata": nullable(_OBJECT),
    "user": nullable({"type": "string", "maxLength": LONGEST_USER}),
}
_STATUS = one_of("in_progress", "completed", "incomplete")
_TEXT = record(
    {"type": constant("output_text"), "text": STRING, "annotations": listed(_OBJECT), "logprobs": listed({})}
)
_CALL: dict[str, Schema] = {"id": STRING, "status": _STATUS, "call_id": STRING, "name": STRING, "namespace": STRING}
_OUTPUT: Schema = {
    "anyOf": [
        record(
            {
                "type": constant("message"),
                "id": STRING,
                "status": _STATUS,
                "role": constant("assistant"),
                "content": listed(_TEXT),
            }
        ),
        record(
            {
                "type": constant("reasoning"),
                "id": STRING,
                "summary": listed(_OBJECT),
                "content": listed(record({"type": constant("reasoning_text"), "text": STRING})),
                "encrypted_content": STRING,
            },
            "encrypted_content",
        ),
        record({"type": constant("function_call"), **_CALL, "arguments": STRING}, "namespace"),
        record({"type": constant("custom_tool_call"), **_CALL, "input": STRING}, "namespace"),
    ]
}
_RESPONSE = record(
    {
        "id": STRING,
        "object": constant("response"),
        "created_at": COUNT,
        "status": one_of("in_progress", "completed", "incomplete", "failed"),
        "error": nullable(record({"code": STRING, "message": STRING})),
        "incomplete_details": nullable(record({"reason": STRING})),
        "model": STRING,
        "output": listed(_OUTPUT),
        "instructions": nullable(STRING),
        "max_output_tokens": nullable(COUNT),
        "metadata": _OBJECT,
        "parallel_tool_calls": {"type": "boolean"},
        "previous_response_id": nullable(STRING),
        "reasoning": _OBJECT,
        "store": {"type": "boolean"},
        "temperature": {"type": "number"},
        "text": _OBJECT,
        "tool_choice": {},
        "tools": listed(_OBJECT),
        "top_p": {"type": "number"},
        "truncation": constant("disabled"),
        "usage": nullable(
            record(
                {
                    "input_tokens": COUNT,
                    "input_tokens_details": record({"cached_tokens": COUNT}),
                    "output_tokens": COUNT,
                    "output_tokens_details": record({"reasoning_tokens": COUNT}),
                    "total_tokens": COUNT,
                }
            )
        ),
    }
)


def _event(*kinds: str, **fields: Schema) -> Schema:
    named = one_of(*(f"response.{kind}" for kind in kinds))
    return record({"type": named, "sequence_number": COUNT, **fields})


_OF_ITEM: dict[str, Schema] = {"item_id": STRING, "output_index": COUNT}
_OF_PART: dict[str, Schema] = {**_OF_ITEM, "content_index": COUNT}
_EVENT: Schema = {
    "anyOf": [
        _event("created", "in_progress", "completed", "incomplete", "failed", response=ref("Response")),
        _event("output_item.added", "output_item.done", output_index=COUNT, item=_OUTPUT),
        _event("content_part.added", "content_part.done", **_OF_PART, part=_TEXT),
        _event("output_text.delta", **_OF_PART, delta=STRING, logprobs=listed({})),
        _event("output_text.done", **_OF_PART, text=STRING, logprobs=listed({})),
        _event("reasoning_text.delta", **_OF_PART, delta=STRING),
        _event("reasoning_text.done", **_OF_PART, text=STRING),
        _event("function_call_arguments.delta", "custom_tool_call_input.delta", **_OF_ITEM, delta=STRING),
        _event("function_call_arguments.done", **_OF_ITEM, name=STRING, arguments=STRING),
        _event("custom_tool_call_input.done", **_OF_ITEM, input=STRING),
    ]
}

RESPONSES_SCHEMAS: dict[str, Schema] = {
    "ResponsesRequest": record(_ASKED, *(name for name in _ASKED if name != "input"), more=True),
    "Response": _RESPONSE,
    "ResponseEvent": _EVENT,
    "ItemList": record(
        {
            "object": constant("list"),
            "data": listed(_OBJECT),
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
            "has_more": {"type": "boolean"},
        }
    ),
    "DeletedResponse": record({"id": STRING, "object": constant("response.deleted"), "deleted": {"type": "boolean"}}),
    "InputTokens": record({"object": constant("response.input_tokens"), "input_tokens": COUNT}),
}
