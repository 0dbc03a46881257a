"""The path of every request that generates: read, admit, tokenise, submit, then stream or collect.

How it is asked and how it is answered is a Rendering's; what is here knows no API.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from millpond.client import EngineError
from millpond.http.clock import Clock
from millpond.http.collect import collect
from millpond.http.context import GenerationRecord, context_of
from millpond.http.errors import from_engine
from millpond.http.events import Usage
from millpond.http.front_end import FrontEnd, front_end_of
from millpond.http.generation import Generation
from millpond.http.generation_request import GenerationRequest
from millpond.http.prompts import Prompt, prediction_tokens, read_prompts
from millpond.http.reading import Admission, admit, read_request
from millpond.http.rendering import Answering, AnswerWriter, Parsed, Rendering
from millpond.http.served_model import ServedModel
from millpond.http.speculation_fields import speculation
from millpond.http.sse import EventStream, Headers, WatchedResponse
from millpond.http.tenants import salt_of
from millpond.text.stops import StopStrings
from millpond.types import Request, Speculation


def endpoint(rendering: Rendering) -> Callable[[HttpRequest], Awaitable[Response]]:
    """The route of one API."""

    async def route(http: HttpRequest) -> Response:
        front = front_end_of(http)
        parsed, model = await read_request(http, front, rendering.read)
        return respond(http, front, model, parsed)

    return route


def respond(http: HttpRequest, front: FrontEnd, model: ServedModel, parsed: Parsed) -> WatchedResponse:
    """Answer a checked request. An answer may run for hours: what is only needed to begin it is let go then."""
    asked, writer_of = parsed.asked, parsed.writer
    choices = asked.prompts * asked.n

    async def work(send: Send) -> None:
        nonlocal asked
        clock = Clock(front.config, asyncio.get_running_loop().time())
        admission = admit(http, model, asked)
        tokenizer, info = admission.tokenizer, admission.info
        guessing = speculation(asked.speculative, model.speculation, info.speculation)

        def read() -> tuple[list[Prompt], list[int], StopStrings]:
            prompts = read_prompts(asked, tokenizer, info)
            return prompts, _prediction(asked, guessing or model.speculation, admission), StopStrings(asked.stop)

        with front.permit(model, choices, admission.client):
            try:
                async with asyncio.timeout_at(clock.deadline):
                    prompts, prediction, stops = await front.in_text_thread(read)
            except TimeoutError:
                raise from_engine(clock.late()) from None
            asked = asked.without_content()
            base = uuid.uuid4().hex
            ends = sorted(tokenizer.eos_token_ids)
            requests = [
                Request(
                    id=f"{base}-{number * asked.n + choice}",
                    tokens=prompt.tokens,
                    params=asked.params(prompt.max_tokens, choice, ends, model.sampling),
                    priority=-asked.priority,
                    client=admission.client,
                    cache_salt=salt_of(http, asked),
                    speculation=guessing,
                    prediction=prediction,
                )
                for number, prompt in enumerate(prompts)
                for choice in range(asked.n)
            ]
            seed = requests[0].params.seed
            echoes = [prompt.echo for prompt in prompts]
            writer = writer_of(Answering(base, model.names.served, info.fingerprint, tokenizer, echoes, asked.n))
            for prompt in prompts:
                model.meters.asked(asked.n, prompt.max_tokens)
            generation = Generation(model, front.config, tokenizer, requests, stops, asked.n, clock.start)
            del prompts, prediction, requests
            async with generation:
                try:
                    if asked.stream:
                        await _stream(send, model, front.config.keepalive, generation, writer)
                    else:
                        await collect(send, generation, writer, prefix_headers)
                finally:
                    record = _record(base, asked, choices, seed, generation)
                    context_of(http.scope).generation = record

    return WatchedResponse(work)


def _prediction(asked: GenerationRequest, guessing: Speculation, admission: Admission) -> list[int]:
    """What the client expects of the answer, where anything is made of it."""
    if not asked.prediction or guessing.mode not in admission.info.speculation:
        return []
    most, special = admission.info.context_length, asked.parse_special
    return prediction_tokens(asked.prediction, admission.tokenizer, most, parse_special=special)


async def _stream(
    send: Send, model: ServedModel, keepalive: float, generation: Generation, writer: AnswerWriter
) -> None:
    stream = EventStream(send, lambda: prefix_headers(generation))
    seen = model.client.progress
    try:
        async for event in generation.events(keepalive):
            if event is None:
                # An engine that hangs must not look alive: proxies and clients have their own patience with silence.
                if model.client.progress != seen:
                    seen = model.client.progress
                    await stream.write(writer.keepalive)
                continue
            for part in (event,) if isinstance(event, Usage) else event.parts():
                for frame in writer.frames(part):
                    await stream.write(frame)
    except EngineError as error:
        if not stream.started:
            raise from_engine(error) from error
        await stream.write(writer.failure(from_engine(error)))
    await stream.end()


def prefix_headers(generation: Generation) -> Headers:
    """What the prefix cache did for the request, as a structured field: tokens by tier and why no more were cached.

    Nothing when a stream's headers go out, with a comment, before that is known.
    """
    if not generation.begun:
        return []
    report = generation.prefix()
    shown = f"memory={report.memory}, disk={report.disk}, known={report.known}, end={report.end}"
    return [(b"x-millpond-prefix-cache", shown.encode())]


def _record(base: str, asked: GenerationRequest, choices: int, seed: int, generation: Generation) -> GenerationRecord:
    usage = generation.usage()
    prefix = generation.prefix()
    first = generation.first_seconds
    return GenerationRecord(
        completion=base,
        stream=asked.stream,
        choices=choices,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        cached_disk=prefix.disk,
        known_tokens=prefix.known,
        cache_end=prefix.end,
        completion_tokens=usage.completion_tokens,
        accepted_draft_tokens=usage.accepted_tokens,
        rejected_draft_tokens=usage.rejected_tokens,
        ttft=round(first, 4) if first is not None else None,
        seed=seed,
    )
