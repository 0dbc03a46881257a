"""POST /v1/chat/completions."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from kvarn.http.generation import Piece, Usage
from kvarn.http.logprobs import chat_logprobs
from kvarn.http.prompts import Prompt, chat_prompt
from kvarn.http.respond import Collected, respond
from kvarn.http.schemas import ChatRequest, parse, unknown_fields
from kvarn.http.service import Service
from kvarn.text.tokenizer import Tokenizer
from kvarn.types import ModelInfo


class ChatRendering:
    """Chat answers in the API's shape."""

    def __init__(self, asked: ChatRequest, served: str, base: str, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._head: dict[str, object] = {
            "id": f"chatcmpl-{base}",
            "created": int(time.time()),
            "model": served,
            "system_fingerprint": f"kvarn-{info.fingerprint[:12]}",
        }

    def opening(self, choice: int) -> dict[str, object]:
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> dict[str, object]:
        delta: dict[str, object] = {"content": piece.text} if piece.text else {}
        logprobs = chat_logprobs(self._tokenizer, piece.logprobs) if piece.logprobs else None
        return self._chunk(piece.choice, delta, logprobs, piece.finish)

    def usage_chunk(self, usage: Usage) -> dict[str, object]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.payload()}

    def whole(self, choices: list[Collected], usage: Usage) -> dict[str, object]:
        rendered = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self._asked.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return self._head | {"object": "chat.completion", "choices": rendered, "usage": usage.payload()}

    def _chunk(
        self, choice: int, delta: dict[str, object], logprobs: dict[str, object] | None, finish: str | None
    ) -> dict[str, object]:
        body = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [body]}
        return chunk | {"usage": None} if self._asked.include_usage else chunk


async def chat(request: Request) -> Response:
    """The route. Raises ApiError."""
    service: Service = request.app.state.service
    asked = parse(ChatRequest, await service.read_json(request))
    service.names.check(asked.model)
    service.unknown_fields += len(unknown_fields(asked))

    def prompts(tokenizer: Tokenizer, info: ModelInfo) -> list[Prompt]:
        return chat_prompt(asked, tokenizer, info)

    def rendering(base: str, tokenizer: Tokenizer, info: ModelInfo, _prompts: list[Prompt]) -> ChatRendering:
        return ChatRendering(asked, service.names.served, base, tokenizer, info)

    return respond(request, service, asked, asked.n, prompts, rendering)
