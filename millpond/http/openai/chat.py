"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from millpond.http.events import Delta
from millpond.http.openai.choices import Choice, ChoicesWriter, Json, described
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import ChatLogprobs, Render
from millpond.http.openai.schemas import ChatRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering


class ChatWriter(ChoicesWriter):
    """Chat answers in the API's shape."""

    def __init__(self, answering: Answering, *, include_usage: bool, logprobs: bool) -> None:
        self._answering = answering
        self._logprobs = logprobs
        head: Json = {"id": f"chatcmpl-{answering.id}", **described(answering)}
        chunk, whole = head | {"object": "chat.completion.chunk"}, head | {"object": "chat.completion"}
        super().__init__(chunk, whole, include_usage=include_usage)

    def choice(self) -> Choice:
        return Choice(ChatLogprobs(self._answering.tokenizer).render if self._logprobs else None)

    def opening(self, choice: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, delta: Delta, render: Render | None) -> Json:
        said = {"content": delta.text} if delta.text else {}
        logprobs = render(delta.logprobs) if render is not None and delta.logprobs else None
        return {"index": delta.choice, "delta": said, "logprobs": logprobs, "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish,
        }


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(ChatRequest, fields)
    writer = partial(ChatWriter, include_usage=asked.include_usage, logprobs=asked.logprobs)
    return Parsed(asked.generation(), writer, len(unknown_fields(ChatRequest, fields)))


CHAT = Rendering(read, error_response)
