"""POST /v1/embeddings: a vector of each text, of models that declare how theirs are made."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from millpond.client import EngineError, EngineUnavailable
from millpond.http.body import read_body
from millpond.http.clock import Clock
from millpond.http.context import context_of
from millpond.http.errors import ApiError, PromptTooLong, bad_value, from_engine, unavailable
from millpond.http.fields import checked
from millpond.http.front_end import FrontEnd, front_end_of
from millpond.http.prompts import surely_longer
from millpond.http.served_model import ServedModel
from millpond.http.sse import WatchedResponse, send_parts
from millpond.text.tokenizer import TextError, Tokenizer
from millpond.types import ModelInfo, Request, SamplingParams, Speculation

AT_ONCE = 8
"""Texts of one request that are with the engine."""
MOST_INPUTS = 2048
INPUT = f"a string, a list of token ids, or a list of at most {MOST_INPUTS} of one of these, none of them empty"
DIGITS = 9
"""Behind the point, of numbers that are at most 1: more than float32 tells apart."""
Input = str | tuple[int, ...]
_TOKENS: Final = list[int]


class EmbeddingsRequest(BaseModel):
    """Body of POST /v1/embeddings. Descriptions complete "must be …"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str = Field("", description="a string")
    input: tuple[Input, ...] = Field(description=INPUT)
    encoding_format: Literal["float", "base64"] = Field("float", description='"float" or "base64"')
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="an integer of at least 1: so many numbers, the first ones of the model's"
    )
    user: str = Field("", description="a string")

    @field_validator("input", mode="plain")
    @classmethod
    def _input(cls, value: object) -> tuple[Input, ...]:
        return _read_input(value)


async def embeddings(http: HttpRequest) -> Response:
    """The route. Raises ApiError."""
    front = front_end_of(http)
    config = front.config
    body = await read_body(http, int(config.max_body), config.body_timeout)
    fields = await front.in_text_thread(lambda: front.bodies.read(body), urgent=False)
    asked = await front.in_text_thread(lambda: checked(EmbeddingsRequest, fields), urgent=False)
    model = front.model_for(asked.model)
    front.unknown_fields += sum(
        value is not None and name not in EmbeddingsRequest.model_fields for name, value in fields.items()
    )

    async def work(send: Send) -> None:
        clock = Clock(config, asyncio.get_running_loop().time())
        tokenizer, info = model.ready()
        size = _size(asked, info)
        client = context_of(http.scope).owner or asked.user or (http.client.host if http.client is not None else "")
        with front.permit(model, min(len(asked.input), AT_ONCE), client):
            prompts = await front.in_text_thread(
                lambda: [_tokens(one, index, tokenizer, info) for index, one in enumerate(asked.input)]
            )
            vectors = await _vectors(front, model, prompts, client, clock.start)
            told = model.names.served, sum(map(len, prompts))
            parts = await front.in_text_thread(lambda: _answer(asked, vectors, size, *told), urgent=False)
        await send_parts(send, parts)

    return WatchedResponse(work)


def _read_input(value: object) -> tuple[Input, ...]:
    """Raises ApiError 400."""
    if isinstance(value, str) and value:
        return (value,)
    if not isinstance(value, list) or not value:
        raise bad_value("input", value, INPUT)
    if type(value[0]) is int:
        return (_ids(value, "input"),)
    if len(value) > MOST_INPUTS:
        raise bad_value("input", f"{len(value)} of them", INPUT)
    return tuple(
        one if isinstance(one, str) and one else _ids(one, f"input[{index}]") for index, one in enumerate(value)
    )


def _ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise bad_value(where, value, "a string or a list of token ids, not empty")
    try:
        return tuple(msgspec.convert(value, _TOKENS))
    except msgspec.ValidationError:
        raise bad_value(where, value, "a list of token ids") from None


def _size(asked: EmbeddingsRequest, info: ModelInfo) -> int:
    """Numbers in each vector. Raises ApiError 400."""
    if not info.embedding_size:
        message = f"model: this model makes no embeddings: {info.embedding_reason}"
        raise ApiError(400, message, param="model", code="no_embeddings")
    if asked.dimensions is not None and asked.dimensions > info.embedding_size:
        raise bad_value(
            "dimensions", asked.dimensions, f"at most {info.embedding_size}, which this model's vectors have"
        )
    return asked.dimensions or info.embedding_size


def _tokens(given: Input, index: int, tokenizer: Tokenizer, info: ModelInfo) -> list[int]:
    """Raises ApiError 400."""
    where, most = f"input[{index}]", info.context_length - 2  # one is behind it that is never read, and one is drawn
    if isinstance(given, str):
        try:
            if surely_longer(tokenizer, [given], info.context_length, 0, parse_special=False):
                raise PromptTooLong(f"{where}: must have at most {most} tokens, got more", where, most + 1, most)
            tokens = tokenizer.whole(given)
        except TextError as error:
            raise ApiError(400, f"{where}: {error}", param=where, code="unreadable_text") from error
    else:
        tokens = list(given)
        wrong = next((token for token in tokens if not 0 <= token < info.vocab_size), None)
        if wrong is not None:
            raise bad_value(where, wrong, f"token ids from 0 to {info.vocab_size - 1}")
    if len(tokens) > most:
        raise PromptTooLong(f"{where}: must have at most {most} tokens, got {len(tokens)}", where, len(tokens), most)
    return tokens


async def _vectors(
    front: FrontEnd, model: ServedModel, prompts: Sequence[list[int]], client: str, start: float
) -> list[bytes]:
    """Of each prompt, float32. Raises ApiError."""
    base, places = uuid.uuid4().hex, asyncio.Semaphore(AT_ONCE)

    async def one(number: int, tokens: list[int]) -> bytes:
        async with places:
            clock = Clock(front.config, start)
            clock.now = asyncio.get_running_loop().time()  # until now it has waited for others of its own request
            request = Request(
                id=f"{base}-{number}",
                tokens=[*tokens, tokens[-1]],
                params=SamplingParams(max_tokens=1, temperature=0.0),
                client=client,
                speculation=Speculation(),
                pooled=True,
            )
            async with model.client.submit(request) as stream:
                while True:
                    delta = await clock.next(stream)
                    clock.turn(delta.finish is not None)
                    if delta.embedding is not None:
                        return delta.embedding

    try:
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(one(number, tokens)) for number, tokens in enumerate(prompts)]
    except* (EngineError, EngineUnavailable) as errors:
        # Where an engine dies some may be answered so and others so.
        failed = next((error for error in errors.exceptions if isinstance(error, EngineError)), None)
        raise (from_engine(failed) if failed is not None else unavailable(str(errors.exceptions[0]))) from errors
    return [task.result() for task in made]


def _answer(asked: EmbeddingsRequest, vectors: Sequence[bytes], size: int, model: str, tokens: int) -> list[bytes]:
    """The body, in parts."""
    parts = [b'{"object":"list","data":[']
    for index, vector in enumerate(vectors):
        shown = {"object": "embedding", "index": index, "embedding": _shown(vector, size, asked.encoding_format)}
        parts += ([b","] if index else []) + [msgspec.json.encode(shown)]
    usage: Mapping[str, int] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return [*parts, b'],"model":', msgspec.json.encode(model), b',"usage":', msgspec.json.encode(usage), b"}"]


def _shown(vector: bytes, size: int, form: str) -> object:
    found = np.frombuffer(vector, "<f4")
    if size < len(found):
        found = found[:size].astype(np.float64)
        found = (found / max(float(np.linalg.norm(found)), 1e-12)).astype("<f4")
    if form == "base64":
        return base64.b64encode(found.tobytes()).decode()
    return np.round(found.astype(np.float64), DIGITS).tolist()
