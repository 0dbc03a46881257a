"""(M8) What the model thinks of a prompt, in the two forms that clients read: echoed log-probabilities and vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx
    import openai

ASKED = {"model": "test-model", "prompt": "abcdefgé", "echo": True, "logprobs": 1, "temperature": 0}
TEXTS = ["a", "b", "c", "d", "e", "f", "g"]


@pytest.mark.parametrize("most", [1, 3])
def test_as_harnesses_ask(ai: openai.OpenAI, most: int) -> None:
    """The prompt's numbers, then the answer's, in lists of one length; of the first token nothing is known."""
    answer = ai.completions.create(**ASKED, max_tokens=most, seed=1)  # type: ignore[call-overload]
    (choice,) = answer.choices
    found = choice.logprobs
    assert choice.text == "abcdefgé" + "abc"[:most]
    assert found.tokens[:7] == TEXTS
    assert found.tokens[9:] == ["a", "b", "c"][:most]
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.token_logprobs == [None, *[-0.5] * (8 + most)]
    assert found.top_logprobs[0] is None
    assert found.top_logprobs[1] == {"b": -0.5}
    assert found.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 8, *range(8, 8 + most)]
    greedy = [
        one == max(top.values()) for one, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True)
    ]
    assert all(greedy)


def test_several_prompts_and_answers(ai: openai.OpenAI) -> None:
    asked = {**ASKED, "prompt": ["ab", "c"], "logprobs": 0}
    answer = ai.completions.create(**asked, max_tokens=1, n=2)  # type: ignore[call-overload]
    assert [choice.text for choice in answer.choices] == ["aba", "aba", "cc", "cc"]
    assert [choice.logprobs.token_logprobs for choice in answer.choices] == [[None, -0.5, -0.5]] * 2 + [
        [None, -0.5]
    ] * 2
    assert all(choice.logprobs.top_logprobs is None for choice in answer.choices)


def test_no_token_of_an_answer(ai: openai.OpenAI, raw: httpx.Client) -> None:
    """max_tokens 0, as old harnesses have it: the prompt alone."""
    answer = ai.completions.create(**ASKED, max_tokens=0)  # type: ignore[call-overload]
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("abcdefgé", "length")
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * 8]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 0)
    bare = ai.completions.create(model="test-model", prompt="abc", max_tokens=0, n=2)
    assert [(choice.text, choice.finish_reason) for choice in bare.choices] == [("", "length")] * 2
    streamed = raw.post("/v1/completions", json={**ASKED, "max_tokens": 0, "stream": True}).text
    assert streamed.count('"finish_reason":"length"') == 1
    refused = raw.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 0})
    assert refused.json()["error"]["message"].startswith("max_tokens: must be an integer of at least 1")


def test_streamed(ai: openai.OpenAI) -> None:
    """The echo comes first, with all that is known of it."""
    whole = ai.completions.create(**ASKED, max_tokens=3)  # type: ignore[call-overload]
    chunks = [chunk.choices[0] for chunk in ai.completions.create(**ASKED, max_tokens=3, stream=True)]  # type: ignore[call-overload]
    assert chunks[0].text == "abcdefgé"
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        told = [value for chunk in chunks if chunk.logprobs for value in getattr(chunk.logprobs, name)]
        assert told == getattr(whole.choices[0].logprobs, name)


def test_as_vllm_has_them(ai: openai.OpenAI) -> None:
    extra = {"prompt_logprobs": 2}
    plain = ai.completions.create(model="test-model", prompt=["abc", "d"], max_tokens=1, extra_body=extra)
    first, second = (choice.prompt_logprobs for choice in plain.choices)  # type: ignore[attr-defined]
    b = ord("b") - ord("!")
    assert first[0] is None
    assert first[1][str(b)] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    assert first[1]["0"] == {"logprob": -1.5, "rank": 2, "decoded_token": "!"}
    assert [len(entry) for entry in first[1:]] == [2, 2]
    assert second == [None]
    assert plain.choices[0].logprobs is None
    chat = ai.chat.completions.create(
        model="test-model",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=1,
        n=2,
        extra_body={"prompt_logprobs": 0},
    )
    told = chat.prompt_logprobs  # type: ignore[attr-defined]
    assert len(told) == chat.usage.prompt_tokens  # type: ignore[union-attr]
    assert all(len(entry) == 1 for entry in told[1:])


@pytest.mark.parametrize(
    ("value", "stream", "message"),
    [
        (21, False, "prompt_logprobs: must be an integer from 0 to 20, got 21"),
        (-1, False, "prompt_logprobs: must be an integer from 0 to 20, got -1"),
        (1, True, "prompt_logprobs: must be absent where stream is true, got 1"),
    ],
)
def test_what_cannot_be(raw: httpx.Client, value: int, stream: bool, message: str) -> None:
    answer = raw.post("/v1/completions", json={"prompt": "a", "prompt_logprobs": value, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
