"""POST /v1/completions."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millpond.http.collect import Collected
from millpond.http.front_end import front_end_of
from millpond.http.generation import Piece, Usage
from millpond.http.openai.logprobs import CompletionLogprobs, GrowingCompletionLogprobs, NoLogprobs
from millpond.http.openai.schemas import CompletionRequest
from millpond.http.prompts import completion_prompts
from millpond.http.reading import read_request
from millpond.http.respond import respond
from millpond.text.tokenizer import Tokenizer
from millpond.types import ModelInfo, TokenLogprob


class CompletionRendering:
    """Plain completions in the API's shape; with echo the prompt comes before the answer."""

    def __init__(
        self,
        asked: CompletionRequest,
        served: str,
        base: str,
        tokenizer: Tokenizer,
        info: ModelInfo,
        echoes: list[str],
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(echoes) * asked.n)]
        self._head: dict[str, object] = {
            "id": f"cmpl-{base}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served,
            "system_fingerprint": f"millpond-{info.fingerprint[:12]}",
        }

    def opening(self, choice: int) -> dict[str, object] | None:
        return self._chunk(choice, self._echo(choice), [], None) if self._asked.echo else None

    def chunk(self, piece: Piece) -> dict[str, object]:
        return self._chunk(piece.choice, piece.text, piece.logprobs, piece.finish)

    def usage_chunk(self, usage: Usage) -> dict[str, object]:
        return self._head | {"choices": [], "usage": usage.payload()}

    def collected(self) -> Collected:
        wanted = self._asked.logprobs is not None
        return Collected(GrowingCompletionLogprobs(self._tokenizer) if wanted else NoLogprobs())

    def whole_head(self) -> dict[str, object]:
        return self._head

    def whole_choice(self, index: int, choice: Collected) -> dict[str, object]:
        logprobs = msgspec.Raw(choice.logprobs.json())
        text = self._echo(index) + choice.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._asked.n]

    def _chunk(self, choice: int, text: str, entries: list[TokenLogprob], finish: str | None) -> dict[str, object]:
        chunk = self._head | {"choices": [self._choice(choice, text, entries, finish)]}
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _choice(self, choice: int, text: str, entries: list[TokenLogprob], finish: str | None) -> dict[str, object]:
        wanted = self._asked.logprobs is not None
        logprobs = self._logprobs[choice].render(entries) if wanted else None
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def completions(request: Request) -> Response:
    """The route. Raises ApiError."""
    front = front_end_of(request)
    asked, model = await read_request(request, front, lambda _fields: CompletionRequest)

    def rendering(
        asked: CompletionRequest, base: str, tokenizer: Tokenizer, info: ModelInfo, echoes: list[str]
    ) -> CompletionRendering:
        return CompletionRendering(asked, model.names.served, base, tokenizer, info, echoes)

    return respond(request, front, model, asked, len(asked.prompt) * asked.n, completion_prompts, rendering)
