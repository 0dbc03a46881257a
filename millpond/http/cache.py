"""POST /v1/cache/explain: what the prefix cache would do for a request, without running it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from millpond.client import EngineError, EngineUnavailable
from millpond.http.errors import from_engine, unavailable
from millpond.http.front_end import front_end_of
from millpond.http.openai.chat import CHAT
from millpond.http.openai.completions import COMPLETIONS
from millpond.http.prompts import TokenPrompt, read_prompts
from millpond.http.reading import admit, read_request
from millpond.http.rendering import Parsed
from millpond.http.sse import WatchedResponse, send_parts
from millpond.http.tenants import salt_of
from millpond.types import ErrorKind, PrefixReport


async def explain(http: Request) -> Response:
    """Takes the body of a chat or a plain completion and answers with one entry per prompt. Raises ApiError."""
    front = front_end_of(http)
    parsed, model = await read_request(http, front, _read)
    asked = parsed.asked
    salt = salt_of(http, asked)

    async def work(send: Send) -> None:
        nonlocal asked
        entries = []
        tokenizer, info, client = admit(http, model, asked)
        spelling = partial(model.spellings.find, salt)
        with front.permit(model, asked.prompt_count, client):
            prompts = deque(await front.in_text_thread(lambda: read_prompts(asked, tokenizer, info, spelling)))
            asked = asked.without_content()
            try:
                async with asyncio.timeout(front.config.queue_timeout or None):
                    while prompts:
                        entries.append(_entry(prompts[0], await model.client.explain(prompts[0].tokens, salt)))
                        prompts.popleft()
            except TimeoutError:
                kind = ErrorKind.QUEUE_TIMEOUT
                raise from_engine(EngineError(kind, f"{kind.value}: the engine did not get round to it")) from None
            except EngineUnavailable as error:
                raise unavailable(str(error)) from error
            except EngineError as error:
                raise from_engine(error) from error
        await send_parts(send, [msgspec.json.encode({"object": "list", "data": entries})])

    return WatchedResponse(work)


def _read(fields: Mapping[str, object]) -> Parsed:
    return (COMPLETIONS if fields.get("messages") is None else CHAT).read(fields)


def _entry(prompt: TokenPrompt, report: PrefixReport) -> dict[str, object]:
    return {
        "prompt_tokens": len(prompt.tokens),
        "cached_tokens": report.cached,
        "memory_tokens": report.memory,
        "disk_tokens": report.disk,
        "known_tokens": report.known,
        "end": report.end,
        "at": prompt.places.at(report.known) if report.differs else "",
    }
