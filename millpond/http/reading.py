"""From a request's body to a checked request.

A small body is read where it is; a large one in a text thread, after the prompts that wait there: what has been read is
larger than its body, so it is to be used up before more is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from starlette.requests import Request

from millpond.http.body import json_object, read_body
from millpond.http.openai.schemas import GenerationRequest, parse, unknown_fields
from millpond.http.service import Service

SMALL_BODY = 16 * 1024
"""Bytes that take a few milliseconds at most, whatever they are."""

R = TypeVar("R", bound=GenerationRequest)


async def read_request(request: Request, kind_of: Callable[[Mapping[str, object]], type[R]]) -> R:
    """The request, its model checked, its unknown fields counted. ``kind_of`` tells what the fields make.

    Raises ApiError, ClientDisconnect.
    """
    service: Service = request.app.state.service
    config = service.config
    body = await read_body(request, int(config.max_body), config.body_timeout)

    def read() -> tuple[R, int]:
        fields = json_object(body, config.max_values)
        kind = kind_of(fields)
        return parse(kind, fields), len(unknown_fields(kind, fields))

    asked, unknown = read() if len(body) <= SMALL_BODY else await service.in_text_thread(read, urgent=False)
    service.names.check(asked.model)
    service.unknown_fields += unknown
    return asked
