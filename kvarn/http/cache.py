"""POST /v1/cache/explain: what the prefix cache would do for a request, without running it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvarn.client import EngineError, EngineUnavailable
from kvarn.http.body import read_json
from kvarn.http.errors import from_engine, unavailable
from kvarn.http.prompts import chat_prompt, check_limits, completion_prompts
from kvarn.http.schemas import ChatRequest, CompletionRequest, parse
from kvarn.http.service import Service
from kvarn.types import PrefixReport


async def explain(request: Request) -> Response:
    """Takes the body of a chat or a plain completion and answers with one entry per prompt. Raises ApiError."""
    service: Service = request.app.state.service
    body = await read_json(request)
    asked = parse(ChatRequest, body) if body.get("messages") is not None else parse(CompletionRequest, body)
    service.names.check(asked.model)
    tokenizer, info = service.ready()
    check_limits(asked, info)
    prompts = await service.in_text_thread(
        lambda: (
            chat_prompt(asked, tokenizer, info)
            if isinstance(asked, ChatRequest)
            else completion_prompts(asked, tokenizer, info)
        )
    )
    try:
        reports = [await service.client.explain(prompt.tokens, asked.cache_salt) for prompt in prompts]
    except EngineUnavailable as error:
        raise unavailable(str(error)) from error
    except EngineError as error:
        raise from_engine(error) from error
    entries = [_entry(len(prompt.tokens), report) for prompt, report in zip(prompts, reports, strict=True)]
    return JSONResponse({"object": "list", "data": entries})


def _entry(prompt_tokens: int, report: PrefixReport) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": report.cached,
        "memory_tokens": report.memory,
        "disk_tokens": report.disk,
        "known_tokens": report.known,
        "end": report.end,
    }
