"""The path of every request that generates: read, admit, tokenise, submit, then stream or collect.

How it is asked and how it is answered is a Rendering's; what is here knows no API.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from millpond.client import EngineError
from millpond.http.clock import Clock
from millpond.http.context import GenerationRecord, context_of
from millpond.http.errors import from_engine
from millpond.http.events import ChoiceDelta, Usage
from millpond.http.forms import Shape, ignored_header, shape_of
from millpond.http.front_end import FrontEnd, front_end_of
from millpond.http.generation import Generation
from millpond.http.generation_request import Conversation, GenerationRequest
from millpond.http.prompts import TokenPrompt, prediction_tokens, read_prompts
from millpond.http.reading import admit, read_request
from millpond.http.rendering import Answering, AnswerWriter, Parsed, Rendering
from millpond.http.served_model import ServedModel
from millpond.http.speculation_fields import speculation
from millpond.http.sse import EventStream, Headers, WatchedResponse, send_parts
from millpond.http.tenants import salt_of
from millpond.text.answer import AnswerText
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import Tokenizer
from millpond.types import ModelInfo, Request, Speculation


def endpoint(rendering: Rendering) -> Callable[[HttpRequest], Awaitable[Response]]:
    """The route of one API."""

    async def route(http: HttpRequest) -> Response:
        front = front_end_of(http)
        return respond(http, front, *await read_request(http, front, rendering.read))

    return route


def respond(http: HttpRequest, front: FrontEnd, parsed: Parsed, model: ServedModel) -> WatchedResponse:
    """Answer a checked request. An answer may run for hours: what is only needed to begin it is let go then."""
    asked, writer_of = parsed.asked, parsed.writer
    choices = asked.prompt_count * asked.n

    async def work(send: Send) -> None:
        nonlocal asked
        clock = Clock(front.config, asyncio.get_running_loop().time())
        tokenizer, info, client = admit(http, model, asked)
        salt = salt_of(http, asked)
        guessing = speculation(asked.speculative, model.speculation, info.speculation)

        def read() -> tuple[list[TokenPrompt], list[Shape], list[int], list[AnswerText]]:
            prompts = read_prompts(asked, tokenizer, info, partial(model.spellings.find, salt))
            shapes = [shape_of(asked, prompt.tokens, tokenizer, info) for prompt in prompts]
            prediction = _prediction(asked, guessing or model.speculation, tokenizer, info)
            return prompts, shapes, prediction, _answers(asked, prompts, tokenizer)

        with front.permit(model, choices, client):
            try:
                async with asyncio.timeout_at(clock.deadline):
                    prompts, shapes, prediction, answers = await front.in_text_thread(read)
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
                    client=client,
                    cache_salt=salt,
                    speculation=guessing,
                    prediction=prediction,
                    grammar=shapes[number].grammar,
                    shared=list(prompt.shared),
                )
                for number, prompt in enumerate(prompts)
                for choice in range(asked.n)
            ]
            seed = requests[0].params.seed
            ignored = ignored_header((*asked.ignored, *shapes[0].ignored))
            echoes = [prompt.echo for prompt in prompts]
            clamped = prompts[0].clamped
            thoughts = front.config.thought_fields
            told = Answering(base, model.names.served, info.fingerprint, tokenizer, echoes, asked.n, thoughts, clamped)
            writer = writer_of(told)
            generation = Generation(model, front.config, requests, answers, asked.n, clock.start, prompts[0].places)
            del prompts, shapes, prediction, requests, answers
            async with generation:
                try:
                    if asked.stream:
                        await _stream(send, model, front.config.keepalive, generation, writer, ignored)
                    else:
                        await _collect(send, generation, writer, ignored)
                finally:
                    usage, prefix, differs = generation.usage(), generation.prefix(), generation.differs()
                    first = generation.first_seconds
                    record = GenerationRecord(base, asked.stream, choices, seed, usage, prefix, differs, first)
                    context_of(http.scope).generation = record

    return WatchedResponse(work)


def _answers(asked: GenerationRequest, prompts: Sequence[TokenPrompt], tokenizer: Tokenizer) -> list[AnswerText]:
    """The text side of each answer."""
    stops, chat = StopStrings(asked.stop), asked.prompt
    if not isinstance(chat, Conversation):
        return [tokenizer.answer(stops) for _ in prompts for _ in range(asked.n)]
    return [
        tokenizer.read_answer(stops, prompt.tokens, chat.schemas, one_call=chat.one_call)
        for prompt in prompts
        for _ in range(asked.n)
    ]


def _prediction(asked: GenerationRequest, guessing: Speculation, tokenizer: Tokenizer, info: ModelInfo) -> list[int]:
    """What the client expects of the answer, where anything is made of it."""
    if not asked.prediction or guessing.mode.among(info.speculation) not in info.speculation:
        return []
    return prediction_tokens(asked.prediction, tokenizer, info.context_length, parse_special=asked.parse_special)


async def _stream(
    send: Send, model: ServedModel, keepalive: float, generation: Generation, writer: AnswerWriter, more: Headers
) -> None:
    """``more``: headers of the answer."""
    stream = EventStream(send, lambda: [*_prefix_headers(generation), *more])
    seen = model.client.progress
    try:
        async for event in generation.events(keepalive):
            if event is None:
                # An engine that hangs must not look alive: proxies and clients have their own patience with silence.
                if model.client.progress != seen:
                    seen = model.client.progress
                    await stream.write(writer.keepalive)
                continue
            for part in event.parts() if isinstance(event, ChoiceDelta) else (event,):
                for frame in writer.frames(part):
                    await stream.write(frame)
    except EngineError as error:
        if not stream.started:
            raise from_engine(error) from error
        await stream.write(writer.failure(from_engine(error)))
    await stream.end()


async def _collect(send: Send, generation: Generation, writer: AnswerWriter, more: Headers) -> None:
    """In one piece, which may be too large to be made at once. ``more``: headers of the answer. Raises ApiError."""
    body = []
    try:
        async for event in generation.events():
            if isinstance(event, Usage):
                for written in writer.body(event):
                    body.append(written)
                    await asyncio.sleep(0)
            elif isinstance(event, ChoiceDelta):
                for number, part in enumerate(event.parts()):
                    if number:
                        await asyncio.sleep(0)
                    writer.add(part)
    except EngineError as error:
        raise from_engine(error) from error
    await send_parts(send, body, [*_prefix_headers(generation), *more])


def _prefix_headers(generation: Generation) -> Headers:
    """What the prefix cache did for the request, as a structured field: tokens by tier, why no more were cached, and
    where the prompt is no longer what is known.

    Nothing when a stream's headers go out, with a comment, before that is known.
    """
    if not generation.begun:
        return []
    report = generation.prefix()
    shown = f"memory={report.memory}, disk={report.disk}, known={report.known}, end={report.end}"
    if differs := generation.differs():
        shown += f', at="{differs}"'
    return [(b"x-millpond-prefix-cache", shown.encode())]
