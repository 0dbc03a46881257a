"""POST /v1/chat/completions."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millpond.http.collect import Collected
from millpond.http.front_end import front_end_of
from millpond.http.generation import Piece, Usage
from millpond.http.openai.logprobs import GrowingChatLogprobs, NoLogprobs, chat_logprobs
from millpond.http.openai.schemas import ChatRequest
from millpond.http.prompts import chat_prompt
from millpond.http.reading import read_request
from millpond.http.respond import respond
from millpond.text.tokenizer import Tokenizer
from millpond.types import ModelInfo


class ChatRendering:
    """Chat answers in the API's shape."""

    def __init__(self, asked: ChatRequest, served: str, base: str, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._head: dict[str, object] = {
            "id": f"chatcmpl-{base}",
            "created": int(time.time()),
            "model": served,
            "system_fingerprint": f"millpond-{info.fingerprint[:12]}",
        }

    def opening(self, choice: int) -> dict[str, object]:
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> dict[str, object]:
        delta: dict[str, object] = {"content": piece.text} if piece.text else {}
        logprobs = chat_logprobs(self._tokenizer, piece.logprobs) if piece.logprobs else None
        return self._chunk(piece.choice, delta, logprobs, piece.finish)

    def usage_chunk(self, usage: Usage) -> dict[str, object]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.payload()}

    def collected(self) -> Collected:
        return Collected(GrowingChatLogprobs(self._tokenizer) if self._asked.logprobs else NoLogprobs())

    def whole_head(self) -> dict[str, object]:
        return self._head | {"object": "chat.completion"}

    def whole_choice(self, index: int, choice: Collected) -> dict[str, object]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": msgspec.Raw(choice.logprobs.json()),
            "finish_reason": choice.finish,
        }

    def _chunk(
        self, choice: int, delta: dict[str, object], logprobs: dict[str, object] | None, finish: str | None
    ) -> dict[str, object]:
        body = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [body]}
        return chunk | {"usage": None} if self._asked.include_usage else chunk


async def chat(request: Request) -> Response:
    """The route. Raises ApiError."""
    front = front_end_of(request)
    asked, model = await read_request(request, front, lambda _fields: ChatRequest)

    def rendering(
        asked: ChatRequest, base: str, tokenizer: Tokenizer, info: ModelInfo, _echoes: list[str]
    ) -> ChatRendering:
        return ChatRendering(asked, model.names.served, base, tokenizer, info)

    return respond(request, front, model, asked, asked.n, chat_prompt, rendering)
