"""The path shared by chat and plain completions: admit, tokenise, submit, then stream or collect.

The routes differ in how they read prompts and how they render answers; both come in from outside.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.types import Send

from millpond.client import EngineError
from millpond.http.clock import Clock
from millpond.http.collect import WholeRendering, collect
from millpond.http.context import GenerationRecord, context_of
from millpond.http.errors import from_engine
from millpond.http.front_end import FrontEnd
from millpond.http.generation import Generation, Piece, Usage, parts
from millpond.http.openai.schemas import CompletionRequest, GenerationRequest, SamplingDefaults
from millpond.http.prompts import Prompt, check_limits, prediction_tokens
from millpond.http.served_model import ServedModel
from millpond.http.speculation_fields import speculation
from millpond.http.sse import EventStream, Headers, WatchedResponse
from millpond.http.tenants import salt_of
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import Tokenizer
from millpond.types import ModelInfo, Request, Salt, Speculation

R = TypeVar("R", bound=GenerationRequest)

ReadPrompts = Callable[[R, Tokenizer, ModelInfo], list[Prompt]]


class Rendering(WholeRendering, Protocol):
    """How a route's answers look. Payloads are plain JSON values."""

    def opening(self, choice: int) -> dict[str, object] | None:
        """The chunk that comes before a choice's first text, if there is one."""

    def chunk(self, piece: Piece) -> dict[str, object]:
        """One piece as a stream chunk."""

    def usage_chunk(self, usage: Usage) -> dict[str, object]:
        """The extra chunk for include_usage."""


RenderingOf = Callable[[R, str, Tokenizer, ModelInfo, list[str]], Rendering]
"""From the request without its content, a base for ids, and the text of each prompt as it is to be repeated."""


def respond(
    http: HttpRequest,
    front: FrontEnd,
    model: ServedModel,
    asked: R,
    count: int,
    read_prompts: ReadPrompts[R],
    rendering_of: RenderingOf[R],
) -> WatchedResponse:
    """Answer a checked request. ``count`` is how many answers it asks for in all.

    An answer may run for hours: what is only needed to begin it is let go then.
    """

    async def work(send: Send) -> None:
        nonlocal asked
        clock = Clock(front.config, asyncio.get_running_loop().time())
        tokenizer, info = model.ready()
        check_limits(asked, info)
        client = client_name(http, asked)
        guessing = speculation(asked.speculative, model.speculation, info.speculation)

        def read() -> tuple[list[Prompt], list[int], StopStrings]:
            prompts = read_prompts(asked, tokenizer, info)
            return prompts, _prediction(asked, guessing or model.speculation, tokenizer, info), StopStrings(asked.stop)

        with front.permit(model, count, client):
            try:
                async with asyncio.timeout_at(clock.deadline):
                    prompts, prediction, stops = await front.in_text_thread(read)
            except TimeoutError:
                raise from_engine(clock.late()) from None
            asked = asked.without_content()
            base = uuid.uuid4().hex
            ends = sorted(tokenizer.eos_token_ids)
            salt, defaults = salt_of(http, asked), model.sampling
            requests = _requests(base, asked, prompts, ends, defaults, client, salt, guessing, prediction)
            seed = requests[0].params.seed
            rendering = rendering_of(asked, base, tokenizer, info, [prompt.echo for prompt in prompts])
            _count(model, asked, prompts)
            generation = Generation(model, front.config, tokenizer, requests, stops, asked.n, clock.start)
            del prompts, prediction, requests
            async with generation:
                try:
                    if asked.stream:
                        await _stream(send, model, front.config.keepalive, generation, rendering, asked.include_usage)
                    else:
                        await collect(send, generation, rendering, count, prefix_headers)
                finally:
                    _note(http, base, asked, count, seed, generation)

    return WatchedResponse(work)


def _count(model: ServedModel, asked: GenerationRequest, prompts: list[Prompt]) -> None:
    for prompt in prompts:
        model.meters.asked(asked.n, prompt.max_tokens)


def _prediction(asked: GenerationRequest, guessing: Speculation, tokenizer: Tokenizer, info: ModelInfo) -> list[int]:
    """What the client expects of the answer, where anything is made of it."""
    if not asked.prediction or guessing.mode not in info.speculation:
        return []
    parse_special = isinstance(asked, CompletionRequest) and asked.parse_special
    return prediction_tokens(asked.prediction, tokenizer, info.context_length, parse_special=parse_special)


def _requests(
    base: str,
    asked: GenerationRequest,
    prompts: list[Prompt],
    ends: list[int],
    defaults: SamplingDefaults,
    client: str,
    salt: Salt,
    guessing: Speculation | None,
    prediction: list[int],
) -> list[Request]:
    return [
        Request(
            id=f"{base}-{number * asked.n + choice}",
            tokens=prompt.tokens,
            params=asked.sampling(prompt.max_tokens, choice, ends, defaults),
            priority=-asked.priority,
            client=client,
            cache_salt=salt,
            speculation=guessing,
            prediction=prediction,
        )
        for number, prompt in enumerate(prompts)
        for choice in range(asked.n)
    ]


def client_name(http: HttpRequest, asked: GenerationRequest) -> str:
    """Whose request this is, for fair sharing: with keys nobody can claim to be somebody else."""
    return context_of(http.scope).owner or asked.user or (http.client.host if http.client is not None else "")


async def _stream(
    send: Send,
    model: ServedModel,
    keepalive: float,
    generation: Generation,
    rendering: Rendering,
    include_usage: bool,
) -> None:
    events = EventStream(send, lambda: prefix_headers(generation))
    opened: set[int] = set()
    seen = model.client.progress
    try:
        async for piece in generation.pieces(keepalive):
            if piece is None:
                # An engine that hangs must not look alive: proxies and clients have their own patience with silence.
                if model.client.progress != seen:
                    seen = model.client.progress
                    await events.comment()
                continue
            if piece.choice not in opened:
                opened.add(piece.choice)
                if (opening := rendering.opening(piece.choice)) is not None:
                    await events.event(opening)
            if piece.text or piece.logprobs or piece.finish:
                for part in parts(piece):
                    await events.event(rendering.chunk(part))
    except EngineError as error:
        if not events.started:
            raise from_engine(error) from error
        await events.error(from_engine(error))
        return
    if include_usage:
        await events.event(rendering.usage_chunk(generation.usage()))
    await events.done()


def prefix_headers(generation: Generation) -> Headers:
    """What the prefix cache did for the request, as a structured field: tokens by tier and why no more were cached.

    Nothing when a stream's headers go out, with a comment, before that is known.
    """
    if not generation.begun:
        return []
    report = generation.prefix()
    shown = f"memory={report.memory}, disk={report.disk}, known={report.known}, end={report.end}"
    return [(b"x-millpond-prefix-cache", shown.encode())]


def _note(
    http: HttpRequest, base: str, asked: GenerationRequest, count: int, seed: int, generation: Generation
) -> None:
    usage = generation.usage()
    prefix = generation.prefix()
    first = generation.first_seconds
    context_of(http.scope).generation = GenerationRecord(
        completion=base,
        stream=asked.stream,
        choices=count,
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
