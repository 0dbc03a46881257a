"""POST /v1/completions."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from kvarn.http.generation import Piece, Usage
from kvarn.http.logprobs import CompletionLogprobs
from kvarn.http.prompts import Prompt, completion_prompts
from kvarn.http.respond import Collected, respond
from kvarn.http.schemas import CompletionRequest, parse, unknown_fields
from kvarn.http.service import Service
from kvarn.text.tokenizer import Tokenizer
from kvarn.types import ModelInfo, TokenLogprob


class CompletionRendering:
    """Plain completions in the API's shape; with echo the prompt comes before the answer."""

    def __init__(
        self,
        asked: CompletionRequest,
        served: str,
        base: str,
        tokenizer: Tokenizer,
        info: ModelInfo,
        prompts: list[Prompt],
    ) -> None:
        self._asked = asked
        self._prompts = prompts
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(prompts) * asked.n)]
        self._head: dict[str, object] = {
            "id": f"cmpl-{base}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served,
            "system_fingerprint": f"kvarn-{info.fingerprint[:12]}",
        }

    def opening(self, choice: int) -> dict[str, object] | None:
        return self._chunk(choice, self._echo(choice), [], None) if self._asked.echo else None

    def chunk(self, piece: Piece) -> dict[str, object]:
        return self._chunk(piece.choice, piece.text, piece.logprobs, piece.finish)

    def usage_chunk(self, usage: Usage) -> dict[str, object]:
        return self._head | {"choices": [], "usage": usage.payload()}

    def whole(self, choices: list[Collected], usage: Usage) -> dict[str, object]:
        rendered = [
            self._choice(index, self._echo(index) + choice.text, choice.logprobs, choice.finish)
            for index, choice in enumerate(choices)
        ]
        return self._head | {"choices": rendered, "usage": usage.payload()}

    def _echo(self, choice: int) -> str:
        return self._prompts[choice // self._asked.n].echo

    def _chunk(self, choice: int, text: str, entries: list[TokenLogprob], finish: str | None) -> dict[str, object]:
        chunk = self._head | {"choices": [self._choice(choice, text, entries, finish)]}
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _choice(self, choice: int, text: str, entries: list[TokenLogprob], finish: str | None) -> dict[str, object]:
        wanted = self._asked.logprobs is not None
        logprobs = self._logprobs[choice].render(entries) if wanted else None
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def completions(request: Request) -> Response:
    """The route. Raises ApiError."""
    service: Service = request.app.state.service
    asked = parse(CompletionRequest, await service.read_json(request))
    service.names.check(asked.model)
    service.unknown_fields += len(unknown_fields(asked))

    def prompts(tokenizer: Tokenizer, info: ModelInfo) -> list[Prompt]:
        return completion_prompts(asked, tokenizer, info)

    def rendering(base: str, tokenizer: Tokenizer, info: ModelInfo, read: list[Prompt]) -> CompletionRendering:
        return CompletionRendering(asked, service.names.served, base, tokenizer, info, read)

    return respond(request, service, asked, len(asked.prompt) * asked.n, prompts, rendering)
