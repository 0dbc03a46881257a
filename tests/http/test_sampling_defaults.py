"""What a request that does not say is sampled with: the model's generation_config.json, or what OpenAI's API has."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from millpond.http.openai.schemas import ChatRequest, CompletionRequest, parse
from millpond.http.sampling import read_sampling_defaults

if TYPE_CHECKING:
    from conftest import Server, StartServer

API = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def recommended(folder: Path, **values: object) -> dict[str, float]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return dict(read_sampling_defaults(folder))


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_length": 20, "temperature": None}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 1, "top_p": 0.5, "min_p": 0.2}, {"temperature": 0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0, "repetition_penalty": 1.1}),
    ],
)
def test_what_is_read(tmp_path: Path, values: dict[str, object], read: dict[str, float]) -> None:
    assert recommended(tmp_path, **values) == read


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -1, "a number from 0 to 2"),
        ("temperature", "0.6", "a number from 0 to 2"),
        ("temperature", True, "a number from 0 to 2"),
        ("temperature", float("nan"), "a number from 0 to 2"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_p", [0.9], "a number above 0, at most 1"),
        ("top_k", 2.5, "an integer"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("do_sample", "no", "true or false"),
    ],
)
def test_a_bad_value_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: object, allowed: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert recommended(tmp_path, **{"min_p": 0.5, name: value}) == ({} if name == "min_p" else {"min_p": 0.5})
    [line] = caplog.messages
    assert line.startswith(f"generation_config.json: {name} must be {allowed}")
    assert line.endswith("it is not used")


@pytest.mark.parametrize("content", ["{", "[]", "\x00", "[" * 100_000])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults(tmp_path) == {}
    assert caplog.messages[0].startswith("generation_config.json is not used: ")
    (tmp_path / "generation_config.json").unlink()
    assert read_sampling_defaults(tmp_path) == {}
    assert len(caplog.messages) == 1


def test_what_the_client_says_counts_field_by_field() -> None:
    body: dict[str, object] = {"prompt": "hi", "temperature": 1.0, "top_k": -1, "min_p": None}
    defaults = {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    params = parse(CompletionRequest, body).generation().params(1, 0, [], defaults)
    assert (params.temperature, params.top_k, params.min_p) == (1.0, 0, 0.1)
    assert (params.repetition_penalty, params.top_p) == (1.1, 1.0)


def sampled(url: str, **body: object) -> dict[str, Any]:
    """What the engine is told of sampling with a request."""
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": [910], **body}, timeout=20, verify=False)
    found: dict[str, Any] = json.loads(answer.json()["error"]["message"])
    return found


def shown(url: str) -> dict[str, float]:
    [model] = httpx.get(f"{url}/v1/models", timeout=20, verify=False).json()["data"]
    found: dict[str, float] = model["millpond"]["sampling_defaults"]
    return found


def test_the_models_file_counts_by_default(server: Server) -> None:
    assert shown(server.url) == {"temperature": 0.6, "top_k": 20}
    assert sampled(server.url) == {**API, "temperature": 0.6, "top_k": 20}
    assert sampled(server.url, temperature=0, top_p=0.5) == {**API, "temperature": 0, "top_k": 20, "top_p": 0.5}
    assert "top_p must be a number above 0, at most 1, got 5" in server.wait_for_line("generation_config.json:")


def test_the_setting_says_whose_defaults_count(start_server: StartServer) -> None:
    with start_server("plain", "sampling_defaults", "api") as server:
        assert shown(server.url) == {}
        assert sampled(server.url) == API
        assert not [line for line in server.lines if "generation_config" in line]


def test_chats_have_them_too() -> None:
    chat = parse(ChatRequest, {"messages": [{"role": "user", "content": "hi"}]})
    assert chat.generation().params(1, 0, [], {"temperature": 0.0}).temperature == 0
