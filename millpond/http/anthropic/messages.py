"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from millpond.http.anthropic.errors import error_response
from millpond.http.anthropic.schemas import KNOWN, parse
from millpond.http.anthropic.writer import MessageWriter
from millpond.http.counting import count
from millpond.http.rendering import Parsed, Rendering


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(fields).generation()
    return Parsed(asked, partial(MessageWriter, silent=asked.silent), _unknown(fields))


def _unknown(fields: Mapping[str, object]) -> int:
    return sum(value is not None and name not in KNOWN for name, value in fields.items())


MESSAGES = Rendering(read, error_response)


async def count_tokens(http: Request) -> Response:
    """How many tokens a prompt has. Raises ApiError."""
    return await count(http, _read_without_limit, lambda tokens: {"input_tokens": tokens})


async def hello(_http: Request) -> Response:
    """Claude Code asks whether there is anybody."""
    return Response(b"{}", media_type="application/json")


def _read_without_limit(fields: Mapping[str, object]) -> Parsed:
    parsed = read(fields if fields.get("max_tokens") is not None else {**fields, "max_tokens": 1})
    return replace(parsed, unknown_fields=_unknown(fields))
