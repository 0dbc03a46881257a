"""Prompts that are far too long are refused after little of the work, wherever their length is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from model_infos import SMALL

from millpond.http.errors import ApiError
from millpond.http.generation_request import GenerationRequest
from millpond.http.openai.schemas import ChatRequest, CompletionRequest, parse
from millpond.http.prompts import read_prompts
from millpond.text.tokenizer import ChatPrompt, Message, Tokenizer

CONTEXT = 512


class CountingTokenizer(Tokenizer):
    """Counts what it reads, and may not be asked for whole conversations."""

    read: int

    def text_tokens(self, text: str, *, parse_special: bool = False) -> list[int]:
        self.read += len(text)
        return super().text_tokens(text, parse_special=parse_special)

    def chat_prompt(self, messages: Sequence[Message], *_: object, **__: object) -> ChatPrompt:
        raise AssertionError


@pytest.fixture
def tokenizer(byte_tokenizer: Path) -> CountingTokenizer:
    made = CountingTokenizer.load(byte_tokenizer)
    assert isinstance(made, CountingTokenizer)
    made.read = 0
    return made


INFO = msgspec.structs.replace(SMALL, context_length=CONTEXT)


def chat(*messages: dict[str, str], times: int = 1) -> GenerationRequest:
    fields = {"messages": [{"role": "user", **message} for message in messages] * times}
    return parse(ChatRequest, fields).generation()


@pytest.mark.parametrize(
    "asked",
    [
        chat({"content": "x" * 5_000_000}),
        chat({"content": ""}, times=5000),
        chat({"content": "a"}, times=5000),
        chat({"content": "hi", "name": "x" * 5_000_000}),
        chat({"content": "hi", "tool_call_id": "x" * 5_000_000}),
        chat({"content": "twelve chars"}, times=CONTEXT - 1),
        chat({"content": "x" * 40_000, "name": "b"}, {"content": ""}, times=100),
    ],
    ids=["one text", "empty ones", "of one letter", "a name", "an id", "short ones", "long and short ones"],
)
def test_a_chat_that_is_far_too_long(tokenizer: CountingTokenizer, asked: GenerationRequest) -> None:
    """(L6) Nothing is rendered, and no more is read than one piece beyond the context."""
    with pytest.raises(ApiError, match="at most 511 tokens") as raised:
        read_prompts(asked, tokenizer, INFO)
    assert raised.value.code == "context_length_exceeded"
    assert tokenizer.read < 40_000


def test_prompts_that_are_far_too_long(tokenizer: CountingTokenizer) -> None:
    """(L6) Token ids that are too many are seen before any text beside them is read."""
    given: list[object] = ["x" * 5_000_000, ["a" * 400, *([5] * CONTEXT for _ in range(3))], [[5] * 5000]]
    for prompt in given:
        tokenizer.read = 0
        with pytest.raises(ApiError, match="at most 511 tokens"):
            read_prompts(parse(CompletionRequest, {"prompt": prompt}).generation(), tokenizer, INFO)
        assert tokenizer.read < 40_000


def test_a_chat_that_fits_is_not_refused_early(byte_tokenizer: Path) -> None:
    """Whatever is counted, it is no more than what there is."""
    tokenizer = Tokenizer.load(byte_tokenizer)
    texts = ["", "a", "ab c\n", "x" * 400]
    for times in (1, 40):
        asked = chat(*({"content": text} for text in texts), times=times)
        length = len(tokenizer.chat_prompt([message.for_template() for message in asked.prompt.messages]).tokens)
        info = msgspec.structs.replace(INFO, context_length=length + 1)
        assert len(read_prompts(asked, tokenizer, info)[0].tokens) == length
