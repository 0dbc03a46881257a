"""POST /v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from millpond.http.counting import count
from millpond.http.openai.errors import error_response
from millpond.http.rendering import Parsed, Rendering
from millpond.http.responses.schemas import KNOWN, parse
from millpond.http.responses.tools import Toolbox
from millpond.http.responses.writer import ResponseWriter


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(fields)
    kept = "reasoning.encrypted_content" in asked.include
    writer = partial(ResponseWriter, box=asked.tools, told=asked.told(fields), keeps_thoughts=kept)
    unknown = sum(value is not None and name not in KNOWN for name, value in fields.items())
    generation = replace(asked.generation(), ignored=_ignored(asked.tools))
    return Parsed(generation, writer, unknown)


def _ignored(box: Toolbox) -> tuple[str, ...]:
    return (*(f"tools: {kind}" for kind in box.dropped), *box.ignored)


RESPONSES = Rendering(read, error_response)


async def input_tokens(http: Request) -> Response:
    """How many tokens a prompt has. Raises ApiError."""
    return await count(http, read, lambda tokens: {"object": "response.input_tokens", "input_tokens": tokens})
