"""An answer in one piece, put together and sent in many.

What a client may ask for, sixteen long texts with the likeliest tokens of each place, is too much to be made at once:
log-probabilities become JSON when they come, and each choice is written by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from starlette.types import Send

from millpond.client import EngineError
from millpond.http.errors import from_engine
from millpond.http.generation import Generation, Usage, parts
from millpond.http.openai.logprobs import GrowingLogprobs
from millpond.http.sse import Headers, send_parts


@dataclass(slots=True)
class Collected:
    """One whole choice, as far as it is there."""

    logprobs: GrowingLogprobs
    pieces: list[str] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class WholeRendering(Protocol):
    """How a route's whole answers look. Payloads are JSON values, in which there may be ``msgspec.Raw``."""

    def collected(self) -> Collected:
        """A choice that is still empty."""

    def whole_head(self) -> dict[str, object]:
        """The response but for its choices and its usage."""

    def whole_choice(self, index: int, choice: Collected) -> dict[str, object]:
        """One of its choices."""


async def collect(
    send: Send, generation: Generation, rendering: WholeRendering, count: int, headers: Callable[[Generation], Headers]
) -> None:
    """Read ``count`` answers to their ends, then send them. Raises ApiError."""
    choices = [rendering.collected() for _ in range(count)]
    try:
        async for whole in generation.pieces():
            for number, piece in enumerate(parts(whole)):
                if number:
                    await asyncio.sleep(0)
                choice = choices[piece.choice]
                choice.pieces.append(piece.text)
                choice.logprobs.add(piece.logprobs)
                choice.finish = piece.finish
    except EngineError as error:
        raise from_engine(error) from error
    body = await _body(choices, rendering, generation.usage())
    await send_parts(send, body, headers(generation))


async def _body(choices: list[Collected], rendering: WholeRendering, usage: Usage) -> list[bytes]:
    """The response, in the order of the API: choices between what is known before and after them."""
    head = msgspec.json.encode(rendering.whole_head())[:-1]
    body = [head + b',"choices":[']
    for index in range(len(choices)):
        if index:
            body.append(b",")
            await asyncio.sleep(0)
        body.append(msgspec.json.encode(rendering.whole_choice(index, choices[index])))
        choices[index] = rendering.collected()  # it is not needed twice
    body.append(b'],"usage":' + msgspec.json.encode(usage.payload()) + b"}")
    return body
