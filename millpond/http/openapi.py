"""GET /openapi.json: this server's API as an OpenAPI 3.1 document.

What clients may send comes from the request models in openai/schemas.py, what is answered from openapi_answers.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millpond import __version__
from millpond.http.form_fields import MOST_CHARACTERS
from millpond.http.front_end import front_end_of
from millpond.http.gate import ANY_HOST, OPEN
from millpond.http.openai.forms import MOST_CHOICES
from millpond.http.openai.messages import ROLES
from millpond.http.openai.schemas import (
    LONGEST_STOP,
    MOST_BIASES,
    MOST_STOPS,
    NOT_IMPLEMENTED,
    SETTING_PATTERN,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
    StreamOptions,
)
from millpond.http.openapi_answers import (
    FAILURES,
    RESPONSE_HEADERS,
    SCHEMAS,
    STRING,
    Schema,
    constant,
    failure,
    headers,
    listed,
    nullable,
    record,
    ref,
)
from millpond.http.openapi_anthropic import ANTHROPIC_SCHEMAS
from millpond.http.openapi_responses import RESPONSES_SCHEMAS
from millpond.http.speculation_fields import SpeculativeOptions
from millpond.http.thinking import EFFORTS
from millpond.http.tool_fields import MOST_TOOLS, NAME_PATTERN

JSON = "application/json"
EVENTS = "text/event-stream"
REQUESTS: tuple[type[OpenAIRequest], ...] = (ChatRequest, CompletionRequest)

_TEXT: Schema = {"type": "string", "minLength": 1}
_STOP: Schema = {**_TEXT, "maxLength": LONGEST_STOP}
_TOKENS: Schema = {**listed({"type": "integer", "minimum": 0}), "minItems": 1}
_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"type": "string", "const": "text"}, "text": STRING},
    "required": ["type", "text"],
}
_CONTENTS: list[Schema] = [STRING, {**listed(_TEXT_PART), "minItems": 1}]
_CONTENT: Schema = {"anyOf": _CONTENTS}
_NAMES: Schema = {"name": nullable(STRING), "tool_call_id": nullable(STRING)}
_NAME: Schema = {"type": "string", "pattern": NAME_PATTERN}
_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": nullable(STRING),
        "type": constant("function"),
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "arguments": nullable(STRING)},
            "required": ["name"],
        },
    },
    "required": ["function"],
}
_ANSWERED: Schema = {
    **_NAMES,
    "reasoning_content": nullable(STRING),
    "reasoning": nullable(STRING),
    "tool_calls": nullable(listed(_CALL)),
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": constant("function"),
        "function": {
            "type": "object",
            "properties": {
                "name": _NAME,
                "description": nullable(STRING),
                "parameters": nullable({"type": "object"}),
                "strict": nullable({"type": "boolean"}),
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}


def _of_type(kind: str, **rest: Schema) -> Schema:
    """An object of that type, with what else it must have."""
    return {"type": "object", "properties": {"type": constant(kind), **rest}, "required": ["type", *rest]}


_SCHEMA_FORM: dict[str, Schema] = {
    "json_schema": {
        "type": "object",
        "properties": {
            "name": STRING,
            "schema": nullable({"type": "object"}),
            "strict": nullable({"type": "boolean"}),
        },
    }
}
_NAMED = _of_type("function", function={"type": "object", "properties": {"name": _NAME}, "required": ["name"]})
_ALLOWED = _of_type(
    "allowed_tools",
    allowed_tools={
        "type": "object",
        "properties": {"mode": {"type": "string", "enum": ["auto", "required"]}, "tools": listed(_NAMED)},
        "required": ["mode", "tools"],
    },
)
_MESSAGE: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "role": {"type": "string", "enum": [role for role in ROLES if role != "assistant"]},
                "content": _CONTENT,
                **_NAMES,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                "role": constant("assistant"),
                "content": {"anyOf": [*_CONTENTS, {"type": "null"}]},
                **_ANSWERED,
            },
            "required": ["role"],
        },
    ]
}

READ_BY_HAND: Mapping[str, Schema] = {
    "messages": {**listed(_MESSAGE), "minItems": 1},
    "prompt": {"anyOf": [_TEXT, _TOKENS, {**listed({"anyOf": [_TEXT, _TOKENS]}), "minItems": 1}]},
    "stop": {"anyOf": [_STOP, {**listed(_STOP), "maxItems": MOST_STOPS}]},
    "logit_bias": {
        "type": "object",
        "maxProperties": MOST_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "tools": {**listed(_TOOL), "maxItems": MOST_TOOLS},
    "tool_choice": {"anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, _NAMED, _ALLOWED]},
    "response_format": {"anyOf": [_of_type("text"), _of_type("json_object"), _of_type("json_schema", **_SCHEMA_FORM)]},
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": {"type": ["object", "string"]},
            "regex": {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS},
            "choice": {**listed(_TEXT), "minItems": 1, "maxItems": MOST_CHOICES},
            "grammar": {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS},
            "json_object": {"type": "boolean"},
        },
        "additionalProperties": False,
        "maxProperties": 1,
    },
    "reasoning_effort": {"type": "string", "enum": list(EFFORTS)},
    "chat_template_kwargs": {
        "type": "object",
        "additionalProperties": {"type": ["boolean", "number", "string"], "pattern": SETTING_PATTERN},
    },
    "speculative": ref(SpeculativeOptions.__name__),
    "prediction": {
        "type": "object",
        "properties": {"type": constant("content"), "content": _CONTENT},
        "required": ["type", "content"],
    },
}
"""Fields whose validators say more than their types: what pydantic cannot know."""

UNKNOWN_FIELDS = (
    "A field that is null counts as absent. Unknown fields are ignored; these have a meaning that is not implemented "
    "and get a 400 unless their value asks for nothing: "
)


@dataclass(frozen=True)
class Operation:
    """What there is to say about one route. ``answers`` are schemas of JSON bodies by status."""

    name: str
    summary: str
    answers: Mapping[int, Schema]
    failures: tuple[int, ...] = ()
    """Statuses beside those that any operation may have."""
    body: Schema | None = None
    chunks: str = ""
    """The schema of one event where the answer may be streamed."""
    parameters: tuple[Schema, ...] = ()
    texts: tuple[str, ...] = ()
    """The media types of a 200 that is not JSON."""
    headers: dict[str, Schema] = field(default_factory=dict)
    error: str = "Error"
    """The schema of what a failure says."""


_ANSWERING = (404, 408, 429, 503, 504)
_PREFIX = headers(x_millpond_prefix_cache="PrefixCache", x_millpond_ignored="Ignored")

_RESPONSE_ID: Schema = {"name": "response", "in": "path", "required": True, "schema": STRING}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_TOKENIZED: Mapping[str, Schema] = {"prompt": STRING, "content": STRING, "messages": READ_BY_HAND["messages"]}
_TOKENIZING: dict[str, Schema] = dict.fromkeys(
    ("add_special_tokens", "parse_special", "return_token_strs"), nullable({"type": "boolean"})
)

OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation(
        "createChatCompletion",
        "Answer a chat.",
        {200: ref("ChatCompletion")},
        _ANSWERING,
        ref("ChatRequest"),
        "ChatCompletionChunk",
        headers=_PREFIX,
    ),
    "/v1/completions": Operation(
        "createCompletion",
        "Continue one or several texts.",
        {200: ref("Completion")},
        _ANSWERING,
        ref("CompletionRequest"),
        "CompletionChunk",
        headers=_PREFIX,
    ),
    "/v1/messages": Operation(
        "createMessage",
        "Answer a conversation, as Anthropic's API has it.",
        {200: ref("AnsweredMessage")},
        _ANSWERING,
        ref("MessagesRequest"),
        "MessageEvent",
        headers=_PREFIX,
        error="MessageError",
    ),
    "/v1/messages/count_tokens": Operation(
        "countTokens",
        "How many tokens the prompt of a conversation has.",
        {200: ref("TokenCount")},
        _ANSWERING,
        ref("CountTokensRequest"),
        error="MessageError",
    ),
    "/v1/responses": Operation(
        "createResponse",
        "Answer a conversation of items.",
        {200: ref("Response")},
        _ANSWERING,
        ref("ResponsesRequest"),
        "ResponseEvent",
        headers=_PREFIX,
    ),
    "/v1/responses/input_tokens": Operation(
        "countInputTokens",
        "How many tokens the prompt of such a conversation has.",
        {200: ref("InputTokens")},
        _ANSWERING,
        ref("ResponsesRequest"),
    ),
    "/v1/responses/resp_{response}": Operation(
        "getResponse", "A response that is kept.", {200: ref("Response")}, (404,), parameters=(_RESPONSE_ID,)
    ),
    "DELETE /v1/responses/resp_{response}": Operation(
        "deleteResponse",
        "Keep a response no longer.",
        {200: ref("DeletedResponse")},
        (404,),
        parameters=(_RESPONSE_ID,),
    ),
    "/v1/responses/resp_{response}/input_items": Operation(
        "listInputItems",
        "What was before a kept answer.",
        {200: ref("ItemList")},
        (404,),
        parameters=(
            _RESPONSE_ID,
            _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
            _query("order", {"type": "string", "enum": ["asc", "desc"]}),
            _query("after", STRING),
        ),
    ),
    "/v1/responses/resp_{response}/cancel": Operation(
        "cancelResponse", "Refused: none runs in the background.", {}, (404,), parameters=(_RESPONSE_ID,)
    ),
    "/v1/embeddings": Operation(
        "createEmbeddings",
        "A vector of each text, of a model that declares how they are made.",
        {200: ref("Embeddings")},
        _ANSWERING,
        ref("EmbeddingsRequest"),
    ),
    "/tokenize": Operation(
        "tokenize",
        "The tokens of a text, or of the prompt that a chat would have.",
        {200: ref("Tokens")},
        (404, 408, 503),
        {"anyOf": [record({name: kind, **_TOKENIZING}, *_TOKENIZING) for name, kind in _TOKENIZED.items()]},
    ),
    "/detokenize": Operation(
        "detokenize", "The text of tokens.", {200: ref("TokensText")}, (404, 408, 503), ref("DetokenizeRequest")
    ),
    "/tokenizer_info": Operation(
        "getTokenizer", "What the model's folder says of its tokenizer.", {200: {"type": "object"}}, (503,)
    ),
    "/api/hello": Operation("getHello", "Whether there is anybody, as Claude Code asks it.", {200: {"type": "object"}}),
    "/v1/cache/explain": Operation(
        "explainCache",
        "What the prefix cache would do for a request, without running it. With messages it is read as a chat.",
        {200: ref("Explanation")},
        _ANSWERING,
        {"anyOf": [ref("ChatRequest"), ref("CompletionRequest")]},
    ),
    "/v1/models": Operation("listModels", "The model that is served.", {200: ref("ModelList")}),
    "/v1/models/{model}": Operation(
        "getModel",
        "The model, by any of its names; a slash may stand as it is.",
        {200: ref("Model")},
        (404,),
        parameters=({"name": "model", "in": "path", "required": True, "schema": STRING},),
    ),
    "/health": Operation(
        "getHealth",
        "How it goes, with numbers; 503 while no request is served.",
        dict.fromkeys((200, 503), ref("Health")),
    ),
    "/livez": Operation("getLiveness", "Whether this process answers.", {200: ref("Liveness")}),
    "/readyz": Operation(
        "getReadiness", "Whether requests are welcome; 503 says why not.", dict.fromkeys((200, 503), ref("Readiness"))
    ),
    "/metrics": Operation(
        "getMetrics", "Numbers for Prometheus.", {}, texts=("text/plain", "application/openmetrics-text")
    ),
    "/openapi.json": Operation("getDocument", "This document.", {200: {"type": "object"}}),
}
"""Path, behind its method where it has several, → what it is. What an application lacks is left out of the document."""


async def openapi(request: Request) -> Response:
    """The route."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        # Too slow to be made on the event loop, or more than once.
        state.openapi = await front_end_of(request).in_text_thread(
            lambda: msgspec.json.encode(document(request.app.routes))
        )
    return Response(state.openapi, media_type=JSON)


def document(routes: Iterable[BaseRoute]) -> Schema:
    """The whole document for an application with these routes."""
    paths: dict[str, Schema] = {}
    for route in routes:
        if isinstance(route, Route) and (path := route.path_format) in OPERATIONS:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                operation = OPERATIONS.get(f"{method} {path}", OPERATIONS[path])
                paths.setdefault(path, {})[method.lower()] = _operation(path, operation)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Millpond",
            "version": __version__,
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": "An OpenAI-compatible API for one language model. Errors have one shape; a known path with "
            "another method gets a 405 in it, an unknown path a 404.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS | ANTHROPIC_SCHEMAS | RESPONSES_SCHEMAS | _request_schemas(),
            "responses": {
                f"{error}{status}": failure(status, error)
                for error in sorted({operation.error for operation in OPERATIONS.values()})
                for status in FAILURES
            },
            "headers": RESPONSE_HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(path: str, operation: Operation) -> Schema:
    own = operation.answers.keys()
    # Any request may be malformed, announce a huge body or hit a bug; who may ask is for the gate to say.
    refusals = {400, 413, 500, *operation.failures}
    if operation.body is not None:
        refusals.add(415)
    if path not in OPEN:
        refusals.add(401)
    if path not in ANY_HOST:
        refusals.add(403)
    entry: Schema = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            **{str(status): _answer(operation, status) for status in (own or (200,))},
            **{
                str(status): {"$ref": f"#/components/responses/{operation.error}{status}"}
                for status in sorted(refusals - own)
            },
        },
    }
    if path not in OPEN:
        entry["security"] = [{}, {"bearer": []}, {"apiKey": []}]
    if operation.parameters:
        entry["parameters"] = list(operation.parameters)
    if operation.body is not None:
        entry["requestBody"] = {"required": True, "content": {JSON: {"schema": operation.body}}}
    return entry


def _answer(operation: Operation, status: int) -> Schema:
    content: Schema = {kind: {"schema": STRING} for kind in operation.texts}
    if status in operation.answers:
        content[JSON] = {"schema": operation.answers[status]}
    if operation.chunks:
        content[EVENTS] = {"schema": _event(ref(operation.chunks), ref(operation.error))}
    more = headers(Retry_After="RetryAfter") if status == 503 else operation.headers
    description = "Not now." if status == 503 else "It went well."
    return {"description": description, "headers": headers(x_request_id="RequestId") | more, "content": content}


def _event(chunk: Schema, error: Schema) -> Schema:
    """One server-sent event."""
    payload: Schema = {"anyOf": [chunk, error]}
    data: Schema = {"type": "string", "contentMediaType": JSON, "contentSchema": payload}
    data = {"if": constant("[DONE]"), "then": True, "else": data}
    description = "Where stream is true. An Error, when the answer fails half way, or [DONE] as data is the last event."
    return {"type": "object", "description": description, "properties": {"data": data}, "required": ["data"]}


def _request_schemas() -> dict[str, Schema]:
    schemas: dict[str, Schema] = {
        each.__name__: each.model_json_schema() for each in (StreamOptions, SpeculativeOptions)
    }
    for model in REQUESTS:
        schema: Schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        required = schema["required"]
        properties = schema["properties"]
        assert isinstance(required, list)
        assert isinstance(properties, dict)
        schema["properties"] = {name: _property(name, found, name in required) for name, found in properties.items()}
        refused = ", ".join(name for name in NOT_IMPLEMENTED if name not in properties)
        schema["description"] = f"{UNKNOWN_FIELDS}{refused}."
        schemas[model.__name__] = schema
    return schemas


def _property(name: str, found: Schema, required: bool) -> Schema:
    """A field as clients see it: read by hand where it is, and with null for absent where it may be absent."""
    notes = {key: value for key, value in found.items() if key in ("description", "default") and value is not None}
    found = {key: value for key, value in found.items() if key not in ("title", "description", "default")}
    schema = READ_BY_HAND.get(name, found)
    return {**(schema if required else nullable(schema)), **notes}
