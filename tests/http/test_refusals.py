"""Refused requests: the status, the one error shape, and a message that names field, value and what is allowed."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from conftest import Server

CHAT = {"model": "test-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PLAIN = {"model": "test-model", "prompt": "hi", "max_tokens": 2}


def check_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, str]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, str] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert "Traceback" not in error["message"]
    assert "/" not in error["message"].replace("/v1/", "").replace("null/", "")
    if param is not None:
        assert param.split(".")[0].split("[")[0] in error["message"]
    return error


BAD_VALUES: list[tuple[str, object]] = [
    ("max_tokens", -5),
    ("max_tokens", 2.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["x"] * 17),
    ("stop", 7),
    ("stop", ["a", 7]),
    ("seed", 1.5),
    ("seed", "abc"),
    ("n", 0),
    ("n", 17),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"abc": 1}),
    ("logit_bias", {"1000": 1}),
    ("logit_bias", [1]),
    ("logit_bias", {"5": True}),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("user", 5),
    ("user", "u" * 1025),
    ("stop", "s" * 1001),
    ("stop", ["a", "s" * 1001]),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    ("speculative", {f"key{number}": 1 for number in range(2000)}),
    ("ignore_eos", 1),
    ("model", 5),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
@pytest.mark.parametrize("route", ["chat", "plain"])
def test_bad_values(raw: httpx.Client, route: str, field: str, value: object) -> None:
    path, base = ("/v1/chat/completions", CHAT) if route == "chat" else ("/v1/completions", PLAIN)
    response = raw.post(path, json={**base, field: value})
    error = response.json()["error"]
    param = error["param"]
    assert param.split(".")[0] == field
    check_error(response, 400, param)
    assert "must be" in error["message"]
    assert "got " in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", None),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
    ],
)
def test_bad_chat_values(raw: httpx.Client, field: str, value: object) -> None:
    check_error(raw.post("/v1/chat/completions", json={**CHAT, field: value}), 400, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", ""]),
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", [1, "a"]),
        ("prompt", [[1], [2.5]]),
        ("prompt", [-1]),
        ("prompt", [1000]),
        ("prompt", [True]),
        ("logprobs", 6),
        ("logprobs", True),
    ],
)
def test_bad_completion_values(raw: httpx.Client, field: str, value: object) -> None:
    check_error(raw.post("/v1/completions", json={**PLAIN, field: value}), 400, field)


def test_two_different_limits(raw: httpx.Client) -> None:
    check_error(raw.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 3}), 400, "max_tokens")
    assert raw.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("best_of", 2),
        ("suffix", "x"),
        ("guided_json", {"type": "object"}),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_is_not_implemented_is_named(raw: httpx.Client, path: str, field: str, value: object) -> None:
    base = CHAT if "chat" in path else PLAIN
    error = check_error(raw.post(path, json={**base, field: value}), 400, field)
    assert error["code"] == "unsupported_parameter"


NEUTRAL = {"tools": [], "functions": None, "best_of": 1, "suffix": "", "store": False, "min_tokens": 0}


def test_values_that_ask_for_nothing_are_fine(raw: httpx.Client) -> None:
    assert raw.post("/v1/chat/completions", json={**CHAT, **NEUTRAL}).status_code == 200
    assert raw.post("/v1/completions", json={**PLAIN, **NEUTRAL}).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            "messages[0].content[1].type",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0]"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
    ],
)
def test_bad_messages(raw: httpx.Client, message: object, param: str) -> None:
    error = check_error(raw.post("/v1/chat/completions", json={**CHAT, "messages": [message]}), 400, param)
    if "type" in param:
        assert "image_url" in error["message"] or "input_audio" in error["message"]


def test_a_template_that_refuses_is_a_400(raw: httpx.Client) -> None:
    messages = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    error = check_error(raw.post("/v1/chat/completions", json={**CHAT, "messages": messages}), 400, "messages")
    assert "no tools here" in error["message"]


def test_a_message_that_the_template_does_not_show_is_a_400(raw: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "user", "name": "hidden", "content": "user"}]
    error = check_error(raw.post("/v1/chat/completions", json={**CHAT, "messages": messages}), 400, "messages[1]")
    assert error["message"] == "messages[1]: the model's chat template does not show a message of role user here"
    assert error["code"] == "template_error"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"continue_final_message": True}, "false unless the last message's role is assistant"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "false where add_generation_prompt is true"),
        ({"continue_final_message": "yes"}, "true or false"),
    ],
)
def test_a_continuation_that_cannot_be(raw: httpx.Client, fields: dict[str, object], allowed: str) -> None:
    error = check_error(raw.post("/v1/chat/completions", json={**CHAT, **fields}), 400, "continue_final_message")
    assert f"must be {allowed}, got" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"not json", b'{"a": NaN}', b"\xff\xfe", b'"text"', b"[]", b"null"])
def test_bad_json(raw: httpx.Client, body: bytes) -> None:
    response = raw.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_unknown_model(raw: httpx.Client) -> None:
    error = check_error(raw.post("/v1/completions", json={**PLAIN, "model": "gpt-9"}), 404, "model")
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"]
    assert "test-model" in error["message"]


def test_unknown_path_and_wrong_method(raw: httpx.Client) -> None:
    assert raw.get("/v2/nothing").status_code == 404
    assert raw.get("/v2/nothing").json()["error"]["code"] == "not_found"
    wrong = raw.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"


# --- length -----------------------------------------------------------------------------------------------------


def test_prompt_and_max_tokens_beyond_the_context(raw: httpx.Client) -> None:
    for path, base in (("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)):
        error = check_error(raw.post(path, json={**base, "max_tokens": 511}), 400, "max_tokens")
        assert error["code"] == "context_length_exceeded"
        check_error(raw.post(path, json={**base, "max_tokens": 10**15}), 400, "max_tokens")
    assert raw.post("/v1/completions", json={**PLAIN, "max_tokens": 510}).status_code == 200


def test_prompt_that_fills_the_context(raw: httpx.Client) -> None:
    for prompt in ("x" * 512, [5] * 512, "x" * 1_000_000, [5] * 100_000):
        error = check_error(raw.post("/v1/completions", json={**PLAIN, "prompt": prompt}), 400, "prompt")
        assert error["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": "x" * 3_000_000}]
    check_error(raw.post("/v1/chat/completions", json={"model": "test-model", "messages": messages}), 400, "messages")
    assert raw.post("/v1/completions", json={**PLAIN, "prompt": "x" * 511, "max_tokens": 1}).status_code == 200


def test_a_far_too_long_prompt_costs_no_more_than_a_long_one(raw: httpx.Client) -> None:
    """Refusing seven megabytes must not mean tokenising seven megabytes."""

    def seconds(body: dict[str, object]) -> float:
        begun = time.perf_counter()
        assert raw.post("/v1/completions", json=body).status_code == 400
        return time.perf_counter() - begun

    long = {**PLAIN, "prompt": "word " * 1_400_000}
    same_body_no_prompt = {**PLAIN, "ignored": "word " * 1_400_000, "max_tokens": -1}
    refused, transported = (min(seconds(body) for _ in range(3)) for body in (long, same_body_no_prompt))
    assert refused < 3 * transported + 0.1


# --- size of the body -------------------------------------------------------------------------------------------

LARGE = 9 * 1024 * 1024


def test_a_declared_large_body(raw: httpx.Client) -> None:
    error = check_error(raw.post("/v1/completions", content=b"x" * LARGE), 413)
    assert "8388608" in error["message"]


def test_a_chunked_large_body(raw: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(LARGE // 65536 + 1):
            yield b"x" * 65536

    check_error(raw.post("/v1/completions", content=parts()), 413)


def test_a_forged_length_is_not_believed(server: Server) -> None:
    """A huge announced length gets its 413 at once, without the body."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(10**15))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_a_body_within_the_limit_is_read(raw: httpx.Client) -> None:
    body = json.dumps({**PLAIN, "padding": "x" * (8 * 1024 * 1024 - 200)})
    assert raw.post("/v1/completions", content=body).status_code == 200


# --- through the official client --------------------------------------------------------------------------------


def test_the_official_client_raises_its_own_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ai.completions.create(model="test-model", prompt="a", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.InternalServerError) as failed:
        ai.completions.create(model="test-model", prompt=[64, 900])
    assert failed.value.code == "engine_error"
    with pytest.raises(openai.InternalServerError):
        ai.completions.create(model="test-model", prompt=[900], stream=True)
    with pytest.raises(openai.BadRequestError):
        ai.completions.create(model="test-model", prompt=[902], stream=True)


def test_a_failure_in_mid_stream_is_an_error_event(ai: openai.OpenAI, raw: httpx.Client) -> None:
    stream = ai.completions.create(model="test-model", prompt=[64, 65, 900], stream=True)
    assert next(stream).choices[0].text
    assert next(stream).choices[0].text
    with pytest.raises(openai.APIError, match="non-finite"):
        next(stream)
    body = raw.post("/v1/completions", json={"model": "test-model", "prompt": [64, 900], "stream": True}).text
    assert "[DONE]" not in body
    assert json.loads(body.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "engine_error"


def test_one_failed_choice_fails_the_request_and_frees_the_others(server: Server, ai: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        ai.completions.create(model="test-model", prompt=[[64, 903], [64, 900]])
    health = server.wait_until(lambda health: health["engine"]["running"] == 0)
    assert health["requests"]["running"] == 0
    assert health["requests"]["held"] == 0
