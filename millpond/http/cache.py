"""POST /v1/cache/explain: what the prefix cache would do for a request, without running it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from millpond.client import EngineError, EngineUnavailable
from millpond.http.errors import from_engine, unavailable
from millpond.http.front_end import FrontEnd, front_end_of
from millpond.http.openai.schemas import ChatRequest, CompletionRequest
from millpond.http.prompts import Prompt, chat_prompt, check_limits, completion_prompts
from millpond.http.reading import read_request
from millpond.http.respond import client_name
from millpond.http.served_model import ServedModel
from millpond.http.sse import WatchedResponse, send_json
from millpond.http.tenants import salt_of
from millpond.types import ErrorKind, PrefixReport


async def explain(request: Request) -> Response:
    """Takes the body of a chat or a plain completion and answers with one entry per prompt. Raises ApiError."""
    front = front_end_of(request)
    asked, model = await read_request(request, front, _kind_of)
    count = 1 if isinstance(asked, ChatRequest) else len(asked.prompt)

    salt = salt_of(request, asked)

    async def work(send: Send) -> None:
        nonlocal asked
        entries = []
        with front.permit(model, count, client_name(request, asked)):
            prompts = deque(await _prompts(front, model, asked))
            asked = asked.without_content()
            try:
                async with asyncio.timeout(front.config.queue_timeout or None):
                    while prompts:
                        tokens = prompts.popleft().tokens
                        entries.append(_entry(len(tokens), await model.client.explain(tokens, salt)))
            except TimeoutError:
                kind = ErrorKind.QUEUE_TIMEOUT
                raise from_engine(EngineError(kind, f"{kind.value}: the engine did not get round to it")) from None
            except EngineUnavailable as error:
                raise unavailable(str(error)) from error
            except EngineError as error:
                raise from_engine(error) from error
        await send_json(send, {"object": "list", "data": entries})

    return WatchedResponse(work)


def _kind_of(fields: Mapping[str, object]) -> type[ChatRequest] | type[CompletionRequest]:
    return CompletionRequest if fields.get("messages") is None else ChatRequest


async def _prompts(front: FrontEnd, model: ServedModel, asked: ChatRequest | CompletionRequest) -> list[Prompt]:
    tokenizer, info = model.ready()
    check_limits(asked, info)
    return await front.in_text_thread(
        lambda: (
            chat_prompt(asked, tokenizer, info)
            if isinstance(asked, ChatRequest)
            else completion_prompts(asked, tokenizer, info)
        )
    )


def _entry(prompt_tokens: int, report: PrefixReport) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": report.cached,
        "memory_tokens": report.memory,
        "disk_tokens": report.disk,
        "known_tokens": report.known,
        "end": report.end,
    }
