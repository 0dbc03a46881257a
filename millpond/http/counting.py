"""How many tokens the prompt of a request has, which is made as for an answer; whichever API asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from millpond.http.front_end import front_end_of
from millpond.http.prompts import read_prompts
from millpond.http.reading import admit, read_request
from millpond.http.rendering import Parsed
from millpond.http.sse import WatchedResponse, send_parts
from millpond.http.tenants import salt_of

ANY_LENGTH = 1 << 40


async def count(
    http: Request,
    read: Callable[[Mapping[str, object]], Parsed],
    shown: Callable[[int], Mapping[str, object]],
    *,
    on_loop: bool = True,
) -> Response:
    """The answer to such a question, for a prompt of any length. Raises ApiError."""
    front = front_end_of(http)
    parsed, model = await read_request(http, front, read, on_loop=on_loop)
    asked = replace(parsed.asked, max_tokens=None)

    async def work(send: Send) -> None:
        tokenizer, info, client = admit(http, model, asked)
        spelling = partial(model.spellings.find, salt_of(http, asked))
        known = msgspec.structs.replace(info, context_length=ANY_LENGTH)
        with front.permit(model, 1, client):
            prompts = await front.in_text_thread(lambda: read_prompts(asked, tokenizer, known, spelling))
        await send_parts(send, [msgspec.json.encode(shown(len(prompts[0].tokens)))])

    return WatchedResponse(work)
