"""From a request's body to a checked request.

A small body is read where it is; a large one in a text thread, after the prompts that wait there: what has been read is
larger than its body, so it is to be used up before more is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from starlette.requests import Request

from millpond.http.body import json_object, read_body
from millpond.http.front_end import FrontEnd
from millpond.http.openai.schemas import GenerationRequest, parse, unknown_fields
from millpond.http.served_model import ServedModel

SMALL_BODY = 16 * 1024
"""Bytes that take a few milliseconds at most, whatever they are."""

R = TypeVar("R", bound=GenerationRequest)


async def read_request(
    request: Request, front: FrontEnd, kind_of: Callable[[Mapping[str, object]], type[R]]
) -> tuple[R, ServedModel]:
    """The request and the model that it names, its unknown fields counted. ``kind_of`` tells what the fields make.

    Raises ApiError, ClientDisconnect.
    """
    config = front.config
    body = await read_body(request, int(config.max_body), config.body_timeout)

    def read() -> tuple[R, int]:
        fields = json_object(body, config.max_values)
        kind = kind_of(fields)
        return parse(kind, fields), len(unknown_fields(kind, fields))

    asked, unknown = read() if len(body) <= SMALL_BODY else await front.in_text_thread(read, urgent=False)
    model = front.model_for(asked.model)
    front.unknown_fields += unknown
    return asked, model
