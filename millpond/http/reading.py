"""What comes before any work for a model: a body becomes a checked request, and the request is let in.

A small body is read where it is; a large one in a text thread, after the prompts that wait there: what has been read is
larger than its body, so it is to be used up before more is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.requests import Request

from millpond.http.body import read_body
from millpond.http.context import context_of
from millpond.http.front_end import FrontEnd
from millpond.http.generation_request import GenerationRequest
from millpond.http.prompts import check_limits
from millpond.http.rendering import Parsed
from millpond.http.served_model import ServedModel
from millpond.text.tokenizer import Tokenizer
from millpond.types import ModelInfo

SMALL_BODY = 16 * 1024
"""Bytes that take a few milliseconds at most, whatever they are."""


async def read_request(
    http: Request, front: FrontEnd, parse: Callable[[Mapping[str, object]], Parsed], *, on_loop: bool = True
) -> tuple[Parsed, ServedModel]:
    """The request and the model that it names, its unknown fields counted. ``on_loop``: ``parse`` waits for nothing, so
    that a small body may be read on the event loop.

    Raises ApiError, ClientDisconnect.
    """
    config = front.config
    body = await read_body(http, int(config.max_body), config.body_timeout)

    def read() -> Parsed:
        return parse(front.bodies.read(body))

    parsed = read() if on_loop and len(body) <= SMALL_BODY else await front.in_text_thread(read, urgent=False)
    model = front.model_for(parsed.asked.model)
    front.unknown_fields += parsed.unknown_fields
    return parsed, model


def admit(http: Request, model: ServedModel, asked: GenerationRequest) -> tuple[Tokenizer, ModelInfo, str]:
    """What is needed of the model, and whose request it is, for fair sharing.

    Raises ApiError: 503 where the model is not ready, 400 for what no prompt could make valid.
    """
    tokenizer, info = model.ready()
    check_limits(asked, info)
    # With keys nobody can claim to be somebody else.
    client = context_of(http.scope).owner or asked.user or (http.client.host if http.client is not None else "")
    return tokenizer, info, client
