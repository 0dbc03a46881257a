"""Request bodies without a server: what is accepted, what it becomes, and that nothing else ever escapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.client import EngineError
from millpond.client.public import public
from millpond.http.errors import ApiError, from_engine, shown
from millpond.http.generation_request import GenerationRequest
from millpond.http.openai.errors import error_body
from millpond.http.openai.schemas import (
    NOT_IMPLEMENTED,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
    parse,
    unknown_fields,
)
from millpond.http.speculation_fields import speculation
from millpond.types import ErrorKind, SpecMode, Speculation

CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, object] = {"prompt": "hi"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def generation(kind: type[ChatRequest | CompletionRequest], body: dict[str, object]) -> GenerationRequest:
    return parse(kind, body).generation()


def test_defaults_are_those_of_the_api() -> None:
    params = generation(ChatRequest, CHAT).params(5, 0, [2, 3])
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.logprobs, params.stop_token_ids) == (5, None, [2, 3])


@pytest.mark.parametrize(
    ("given_seed", "choice", "seed"),
    [(7, 0, 7), (7, 2, 9), (0, 0, 0), (-1, 0, 2**64 - 1), (-1, 1, 0), (2**64, 0, 0), (2**70 + 5, 1, 6)],
)
def test_seeds_are_unsigned_and_count_up(given_seed: int, choice: int, seed: int) -> None:
    assert generation(CompletionRequest, {**PLAIN, "seed": given_seed}).params(1, choice, []).seed == seed


def test_without_a_seed_each_choice_draws_its_own() -> None:
    asked = generation(CompletionRequest, PLAIN)
    seeds = {asked.params(1, choice, []).seed for choice in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_fields_reach_the_sampler() -> None:
    body = {**PLAIN, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2}
    body |= {"presence_penalty": -1, "frequency_penalty": 1, "logit_bias": {"3": -100, "4": 2.5}}
    body |= {"logprobs": 0, "ignore_eos": True}
    params = generation(CompletionRequest, body).params(9, 0, [2])
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, -1.0, 1.0)
    assert params.logit_bias == {3: -100.0, 4: 2.5}
    assert params.logprobs == 0
    assert params.stop_token_ids == []
    params = generation(CompletionRequest, {**PLAIN, "top_k": 40, "seed": 7}).params(9, 1, [2])
    assert (params.top_k, params.seed, params.max_tokens, params.stop_token_ids) == (40, 8, 9, [2])


@pytest.mark.parametrize(
    ("fields", "wanted"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 4}, 4)]
)
def test_chat_logprobs(fields: dict[str, object], wanted: int | None) -> None:
    assert generation(ChatRequest, {**CHAT, **fields}).sampling.logprobs == wanted


def test_the_newer_name_of_max_tokens() -> None:
    newer = generation(ChatRequest, {**CHAT, "max_completion_tokens": 5})
    assert (newer.max_tokens, newer.max_tokens_field) == (5, "max_completion_tokens")
    assert generation(ChatRequest, {**CHAT, "max_tokens": 5}).max_tokens == 5
    chat, plain = generation(ChatRequest, CHAT), generation(CompletionRequest, PLAIN)
    assert (chat.max_tokens, chat.default_tokens, plain.max_tokens, plain.default_tokens) == (None, None, None, 16)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_guessing_is_the_servers_unless_said_otherwise(kind: type[OpenAIRequest]) -> None:
    """What is absent or null is the default's; a mode that is not offered means off."""
    default = Speculation(mode=SpecMode.NGRAM, tokens=5, adaptive=False)

    def wanted(*offered: str, **fields: object) -> Speculation | None:
        return speculation(parse(kind, {**CHAT, **PLAIN, **fields}).speculative, default, offered)

    nothing: tuple[dict[str, object], ...] = ({}, {"speculative": None}, {"speculative": {}})
    for fields in (*nothing, {"speculative": {"mode": None, "tokens": None, "adaptive": None}}):
        assert wanted("ngram", **fields) is None
    whole = {"mode": "draft", "tokens": 31, "adaptive": True}
    assert wanted("ngram", "draft", speculative=whole) == Speculation(mode=SpecMode.DRAFT, tokens=31, adaptive=True)
    assert wanted("ngram", speculative={"tokens": 1}) == Speculation(mode=SpecMode.NGRAM, tokens=1, adaptive=False)
    assert wanted("ngram", speculative={"mode": "off"}) == Speculation(mode=SpecMode.OFF, tokens=5, adaptive=False)
    assert wanted(speculative={"mode": "ngram"}) == Speculation(mode=SpecMode.OFF, tokens=5, adaptive=False)
    assert wanted(speculative={"adaptive": True}) == Speculation(mode=SpecMode.OFF, tokens=5, adaptive=True)
    default = Speculation(mode=SpecMode.AUTO, tokens=5)
    for offered, mode in (((), SpecMode.OFF), (("ngram",), SpecMode.NGRAM), (("ngram", "mtp"), SpecMode.MTP)):
        assert wanted(*offered, speculative={"tokens": 2}) == Speculation(mode=mode, tokens=2)


def test_predictions() -> None:
    for content, text in (("", ""), ("a", "a"), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab")):
        for kind, base in ((ChatRequest, CHAT), (CompletionRequest, PLAIN)):
            body = {**base, "prediction": {"type": "content", "content": content}}
            assert parse(kind, body).prediction == text
            assert parse(kind, {**base, "prediction": None}).prediction is None


def test_prompt_forms() -> None:
    for prompt, read in (
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [1]], ("a", (1,))),
    ):
        assert parse(CompletionRequest, {"prompt": prompt}).prompt == read


def test_null_counts_as_absent() -> None:
    nulls = dict.fromkeys((*ChatRequest.model_fields, *NOT_IMPLEMENTED))
    assert generation(ChatRequest, {**nulls, **CHAT}).max_tokens is None


def test_unknown_fields_are_told_apart_from_neutral_ones() -> None:
    fields: dict[str, object] = {**CHAT, "tools": [], "metadata": {}, "zzz": 1, "user": None, "nothing": None}
    assert unknown_fields(ChatRequest, fields) == ["metadata", "zzz"]
    kept = parse(ChatRequest, fields)
    assert not hasattr(kept, "zzz")
    assert kept.model_extra is None


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, *NOT_IMPLEMENTED, "x"]),
        json_values,
        max_size=4,
    )
)
def test_any_body_is_accepted_or_refused_with_a_400(fields: dict[str, object]) -> None:
    for kind, base in ((ChatRequest, CHAT), (CompletionRequest, PLAIN), (ChatRequest, {}), (CompletionRequest, {})):
        error = refusal(kind, {**base, **fields})
        if error is not None:
            assert error.status == 400
            assert error.param
            assert error.param.split(".")[0].split("[")[0] in error.message
            assert error_body(error)


def refusal(kind: type[OpenAIRequest], body: dict[str, object]) -> ApiError | None:
    try:
        parse(kind, body)
    except ApiError as error:
        return error
    return None


@given(json_values)
def test_any_value_can_be_shown(value: object) -> None:
    assert len(shown(value)) <= 80


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ErrorKind.ENGINE, 500),
        (ErrorKind.DIED, 500),
        (ErrorKind.UNAVAILABLE, 503),
        (ErrorKind.INVALID, 400),
    ],
)
def test_engine_errors_have_their_status(kind: ErrorKind, status: int) -> None:
    assert from_engine(EngineError(kind, "x")).status == status


def test_paths_and_traces_stay_inside() -> None:
    message = "cannot read /home/user/models/x.safetensors\nTraceback (most recent call last):"
    assert public(message) == "cannot read …"
    assert public("") == "unknown error"
