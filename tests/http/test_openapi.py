"""GET /openapi.json: a valid document that leaves nothing out, and a server that keeps to it whatever it is sent."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

import millpond.http
from millpond.http.app import ROUTES
from millpond.http.gate import ANY_HOST, OPEN
from millpond.http.openapi import OPERATIONS, READ_BY_HAND, REQUESTS, document

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from conftest import Server, StartServer
    from schemathesis import BaseSchema, Response
    from schemathesis import Case as AnyCase
    from schemathesis.checks import CheckFunction
    from schemathesis.core.result import Ok
    from schemathesis.schemas import APIOperation

    Operation = APIOperation[Any, Any, Any, Any]
    Case = AnyCase[Any]

Document = dict[str, Any]

PROMISES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
"""What schemathesis checks of every answer."""
CONTEXT = 4096
"""Tokens: random conversations have room, so that most requests that fit the document are answered."""
LATER_REFUSALS = {
    *("context_length_exceeded", "unsupported_parameter", "template_error"),
    *("previous_response_not_found", "item_not_found"),
}
"""Why a request that fits the document, and whose fields fit each other, may still get a 400."""
LARGE = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/input_tokens")
"""Their bodies have so many cases that they take minutes."""
FEW = 50
"""Boundaries of an operation that are all tried in any run."""
LATER_WORDS = ("prompt is too long: ", "tools: this model's chat template", "messages", "tool_choice: ")
"""The same in words."""
DIMENSIONS = 8
COMMANDS = range(900, 906)
"""Token ids that the scripted engine obeys, by dying for example."""


@pytest.fixture(scope="module")
def written() -> Document:
    return document(ROUTES)


def operations(written: Document) -> list[tuple[str, str, Document]]:
    return [(path, method, operation) for path, item in written["paths"].items() for method, operation in item.items()]


# --- the document -------------------------------------------------------------------------------------------------


def test_the_document_is_valid(server: Server, written: Document) -> None:
    served = httpx.get(f"{server.url}/openapi.json")
    assert served.status_code == 200
    assert served.headers["content-type"] == "application/json"
    assert served.json() == written
    assert served.json()["openapi"].startswith("3.1.")
    assert [str(error) for error in OpenAPIV31SpecValidator(served.json()).iter_errors()] == []


def test_every_route_is_in_it(written: Document) -> None:
    routes = {(route.path_format, method.lower()) for route in ROUTES for method in (route.methods or set()) - {"HEAD"}}
    assert {(path, method) for path, method, _ in operations(written)} == routes
    assert len(ROUTES) == len(operations(written))


def test_every_field_of_the_requests_is_in_it(written: Document) -> None:
    for model in REQUESTS:
        schema = written["components"]["schemas"][model.__name__]
        assert schema["properties"].keys() == model.model_fields.keys()
        for name, field in model.model_fields.items():
            shown = schema["properties"][name]
            assert shown["description"] == field.description
            assert (name in schema["required"]) == field.is_required()
            assert shown.keys() & {"type", "anyOf", "$ref"}, f"{name} says nothing about its values"
            assert "null" in str(shown) or field.is_required()
    assert READ_BY_HAND.keys() <= {name for model in REQUESTS for name in model.model_fields}


def test_every_status_of_the_code_is_in_it(written: Document) -> None:
    """Statuses that handlers raise by number; a 405 belongs to methods that a document cannot have."""
    raised = {
        node.args[0].value
        for file in Path(millpond.http.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError" and node.args
        if isinstance(node.args[0], ast.Constant)
    }
    assert {400, 401, 403, 404, 405, 413, 429, 500, 503} <= raised
    documented = {int(status) for _, _, operation in operations(written) for status in operation["responses"]}
    assert raised - {405} <= documented


def test_streams_and_errors_are_in_it(written: Document) -> None:
    schemas = written["components"]["schemas"]
    assert set(schemas["Error"]["properties"]["error"]["required"]) == {"message", "type", "param", "code"}
    errors = {f"#/components/schemas/{operation.error}" for operation in OPERATIONS.values()}
    for response in written["components"]["responses"].values():
        assert response["content"]["application/json"]["schema"]["$ref"] in errors
    for path in ("/v1/chat/completions", "/v1/completions"):
        operation = written["paths"][path]["post"]
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {400, 401, 403, 404, 408, 413, 429, 500, 503, 504} <= {int(status) for status in operation["responses"]}


def test_only_the_probes_are_open(written: Document) -> None:
    assert {path for path, _, operation in operations(written) if "security" not in operation} == set(OPEN)
    assert {path for path, _, operation in operations(written) if "401" not in operation["responses"]} == set(OPEN)
    assert {path for path, _, operation in operations(written) if "403" not in operation["responses"]} == set(ANY_HOST)
    assert {*OPEN, *ANY_HOST} <= OPERATIONS.keys()


# --- the server against the document ------------------------------------------------------------------------------


class Examination:
    """Sends generated requests to one server and checks every answer against the document it gave."""

    def __init__(self, server: Server) -> None:
        load_all_checks()
        self.schema: BaseSchema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self.session = requests.Session()
        self.cases = 0
        self.answers: Counter[tuple[str, int, str]] = Counter()

    def boundaries(self, operation: Operation, every: int) -> None:
        """Schemathesis's own list: each bound of each field from both sides, missing and extra things, methods;
        of a long list one in ``every``."""
        config = self.schema.config.generation_for(operation=operation)
        modes = list(GenerationMode)
        cases = list(self.schema.iter_coverage_cases(operation, generation_modes=modes, generation_config=config))
        for case in cases[:: every if len(cases) > FEW else 1]:
            self.ask(case, PROMISES)

    def random(self, operation: Operation, good: int, bad: int) -> None:
        """Random requests: ``good`` that fit the document and ``bad`` that do not, where there is a body."""

        def accepted(case: Case, stream: bool) -> None:
            fit(case.body, stream)
            response = self.ask(case, PROMISES)
            if response.status_code == 400:
                error = response.json()["error"]
                # Anthropic's errors have no codes: there, what it says must be about the conversation.
                known = error["code"] in LATER_REFUSALS if "code" in error else error["message"].startswith(LATER_WORDS)
                assert known, (case.body, response.text)

        def refused(case: Case, _stream: bool) -> None:
            self.ask(case, (*PROMISES, "negative_data_rejection"))

        run(operation, GenerationMode.POSITIVE, good, accepted)
        if operation.body:
            run(operation, GenerationMode.NEGATIVE, bad, refused)

    def ask(self, case: Case, checks: tuple[str, ...]) -> Response:
        harmless(case.body)
        response = case.call(session=self.session)
        self.cases += 1
        kind = response.headers.get("content-type", [""])[0].partition(";")[0]
        self.answers[case.operation.path, response.status_code, kind] += 1
        case.validate_response(response, checks=[check(name) for name in checks])
        return response


def described(schema: BaseSchema) -> list[Operation]:
    """All operations. Raises for one that schemathesis does not understand."""
    return [cast("Ok[Operation]", result).ok() for result in schema.get_all_operations()]


def check(name: str) -> CheckFunction:
    return cast("CheckFunction", CHECKS.get_one(name))


def run(operation: Operation, mode: GenerationMode, most: int, one: Callable[[Case, bool], None]) -> None:
    numbers = itertools.count()

    # Not shrunk: each try is a request, and schemathesis shows the one that failed as it is.
    @settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def examine(case: Case) -> None:
        one(case, next(numbers) % 2 == 0)

    examine()


def harmless(body: object) -> None:
    """Take the scripted engine's commands out of a prompt."""
    if not isinstance(body, dict):
        return
    for value in (body.get("prompt"), body.get("input")):
        for prompt in (value, *value) if isinstance(value, list) else ():
            if isinstance(prompt, list):
                prompt[:] = [1 if isinstance(token, int) and token in COMMANDS else token for token in prompt]


def whole(value: object) -> object:
    """The value with whole numbers as integers, lists and objects included."""
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    if isinstance(value, dict):
        return {name: whole(entry) for name, entry in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fit(body: object, stream: bool) -> None:
    """Make the fields of a request that fits the document fit each other and this server, and the answer short.

    Chance alone asks for too few streams. A number such as 1.0 is an integer to a JSON schema, which cannot say that
    this server wants 1.
    """
    if not isinstance(body, dict):
        return
    body |= {name: whole(value) for name, value in body.items()}
    for limit in ("max_tokens", "max_completion_tokens"):
        body.pop(limit, None)
    body["max_tokens"] = body["max_output_tokens"] = 3
    for refused in ("background", "conversation", "truncation", "top_logprobs"):
        if "input" in body:
            body.pop(refused, None)
    if "input" in body:
        body.pop("tools", None)
        body.pop("tool_choice", None)
        body.pop("text", None)
    body["logit_bias"] = {str(int(token) % 800): bias for token, bias in (body.get("logit_bias") or {}).items()}
    body["model"] = "test-model" if body.get("model") else ""
    body["stream"] = stream or body.get("stream_options") is not None
    if body.get("top_logprobs") and "messages" in body:
        body["logprobs"] = True
    if body["stream"]:
        body.pop("prompt_logprobs", None)
    if isinstance(guessing := body.get("speculative"), dict) and guessing.get("mode") == "draft":
        guessing["mode"] = "ngram"  # this server has no draft model
    if isinstance(body.get("tokens"), list):
        body["tokens"] = [token % 800 for token in body["tokens"]]
    if "max_completion_tokens" not in body and body.get("stop_sequences") is not None:
        body["stop_sequences"] = [str(stop) for stop in body["stop_sequences"]]
    if body.get("tools") and "function" not in body["tools"][0]:
        body["tools"] = list({tool["name"]: {**tool, "input_schema": {}} for tool in body["tools"]}.values())
    elif body.get("tools"):  # no two of one name, and schemas that are none are not for a document to know
        body["tools"] = list({tool["function"]["name"]: tool for tool in body["tools"]}.values())
        for tool in body["tools"]:
            tool["function"].pop("parameters", None)
    if body.get("tool_choice") != "none":
        body.pop("tool_choice", None)
    for field, value in (("response_format", {"type": "json_object"}), ("structured_outputs", {"choice": ["a"]})):
        if body.get(field) is not None:
            body[field] = value
    if body.get("response_format"):
        body.pop("structured_outputs", None)
    body.pop("min_tokens", None)
    for message in body.get("messages") or ():
        message["role"] = "user" if message["role"] == "tool" else message["role"]
    if body.get("continue_final_message"):
        body["messages"][-1]["role"], body["add_generation_prompt"] = "assistant", False
    if isinstance(body.get("prompt"), list):
        body["n"] = 1
    if body.get("dimensions"):
        body["dimensions"] = min(body["dimensions"], DIMENSIONS)
    for value in (body.get("prompt"), body.get("input")):
        for tokens in (value, *value) if isinstance(value, list) else ():
            if isinstance(tokens, list):
                tokens[:] = [token % 800 if type(token) is int else token for token in tokens]


def examine(
    start_server: StartServer, good: int, bad: int, left_out: Collection[str] = (), every: int = 1
) -> Examination:
    """``left_out``: paths that are not asked; ``every``: see ``boundaries``."""
    with start_server(f"slow=0,context={CONTEXT},rows=8,embeds={DIMENSIONS}") as server:
        examination = Examination(server)
        for operation in described(examination.schema):
            if operation.path in left_out:
                continue
            examination.boundaries(operation, every)
            examination.random(operation, good, bad)
        health = server.health()["requests"]
        assert health["submitted"] == health["finished"] + health["failed"] + health["cancelled"]
        assert health["running"] == health["held"] == health["failed"] == 0
        assert not [line for line in server.lines if " error " in line or "Traceback" in line]
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert examination.answers[path, 200, "application/json"] >= good // 6, examination.answers
        assert examination.answers[path, 200, "text/event-stream"] >= good // 10, examination.answers
        assert examination.answers[path, 400, "application/json"] >= bad, examination.answers
    # The document itself was asked for by schemathesis, which leaves it out of its cases.
    asked = {path for path, _, _ in examination.answers} | {"/openapi.json"}
    assert asked == {route.path_format for route in ROUTES} - set(left_out)
    return examination


def test_the_server_keeps_to_it(start_server: StartServer) -> None:
    assert examine(start_server, good=12, bad=6, left_out=LARGE, every=11).cases >= 300


@pytest.mark.slow
def test_the_server_keeps_to_it_for_long(start_server: StartServer) -> None:
    assert examine(start_server, good=100, bad=50).cases >= 2000


def test_the_gate_keeps_to_it(start_server: StartServer) -> None:
    """Without a key, and for another host, every operation answers as its document says."""
    with start_server("plain", "api_key", "a-secret-key", "allowed_hosts", "here.test,127.0.0.1") as server:
        key = {"authorization": "Bearer a-secret-key"}
        assert httpx.get(f"{server.url}/openapi.json").status_code == 401
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=key)
        for operation in described(schema):
            for headers, expected in (
                ({}, 401),
                ({"authorization": "Bearer another-key"}, 401),
                ({"host": "elsewhere.test"}, 403),
                ({**key, "host": "elsewhere.test"}, 403),
            ):
                named = {"model": "test-model", "response": "1"}
                path = {name: value for name, value in named.items() if f"{{{name}}}" in operation.path}
                case = operation.Case(path_parameters=path)
                response = case.call(headers=headers)
                wanted = 200 if operation.path in (OPEN if expected == 401 else ANY_HOST) else expected
                assert response.status_code == wanted, (operation.label, headers)
                case.validate_response(response, checks=[check(name) for name in PROMISES])
