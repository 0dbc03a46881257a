"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import msgspec

from millpond.http.events import Delta
from millpond.http.openai.choices import ChoicesWriter, Collected, Json
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import GrowingChatLogprobs, NoLogprobs, chat_logprobs
from millpond.http.openai.schemas import ChatRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering


class ChatWriter(ChoicesWriter):
    """Chat answers in the API's shape."""

    def __init__(self, answering: Answering, *, include_usage: bool, logprobs: bool) -> None:
        self._tokenizer = answering.tokenizer
        self._logprobs = logprobs
        head: Json = {
            "id": f"chatcmpl-{answering.id}",
            "created": int(time.time()),
            "model": answering.model,
            "system_fingerprint": f"millpond-{answering.fingerprint[:12]}",
        }
        super().__init__(
            head | {"object": "chat.completion.chunk"}, head | {"object": "chat.completion"}, include_usage
        )

    def opening(self, choice: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, delta: Delta) -> Json:
        said = {"content": delta.text} if delta.text else {}
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if delta.logprobs else None
        return {"index": delta.choice, "delta": said, "logprobs": logprobs, "finish_reason": delta.finish}

    def collected(self) -> Collected:
        return Collected(GrowingChatLogprobs(self._tokenizer) if self._logprobs else NoLogprobs())

    def whole(self, index: int, choice: Collected) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": msgspec.Raw(choice.logprobs.json()),
            "finish_reason": choice.finish,
        }


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(ChatRequest, fields)
    writer = partial(ChatWriter, include_usage=asked.include_usage, logprobs=asked.logprobs)
    return Parsed(asked.generation(), writer, len(unknown_fields(ChatRequest, fields)))


CHAT = Rendering(read, error_response)
