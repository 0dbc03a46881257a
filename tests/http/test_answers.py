"""Answers through the official client: chat and completions, streamed and not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from conftest import Server

HELLO: list[dict[str, str]] = [{"role": "user", "content": "hi"}]
PROMPT = "user:hi;"


def repeated(text: str, length: int) -> str:
    return (text * (length // len(text) + 1))[:length]


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=12)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == repeated(PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 12, 20)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_chat_stream_begins_with_the_role_and_ends_with_usage(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(
        model="test-model", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(not chunk.choices[0].delta.role for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == repeated(PROMPT, 9)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_chunk_unless_asked(ai: openai.OpenAI) -> None:
    chunks = list(ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_async_client(server: Server) -> None:
    async def test() -> None:
        async with server.async_client() as client:
            whole = await client.chat.completions.create(model="test-model", messages=HELLO, max_tokens=5)
            assert whole.choices[0].message.content == "user:"
            stream = await client.completions.create(model="test-model", prompt="abc", max_tokens=5, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks) == "abcab"
            assert {chunk.object for chunk in chunks} == {"text_completion"}

    asyncio.run(test())


def test_chat_without_max_tokens_may_use_the_rest_of_the_context(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="test-model", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 512 - 8
    assert ai.completions.create(model="test-model", prompt="ab").usage.completion_tokens == 16  # type: ignore[union-attr]


def test_content_parts_and_every_role(ai: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "developer", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f"},
    ]
    expected = "system:ab;system:c;user:d;assistant:e;user:f;"
    answer = ai.chat.completions.create(model="test-model", messages=messages, max_tokens=len(expected))  # type: ignore[arg-type]
    assert answer.choices[0].message.content == expected


def said(raw: httpx.Client, messages: list[dict[str, object]], **body: object) -> str:
    """The prompt of a chat, which is what the scripted engine answers."""
    answer = raw.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 60, **body})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text[: answer.json()["usage"]["prompt_tokens"]]


def test_an_assistants_message_may_be_without_a_text(raw: httpx.Client) -> None:
    user = {"role": "user", "content": "a"}
    for empty in ({"content": None}, {}, {"content": None, "tool_calls": None}, {"content": "", "tool_calls": []}):
        assert said(raw, [user, {"role": "assistant", **empty}, user]) == "user:a;assistant:;user:a;"


def test_the_last_message_is_continued(raw: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is "}]
    for more in ({}, {"add_generation_prompt": False}, {"add_generation_prompt": None}):
        assert said(raw, messages, continue_final_message=True, **more) == "user:a;assistant:The answer is "
    for prompt, end in ((False, ""), (True, "?"), (None, "?")):
        text = said(raw, messages, add_generation_prompt=prompt, continue_final_message=False)
        assert text == f"user:a;assistant:The answer is ;{end}"


def test_completion_prompts_in_every_form(ai: openai.OpenAI) -> None:
    ids = [64, 65, 66]
    one = ai.completions.create(model="test-model", prompt=ids, max_tokens=6)
    assert one.choices[0].text
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    many = ai.completions.create(model="test-model", prompt=[ids, ids[:2]], max_tokens=3)
    assert many.choices[0].text + many.choices[0].text == one.choices[0].text
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (5, 6)
    texts = ai.completions.create(model="test-model", prompt=["ab", "xyz"], n=2, max_tokens=4)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in texts.choices] == ["abab", "abab", "xyzx", "xyzx"]
    assert texts.usage is not None
    assert (texts.usage.prompt_tokens, texts.usage.completion_tokens) == (5, 16)


def test_echo(ai: openai.OpenAI) -> None:
    whole = ai.completions.create(model="test-model", prompt=["abc", "é"], max_tokens=2, echo=True)
    assert [choice.text for choice in whole.choices] == ["abcab", "éé"]
    stream = ai.completions.create(model="test-model", prompt="abc", max_tokens=2, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abcab"


def test_n_choices_stream_side_by_side(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=10, n=3, stream=True)
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason == "length"
    assert (texts, roles, ends) == ([repeated(PROMPT, 10)] * 3, [1] * 3, [1] * 3)


@pytest.mark.parametrize(
    ("stop", "text", "tokens"), [(":", "user", 4), (["r:", "hi", "e"], "us", 2), ("r:h", "use", 3), (["u"], "", 0)]
)
def test_stop_strings_cut_text_and_usage_streamed_or_not(
    ai: openai.OpenAI, stop: str | list[str], text: str, tokens: int
) -> None:
    whole = ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=50, stop=stop)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == tokens
    chunks = list(
        ai.chat.completions.create(
            model="test-model",
            messages=HELLO,
            max_tokens=50,
            stop=stop,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens


def test_a_stop_string_cancels_the_work(server: Server, ai: openai.OpenAI) -> None:
    before = server.health()["requests"]["finished"]
    ai.chat.completions.create(model="test-model", messages=HELLO, stop=":")
    after = server.wait_until(lambda health: health["engine"]["running"] == 0)
    assert after["requests"]["finished"] == before + 1


def test_end_of_sequence_is_a_stop(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model="test-model", prompt=[64, 65, 901], max_tokens=50)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_characters_of_several_bytes_are_never_split(ai: openai.OpenAI) -> None:
    chunks = list(ai.completions.create(model="test-model", prompt="é→😀", max_tokens=18, stream=True))
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == "é→😀" * 2
    assert all("\ufffd" not in text for text in texts)
    cut = ai.completions.create(model="test-model", prompt="😀", max_tokens=2)
    assert cut.choices[0].text == "\ufffd"


def test_chat_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="test-model", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=5, stop="r:"
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["u", "s", "e"]
    assert logprobs.content[0].bytes == [117]
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.5, -2.5, -3.5, -9999.0]
    plain = ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=2, logprobs=True)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.content is not None
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[], []]


def test_streamed_logprobs_match_the_text(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(
        model="test-model", messages=HELLO, max_tokens=20, logprobs=True, stop="hi;u", stream=True
    )
    text, tokens = "", []
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs is not None:
            tokens += [entry.token for entry in chunk.choices[0].logprobs.content or []]
    assert (text, "".join(tokens)) == ("user:", "user:")


def test_completion_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model="test-model", prompt="aé", max_tokens=6, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 2, 3, 4]
    assert logprobs.token_logprobs == [-0.5] * 6
    assert logprobs.top_logprobs is not None
    assert len(logprobs.top_logprobs[0]) == 2
    stream = ai.completions.create(model="test-model", prompt="aé", max_tokens=6, logprobs=2, stream=True)
    offsets: list[int] = []
    for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == logprobs.text_offset


def test_models(ai: openai.OpenAI, raw: httpx.Client) -> None:
    models = ai.models.list().data
    assert [model.id for model in models] == ["test-model"]
    assert ai.models.retrieve("test-model").owned_by == "millpond"
    assert ai.models.retrieve("org/test-model").id == "test-model"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("other")
    body = raw.get("/v1/models").json()["data"][0]
    assert body["millpond"]["lane"] == "slots"
    assert body["max_model_len"] == 512


@pytest.mark.parametrize("name", ["test-model", "org/test-model", "byte-model"])
def test_every_name_of_the_model_is_accepted(ai: openai.OpenAI, name: str) -> None:
    assert ai.completions.create(model=name, prompt="a", max_tokens=1).model == "test-model"


def test_every_honoured_parameter_is_accepted(raw: httpx.Client) -> None:
    body = {
        "model": "test-model",
        "messages": HELLO,
        "max_completion_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.05,
        "stop": None,
        "seed": -(2**70),
        "n": 2,
        "logit_bias": {"5": -100, "6": 1.5},
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "user": "somebody",
        "ignore_eos": True,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "metadata": {"a": "b"},
    }
    response = raw.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


def test_stream_headers_and_framing(raw: httpx.Client) -> None:
    body = {"model": "test-model", "prompt": "a", "max_tokens": 2, "stream": True}
    response = raw.post("/v1/completions", json=body, headers={"x-request-id": "my-id"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "my-id"
    assert response.text.endswith("data: [DONE]\n\n")


def test_request_ids_are_made_when_absent_or_unusable(raw: httpx.Client) -> None:
    first = raw.get("/livez").headers["x-request-id"]
    second = raw.get("/livez", headers={"x-request-id": "x" * 500}).headers["x-request-id"]
    third = raw.get("/livez", headers=[(b"x-request-id", b"caf\xe9")]).headers["x-request-id"]
    assert len({first, second, third}) == 3
    assert all(len(made) == 32 for made in (first, second, third))


def test_unknown_fields_are_ignored_and_counted(server: Server, raw: httpx.Client) -> None:
    before = server.health()["requests"]["unknown_fields"]
    body = {"model": "test-model", "prompt": "a", "max_tokens": 1, "flavour": "mint", "metadata": {}}
    assert raw.post("/v1/completions", json=body).status_code == 200
    assert server.health()["requests"]["unknown_fields"] == before + 2


def test_probes(raw: httpx.Client) -> None:
    assert raw.get("/livez").json() == {"status": "ok"}
    assert raw.get("/readyz").status_code == 200
    health = raw.get("/health").json()
    assert health["status"] == "ok"
    counts = health["requests"]
    ended = counts["finished"] + counts["failed"] + counts["cancelled"] + counts["running"]
    assert counts["submitted"] == ended
