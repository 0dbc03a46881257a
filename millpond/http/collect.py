"""An answer in one piece, put together and sent in many.

What a client may ask for, sixteen long texts with the likeliest tokens of each place, is too much to be made at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Send

from millpond.client import EngineError
from millpond.http.errors import from_engine
from millpond.http.events import Usage
from millpond.http.generation import Generation
from millpond.http.rendering import AnswerWriter
from millpond.http.sse import Headers, send_parts


async def collect(
    send: Send, generation: Generation, writer: AnswerWriter, headers: Callable[[Generation], Headers]
) -> None:
    """Read the answers to their ends, then send them. Raises ApiError."""
    body = []
    try:
        async for event in generation.events():
            if isinstance(event, Usage):
                for written in writer.body(event):
                    body.append(written)
                    await asyncio.sleep(0)
            elif event is not None:
                for number, part in enumerate(event.parts()):
                    if number:
                        await asyncio.sleep(0)
                    writer.add(part)
    except EngineError as error:
        raise from_engine(error) from error
    await send_parts(send, body, headers(generation))
