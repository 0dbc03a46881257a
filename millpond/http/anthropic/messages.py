"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from millpond.http.anthropic.errors import error_response
from millpond.http.anthropic.schemas import KNOWN, parse
from millpond.http.anthropic.writer import MessageWriter
from millpond.http.front_end import front_end_of
from millpond.http.prompts import read_prompts
from millpond.http.reading import admit, read_request
from millpond.http.rendering import Parsed, Rendering
from millpond.http.sse import WatchedResponse, send_parts

ANY_LENGTH = 1 << 40


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(fields).generation()
    return Parsed(asked, partial(MessageWriter, silent=asked.silent), _unknown(fields))


def _unknown(fields: Mapping[str, object]) -> int:
    return sum(value is not None and name not in KNOWN for name, value in fields.items())


MESSAGES = Rendering(read, error_response)


async def count_tokens(http: Request) -> Response:
    """How many tokens a prompt has; it is made as for an answer. Raises ApiError."""
    front = front_end_of(http)
    parsed, model = await read_request(http, front, _read_without_limit)
    asked = parsed.asked

    async def work(send: Send) -> None:
        tokenizer, info, client = admit(http, model, asked)
        known = msgspec.structs.replace(info, context_length=ANY_LENGTH)
        with front.permit(model, 1, client):
            prompts = await front.in_text_thread(lambda: read_prompts(asked, tokenizer, known))
        await send_parts(send, [msgspec.json.encode({"input_tokens": len(prompts[0].tokens)})])

    return WatchedResponse(work)


async def hello(_http: Request) -> Response:
    """Claude Code asks whether there is anybody."""
    return Response(b"{}", media_type="application/json")


def _read_without_limit(fields: Mapping[str, object]) -> Parsed:
    parsed = read({**fields, "max_tokens": 1})
    return replace(parsed, unknown_fields=_unknown(fields))
