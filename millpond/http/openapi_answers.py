"""What the server answers, as JSON schemas: the hand-written half of the OpenAPI document.

Objects are closed unless said otherwise, so that a field that an answer gains and nobody writes down here is noticed.
"""

from __future__ import annotations

from millpond.http.errors import IN_VAIN, RETRY_AFTER

Schema = dict[str, object]

STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}


_TEXT: Schema = {"type": "string", "minLength": 1}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SOME: Schema = {"minItems": 1, "maxItems": 2048}


def ref(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def constant(value: str) -> Schema:
    return {"type": "string", "const": value}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """The schema or null, as short as can be."""
    null: Schema = {"type": "null"}
    choices = schema.get("anyOf")
    if isinstance(choices, list):
        return schema if null in choices else {**schema, "anyOf": [*choices, null]}
    if isinstance(schema.get("type"), str) and not {"const", "enum"} & schema.keys():
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, null]}


def record(properties: dict[str, Schema], *optional: str, more: bool = False) -> Schema:
    """An object with these properties, all of them required but ``optional``; ``more`` leaves it open."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


_HEAD: dict[str, Schema] = {"id": STRING, "created": COUNT, "model": STRING, "system_fingerprint": STRING}
_FINISH = one_of("stop", "length")
_CHAT_FINISH = one_of("stop", "length", "tool_calls")
_TOKEN: dict[str, Schema] = {
    "token": STRING,
    "logprob": NUMBER,
    "bytes": listed({"type": "integer", "minimum": 0, "maximum": 255}),
}


_PROMPT = listed(
    nullable(
        {
            "type": "object",
            "additionalProperties": record({"logprob": NUMBER, "rank": COUNT, "decoded_token": STRING}),
        }
    )
)


def _completion(finish: Schema, usage: Schema, *optional: str) -> Schema:
    choice = record(
        {
            "index": COUNT,
            "text": STRING,
            "logprobs": nullable(ref("CompletionLogprobs")),
            "finish_reason": finish,
            "prompt_logprobs": _PROMPT,
        },
        "prompt_logprobs",
    )
    return record(
        {**_HEAD, "object": constant("text_completion"), "choices": listed(choice), "usage": usage}, *optional
    )


def _chat(kind: str, choice: dict[str, Schema], finish: Schema, usage: Schema, *optional: str) -> Schema:
    rendered = record({"index": COUNT, **choice, "logprobs": nullable(ref("ChatLogprobs")), "finish_reason": finish})
    whole = {**_HEAD, "object": constant(kind), "choices": listed(rendered), "usage": usage, "prompt_logprobs": _PROMPT}
    return record(whole, "prompt_logprobs", *optional)


_CALL = record({"id": STRING, "type": constant("function"), "function": record({"name": STRING, "arguments": STRING})})
_CALL_PART = record(
    {
        "index": COUNT,
        "id": STRING,
        "type": constant("function"),
        "function": record({"name": STRING, "arguments": STRING}, "name"),
    },
    "id",
    "type",
)
_MESSAGE = record(
    {
        "role": constant("assistant"),
        "content": nullable(STRING),
        "refusal": {"type": "null"},
        "reasoning_content": STRING,
        "reasoning": STRING,
        "tool_calls": listed(_CALL),
    },
    "reasoning_content",
    "reasoning",
    "tool_calls",
)
_DELTA = record(
    {
        "role": constant("assistant"),
        "content": STRING,
        "reasoning_content": STRING,
        "reasoning": STRING,
        "tool_calls": listed(_CALL_PART),
    },
    "role",
    "content",
    "reasoning_content",
    "reasoning",
    "tool_calls",
)

SCHEMAS: dict[str, Schema] = {
    "Error": record(
        {
            "error": record(
                {
                    "message": {**STRING, "description": "For people: what is wrong, and what is allowed."},
                    "type": one_of("invalid_request_error", "rate_limit_error", "server_error"),
                    "param": {"type": ["string", "null"], "description": "The field at fault."},
                    "code": {"type": ["string", "null"], "description": "A stable word for programs."},
                }
            )
        }
    ),
    "Usage": record(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": record({"cached_tokens": COUNT}),
            "completion_tokens_details": record(
                {
                    "reasoning_tokens": {**COUNT, "description": "Of the answer, those that are thoughts."},
                    "accepted_prediction_tokens": {**COUNT, "description": "Of the answer, those guessed ahead."},
                    "rejected_prediction_tokens": {**COUNT, "description": "Wrong guesses."},
                }
            ),
        }
    ),
    "ChatCompletion": _chat("chat.completion", {"message": _MESSAGE}, _CHAT_FINISH, ref("Usage")),
    "ChatCompletionChunk": _chat(
        "chat.completion.chunk", {"delta": _DELTA}, nullable(_CHAT_FINISH), nullable(ref("Usage")), "usage"
    ),
    "ChatLogprobs": record(
        {"content": listed(record({**_TOKEN, "top_logprobs": listed(record(_TOKEN))})), "refusal": {"type": "null"}}
    ),
    "Completion": _completion(_FINISH, ref("Usage")),
    "CompletionChunk": _completion(nullable(_FINISH), nullable(ref("Usage")), "usage"),
    "CompletionLogprobs": record(
        {
            "tokens": listed(STRING),
            "token_logprobs": listed(nullable(NUMBER)),
            "top_logprobs": nullable(listed(nullable({"type": "object", "additionalProperties": NUMBER}))),
            "text_offset": listed(COUNT),
        }
    ),
    "Explanation": record(
        {
            "object": constant("list"),
            "data": listed(
                record(
                    {
                        "prompt_tokens": COUNT,
                        "cached_tokens": COUNT,
                        "memory_tokens": COUNT,
                        "disk_tokens": COUNT,
                        "known_tokens": COUNT,
                        "end": {**STRING, "description": "Why no more is cached."},
                        "at": {**STRING, "description": "The part of the request that is not known any more."},
                    }
                )
            ),
        }
    ),
    "EmbeddingsRequest": record(
        {
            "model": nullable(STRING),
            "input": {"anyOf": [_TEXT, _IDS, {**listed(_TEXT), **_SOME}, {**listed(_IDS), **_SOME}]},
            "encoding_format": nullable(one_of("float", "base64")),
            "dimensions": nullable({"type": "integer", "minimum": 1}),
            "user": nullable(STRING),
        },
        "model",
        "encoding_format",
        "dimensions",
        "user",
        more=True,
    ),
    "Embeddings": record(
        {
            "object": constant("list"),
            "data": listed(
                record(
                    {
                        "object": constant("embedding"),
                        "index": COUNT,
                        "embedding": {
                            "anyOf": [listed(NUMBER), {**STRING, "description": "float32, little-endian, base64"}]
                        },
                    }
                )
            ),
            "model": STRING,
            "usage": record({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        }
    ),
    "DetokenizeRequest": record({"tokens": listed(COUNT)}, more=True),
    "Tokens": record(
        {"count": COUNT, "max_model_len": COUNT, "tokens": listed(COUNT), "token_strs": nullable(listed(STRING))}
    ),
    "TokensText": record({"prompt": STRING, "content": STRING}),
    "Model": record(
        {
            "id": STRING,
            "object": constant("model"),
            "created": COUNT,
            "owned_by": STRING,
            "max_model_len": COUNT,
            "millpond": {"type": "object", "description": "What the engine found out about the model."},
        },
        "max_model_len",
        "millpond",
    ),
    "ModelList": record({"object": constant("list"), "data": listed(ref("Model"))}),
    "Health": record(
        {
            "status": STRING,
            "reasons": listed(STRING),
            "engine": {"type": "object"},
            "requests": {
                "type": "object",
                "description": "submitted is always finished + failed + cancelled + running.",
                "properties": dict.fromkeys(("submitted", "finished", "failed", "cancelled", "running"), COUNT),
                "required": ["submitted", "finished", "failed", "cancelled", "running"],
            },
            "prefix_cache": {"type": ["object", "null"]},
        },
        more=True,
    ),
    "Liveness": record({"status": constant("ok")}),
    "Readiness": record({"status": one_of("ready", "not ready"), "reasons": listed(STRING)}, "reasons"),
}

FAILURES: dict[int, str] = {
    400: "The request is not valid; param names the field at fault.",
    401: "An API key is required, or the one shown is not valid.",
    403: "This Host is not served here, or a page of this Origin may not call.",
    404: "There is no such model.",
    408: "The request's body took too long to come.",
    413: "The request's body is too large, or has too many values.",
    415: "The request's body is compressed.",
    429: "Too much is running or waiting already.",
    500: "Something failed in the server.",
    503: "The model is not ready, or the server is shutting down.",
    504: "A time limit of the server ended the request; code says which.",
}
"""Status → when it is given. The body is always an Error."""

RESPONSE_HEADERS: dict[str, Schema] = {
    "RequestId": {
        "description": "The client's x-request-id where it gave a good one, else one made here.",
        "schema": STRING,
    },
    "RetryAfter": {"description": "Seconds after which to try again.", "schema": STRING},
    "Authenticate": {"description": "How to show a key.", "schema": STRING},
    "PrefixCache": {
        "description": "What the prefix cache did: tokens by tier, and why no more were cached.",
        "schema": STRING,
        "example": "memory=128, disk=0, known=128, end=new",
    },
    "Ignored": {
        "description": "What of the request's schemas is not seen to, each keyword behind its field.",
        "schema": STRING,
        "example": "response_format.json_schema.schema: not",
    },
    "ShouldRetry": {"description": "Whether the same request may go better; only where it may not.", "schema": STRING},
}

_OWN_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Authenticate"},
    429: dict.fromkeys(RETRY_AFTER, "RetryAfter"),
    500: dict.fromkeys(IN_VAIN, "ShouldRetry"),
    503: dict.fromkeys(RETRY_AFTER, "RetryAfter"),
    504: dict.fromkeys(IN_VAIN, "ShouldRetry"),
}


def headers(**names: str) -> dict[str, Schema]:
    """References to response headers: underscores in a name stand for dashes."""
    return {name.replace("_", "-"): header_ref(component) for name, component in names.items()}


def header_ref(component: str) -> Schema:
    return {"$ref": f"#/components/headers/{component}"}


def failure(status: int, error: str) -> Schema:
    """The response component of a failure; ``error`` names the schema of its body."""
    own = {name: header_ref(component) for name, component in _OWN_HEADERS.get(status, {}).items()}
    # What is refused before it is a request, such as what is not HTTP, has no id; hence not required.
    return {
        "description": FAILURES[status],
        "headers": {"x-request-id": header_ref("RequestId"), **own},
        "content": {"application/json": {"schema": ref(error)}},
    }
