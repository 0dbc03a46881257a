"""The official client against the whole system: real front end, real engine, the demo model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server

pytestmark = pytest.mark.models

FRANCE: list[dict[str, str]] = [{"role": "user", "content": "What is the capital of France?"}]
SEA = "The sea was calm and"


@pytest.fixture(scope="module")
def real(smollm2_folder: Path, launch: Launch) -> Iterator[Server]:
    arguments = ["serve", str(smollm2_folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server


@pytest.fixture
def ai(real: Server) -> Iterator[openai.OpenAI]:
    with real.client() as client:
        yield client


def complete(ai: openai.OpenAI, **more: object) -> str:
    options: dict[str, object] = {"model": "demo", "prompt": SEA, "max_tokens": 12, "temperature": 0, **more}
    answer = ai.completions.create(**options)  # type: ignore[call-overload]
    text: str = answer.choices[0].text
    return text


def test_chat_knows_paris_streamed_or_not(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="demo", messages=FRANCE, temperature=0, max_tokens=30)  # type: ignore[call-overload]
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens < 30
    chunks = list(
        ai.chat.completions.create(  # type: ignore[call-overload]
            model="demo",
            messages=FRANCE,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_token_ids_answer_like_their_text(ai: openai.OpenAI, smollm2_folder: Path) -> None:
    from millpond.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2_folder)
    expected = complete(ai)
    assert complete(ai, prompt=tokenizer.encode(SEA)) == expected
    both = ai.completions.create(model="demo", prompt=[SEA, "One two three"], temperature=0, max_tokens=12, logprobs=0)
    assert both.choices[0].text == expected
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(tokenizer.encode(SEA)) + len(tokenizer.encode("One two three"))
    assert both.usage.completion_tokens == 24


def test_a_stop_string_cuts_where_it_begins(ai: openai.OpenAI) -> None:
    text = complete(ai, max_tokens=24)
    stop = text[len(text) // 2 :][:5]
    answer = ai.completions.create(model="demo", prompt=SEA, temperature=0, max_tokens=24, stop=[stop, "never this"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens < 24


def test_seeds_repeat_and_choices_count_them_up(ai: openai.OpenAI) -> None:
    many = ai.completions.create(model="demo", prompt=SEA, max_tokens=12, temperature=0.8, seed=7, n=3)
    texts = [choice.text for choice in many.choices]
    assert len(set(texts)) > 1
    assert [complete(ai, temperature=0.8, seed=7 + number) for number in range(3)] == texts


def test_logprobs_of_a_greedy_answer(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(  # type: ignore[call-overload]
        model="demo", messages=FRANCE, temperature=0, max_tokens=8, logprobs=True, top_logprobs=4
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].token == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= 0


def test_a_bias_forbids_and_forces(ai: openai.OpenAI, smollm2_folder: Path) -> None:
    from millpond.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2_folder)
    [forced] = tokenizer.encode(" blue")
    assert complete(ai, max_tokens=3, logit_bias={str(forced): 100}) == " blue" * 3
    [usual] = tokenizer.encode(complete(ai, max_tokens=1))
    assert complete(ai, max_tokens=1, logit_bias={str(usual): -100}) != complete(ai, max_tokens=1)


def test_ignore_eos_goes_on_to_the_limit(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(  # type: ignore[call-overload]
        model="demo", messages=FRANCE, temperature=0, max_tokens=16, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_beyond_the_context_is_refused_before_any_work(real: Server, ai: openai.OpenAI) -> None:
    before = real.health()["requests"]["submitted"]
    for options in ({"prompt": SEA, "max_tokens": 8192}, {"prompt": "word " * 300_000, "max_tokens": 1}):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(ai, **options)
        assert refused.value.code == "context_length_exceeded"
    assert real.health()["requests"]["submitted"] == before


def test_disconnects_empty_the_engine(real: Server, ai: openai.OpenAI) -> None:
    before = real.health()["requests"]["cancelled"]
    endless = {"ignore_eos": True}  # an answer that is drawn may end at once
    stream = ai.completions.create(model="demo", prompt=SEA, max_tokens=4000, stream=True, extra_body=endless)
    next(stream)
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{real.url}/v1/completions", json={"prompt": SEA, "max_tokens": 4000, **endless}, timeout=0.5)
    health = real.wait_until(
        lambda health: health["engine"]["running"] == health["engine"]["waiting"] == health["requests"]["held"] == 0
    )
    assert health["requests"]["cancelled"] == before + 2


def test_killed_engine_during_eight_streams(real: Server) -> None:
    async def read(stream: openai.AsyncStream[openai.types.Completion], begun: asyncio.Event) -> None:
        async for _ in stream:
            begun.set()

    async def consume(client: openai.AsyncOpenAI, begun: asyncio.Event) -> None:
        stream = await client.completions.create(
            model="demo", prompt=SEA, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="died"):
            await read(stream, begun)

    async def test() -> None:
        async with real.async_client() as client:
            events = [asyncio.Event() for _ in range(8)]
            tasks = [asyncio.create_task(consume(client, begun)) for begun in events]
            for begun in events:
                await begun.wait()
            os.kill(real.engine_pid(), signal.SIGKILL)
            await asyncio.gather(*tasks)  # all have their error while the next engine has yet to load
            assert httpx.get(f"{real.url}/readyz").status_code == 503
            patient = client.with_options(max_retries=60)
            answer = await patient.completions.create(model="demo", prompt=SEA, max_tokens=4)
            assert answer.choices[0].text
            assert httpx.get(f"{real.url}/readyz").status_code == 200

    asyncio.run(test())


def test_stop_exits_with_0(real: Server) -> None:
    """Last in this module: the server is gone afterwards."""
    pid = real.engine_pid()
    assert real.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
