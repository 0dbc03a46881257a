"""/v1/responses and what is beside it: answering, counting, and the responses that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millpond.http.context import context_of
from millpond.http.counting import count
from millpond.http.errors import ApiError, bad_value
from millpond.http.front_end import front_end_of
from millpond.http.reading import read_request
from millpond.http.rendering import Parsed
from millpond.http.respond import respond
from millpond.http.response_table import Kept, LineTooLong
from millpond.http.responses.history import History, Item, answered, asked
from millpond.http.responses.schemas import KNOWN, parse
from millpond.http.responses.tools import Toolbox
from millpond.http.responses.writer import ResponseWriter

MOST_LISTED = 100
USUALLY_LISTED = 20


def read(history: History, fields: Mapping[str, object], *, to_answer: bool = True) -> Parsed:
    """Text threads only, as it may wait for what is kept; without ``to_answer`` nothing will be. Raises
    ApiError."""
    request = parse(fields)
    before = history.before(request.previous_response_id)
    items = history.resolved(request.input, before)
    keeps = to_answer and request.store and history.keeps
    keep = history.keeper(items, request.previous_response_id) if keeps else None
    writer = partial(
        ResponseWriter,
        box=request.tools,
        told=request.told(fields, kept=keep is not None),
        keeps_thoughts="reasoning.encrypted_content" in request.include,
        keep=keep,
    )
    unknown = sum(value is not None and name not in KNOWN for name, value in fields.items())
    generation = replace(request.generation(items, before), ignored=_ignored(request.tools))
    return Parsed(generation, writer, unknown)


def _ignored(box: Toolbox) -> tuple[str, ...]:
    return (*(f"tools: {kind}" for kind in box.dropped), *box.ignored)


async def create(http: Request) -> Response:
    """POST /v1/responses. Raises ApiError."""
    front = front_end_of(http)
    return respond(http, front, *await read_request(http, front, partial(read, _history(http)), on_loop=False))


async def input_tokens(http: Request) -> Response:
    """POST /v1/responses/input_tokens: how many tokens a prompt has. Raises ApiError."""
    return await count(http, partial(read, _history(http), to_answer=False), _counted, on_loop=False)


def _counted(tokens: int) -> Mapping[str, object]:
    return {"object": "response.input_tokens", "input_tokens": tokens}


async def retrieve(http: Request) -> Response:
    """GET /v1/responses/{id}: the whole answer once more. Raises ApiError."""
    if http.query_params.get("stream", "false") != "false":
        raise bad_value("stream", http.query_params["stream"], "false: a kept response comes whole")
    return _json((await _kept(http)).response)


async def delete(http: Request) -> Response:
    """DELETE /v1/responses/{id}. Raises ApiError."""
    id_ = _id(http)
    if not await asyncio.wrap_future(front_end_of(http).responses.forget(context_of(http.scope).owner, id_)):
        raise _no_response(id_)
    return _json(msgspec.json.encode({"id": id_, "object": "response.deleted", "deleted": True}))


async def cancel(http: Request) -> Response:
    """POST /v1/responses/{id}/cancel: nothing runs behind its client's back here. Raises ApiError."""
    id_ = (await _kept(http)).id
    raise ApiError(400, f"{id_} is whole: only responses in the background can be cancelled", code="not_cancellable")


async def input_items(http: Request) -> Response:
    """GET /v1/responses/{id}/input_items: what was before the answer, the newest first, in pages. Raises ApiError."""
    front, owner = front_end_of(http), context_of(http.scope).owner
    limit, newest_first, after = _page(http.query_params)
    id_ = (await _kept(http)).id
    try:
        line = await asyncio.wrap_future(front.responses.line(owner, id_))
    except LineTooLong:
        raise ApiError(400, f"{id_}: the conversation is too long to be listed", code="too_long") from None
    body = await front.in_text_thread(lambda: _listed(line, limit, newest_first, after))
    return _json(body)


def _listed(line: list[Kept], limit: int, newest_first: bool, after: str | None) -> bytes:
    items: list[Item] = []
    for kept in line:
        items += asked(kept)
        if kept is not line[-1]:
            items += answered(kept)
    if newest_first:
        items.reverse()
    if after is not None:
        ids = [item.get("id") for item in items]
        if after not in ids:
            raise bad_value("after", after, "the id of one of the items")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].get("id") if page else None,
            "last_id": page[-1].get("id") if page else None,
            "has_more": len(items) > len(page),
        }
    )


def _page(query: Mapping[str, str]) -> tuple[int, bool, str | None]:
    limit, order = query.get("limit", str(USUALLY_LISTED)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MOST_LISTED):
        raise bad_value("limit", limit, f"an integer from 1 to {MOST_LISTED}")
    if order not in ("asc", "desc"):
        raise bad_value("order", order, "asc or desc")
    return int(limit), order == "desc", query.get("after")


async def _kept(http: Request) -> Kept:
    id_ = _id(http)
    kept = await asyncio.wrap_future(front_end_of(http).responses.find(context_of(http.scope).owner, id_))
    if kept is None:
        raise _no_response(id_)
    return kept


def _no_response(id_: str) -> ApiError:
    message = f"there is no response {id_[:80]} here: it may have been deleted, be too old, or be of another key"
    return ApiError(404, message, code="response_not_found")


def _id(http: Request) -> str:
    return f"resp_{http.path_params['response']}"


def _history(http: Request) -> History:
    return History(front_end_of(http).responses, context_of(http.scope).owner)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
