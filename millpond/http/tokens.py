"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM and llama.cpp have them, for harnesses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Self, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from millpond.http.body import read_body
from millpond.http.counting import ANY_LENGTH
from millpond.http.errors import ApiError, bad_value
from millpond.http.fields import checked
from millpond.http.front_end import FrontEnd, front_end_of
from millpond.http.openai.schemas import ChatRequest
from millpond.http.openai.schemas import parse as parse_chat
from millpond.http.prompts import read_prompts
from millpond.http.sse import WatchedResponse, send_parts
from millpond.text.tokenizer import TextError, Tokenizer
from millpond.types import ModelInfo

OF_CHATS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields that are read as a chat's."""
MOST_CHARACTERS = 1 << 20
"""Of a text: making lists of its tokens holds everybody up."""
_KIND = ConfigDict(strict=True, extra="ignore", frozen=True)
B = TypeVar("B", bound=BaseModel)


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize. Descriptions complete "must be …"."""

    model_config = _KIND

    model: str = Field("", description="a string")
    prompt: str | None = Field(None, description="a string")
    content: str | None = Field(None, description="a string")
    messages: list[object] | None = Field(None, description="a non-empty list of messages")
    add_special_tokens: bool = Field(True, description="true or false")
    parse_special: bool = Field(False, description="true or false")
    return_token_strs: bool = Field(False, description="true or false")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise bad_value("prompt", given, "given, or content, or messages: exactly one of them")
        text = self.prompt or self.content or ""
        if len(text) > MOST_CHARACTERS:
            allowed = f"at most {MOST_CHARACTERS} characters long"
            raise bad_value(given[0], f"{len(text)} characters", allowed)
        return self


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = _KIND

    model: str = Field("", description="a string")
    tokens: list[Annotated[int, Field(ge=0)]] = Field(description="a list of token ids")


async def tokenize(http: Request) -> Response:
    """A text's tokens, or those of a chat's prompt. Raises ApiError."""
    front = front_end_of(http)
    fields = await _fields(http, front)
    asked = checked(TokenizeRequest, fields)
    return _answered(front, asked.model, lambda tokenizer, info: _tokenized(asked, fields, tokenizer, info))


async def detokenize(http: Request) -> Response:
    """The text of tokens. Raises ApiError."""
    front = front_end_of(http)
    asked = checked(DetokenizeRequest, await _fields(http, front))
    return _answered(front, asked.model, lambda tokenizer, info: _detokenized(asked, tokenizer, info))


async def tokenizer_info(http: Request) -> Response:
    """What the model's folder says of its tokenizer. Raises ApiError."""
    front = front_end_of(http)
    return _answered(front, "", lambda tokenizer, info: tokenizer.described() | {"max_model_len": info.context_length})


async def _fields(http: Request, front: FrontEnd) -> Mapping[str, object]:
    body = await read_body(http, int(front.config.max_body), front.config.body_timeout)
    return await front.in_text_thread(lambda: front.bodies.read(body), urgent=False)


def _answered(
    front: FrontEnd, name: str, work: Callable[[Tokenizer, ModelInfo], Mapping[str, object]]
) -> WatchedResponse:
    """What a text thread finds out for the model of that name. Raises ApiError."""
    model = front.model_for(name)

    async def answer(send: Send) -> None:
        tokenizer, info = model.ready()
        found = await front.in_text_thread(lambda: msgspec.json.encode(work(tokenizer, info)))
        await send_parts(send, [found])

    return WatchedResponse(answer)


def _tokenized(
    asked: TokenizeRequest, fields: Mapping[str, object], tokenizer: Tokenizer, info: ModelInfo
) -> Mapping[str, object]:
    text = asked.prompt if asked.prompt is not None else asked.content
    try:
        if text is None:
            chat = parse_chat(ChatRequest, {name: fields[name] for name in OF_CHATS if fields.get(name) is not None})
            unlimited = msgspec.structs.replace(info, context_length=ANY_LENGTH)
            tokens = read_prompts(chat.generation(), tokenizer, unlimited)[0].tokens
        elif asked.add_special_tokens:
            tokens = tokenizer.encode(text, parse_special=asked.parse_special)
        else:
            tokens = tokenizer.text_tokens(text, parse_special=asked.parse_special)
    except TextError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt", code="unreadable_text") from error
    strings = [tokenizer.token_text(token) for token in tokens] if asked.return_token_strs else None
    told = {"count": len(tokens), "max_model_len": info.context_length, "tokens": tokens}
    return told | {"token_strs": strings}


def _detokenized(asked: DetokenizeRequest, tokenizer: Tokenizer, info: ModelInfo) -> Mapping[str, object]:
    for token in asked.tokens:
        if token >= info.vocab_size:
            raise bad_value("tokens", token, f"token ids from 0 to {info.vocab_size - 1}")
    try:
        text = tokenizer.decode(asked.tokens)
    except TextError as error:
        raise ApiError(400, f"tokens: {error}", param="tokens", code="unreadable_text") from error
    return {"prompt": text, "content": text}
