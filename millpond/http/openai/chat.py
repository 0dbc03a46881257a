"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256

import msgspec

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.http.events import Delta
from millpond.http.openai.choices import Choice, ChoicesWriter, Json, described
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import ChatLogprobs, PromptLogprobs
from millpond.http.openai.schemas import ChatRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering
from millpond.types import Finish


class ChatWriter(ChoicesWriter):
    """Chat answers in the API's shape."""

    def __init__(
        self,
        answering: Answering,
        *,
        include_usage: bool,
        logprobs: bool,
        prompt_logprobs: int | None,
        thoughts: bool,
    ) -> None:
        """``thoughts``: they are told; otherwise only counted."""
        self._answering = answering
        self._thoughts = answering.thoughts if thoughts else ()
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        head: Json = {"id": f"chatcmpl-{answering.id}", **described(answering)}
        chunk, whole = head | {"object": "chat.completion.chunk"}, head | {"object": "chat.completion"}
        super().__init__(chunk, whole, include_usage=include_usage)

    def choice(self) -> Choice:
        tokenizer, top = self._answering.tokenizer, self._prompt_logprobs
        prompt = PromptLogprobs(tokenizer, top) if top is not None else None
        return Choice(ChatLogprobs(tokenizer).render if self._logprobs else None, prompt)

    def _after(self, prompt_logprobs: msgspec.Raw | None) -> bytes:
        """A chat has one prompt."""
        return b"" if prompt_logprobs is None else b',"prompt_logprobs":' + bytes(prompt_logprobs)

    def opening(self, index: int, choice: Choice) -> Json:  # noqa: ARG002 - all begin alike
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, delta: Delta, choice: Choice) -> Iterator[Json]:
        """A chunk for each piece. The end of calls has one of its own: clients look at it apart."""
        parts = [part for part in (self._part(delta.choice, piece, choice) for piece in delta.pieces) if part]
        if not parts or (delta.finish and choice.calls):
            parts.append({})
        logprobs = choice.render(delta.logprobs) if choice.render is not None and delta.logprobs else None
        for part in parts[:-1]:
            yield {"index": delta.choice, "delta": part, "logprobs": None, "finish_reason": None}
        finish = _finish(delta.finish, choice.calls, choice.broken)
        yield {"index": delta.choice, "delta": parts[-1], "logprobs": logprobs, "finish_reason": finish}

    def _part(self, index: int, piece: Piece, choice: Choice) -> Json:
        """What a piece adds to a message; empty: nothing."""
        match piece:
            case Said(text):
                return {"content": text}
            case Thought(text):
                return dict.fromkeys(self._thoughts, text)
            case CallBegun():
                choice.calls += 1
                begun = self._call(index, choice.calls - 1, piece, "")
                return {"tool_calls": [{"index": choice.calls - 1} | begun]}
            case CallText(text):
                return {"tool_calls": [{"index": choice.calls - 1, "function": {"arguments": text}}]}
            case CallEnded(whole):
                choice.broken = choice.broken or not whole
        return {}

    def whole(self, index: int, choice: Choice) -> Json:
        called = [self._call(index, number, *call) for number, call in enumerate(choice.called)]
        message: Json = {"role": "assistant", "content": choice.text or (None if called else ""), "refusal": None}
        if choice.thought:
            message |= dict.fromkeys(self._thoughts, choice.thought)
        if called:
            message["tool_calls"] = called
        finish = _finish(choice.finish, len(called), choice.broken)
        return {"index": index, "message": message, "logprobs": choice.logprobs, "finish_reason": finish}

    def _call(self, index: int, number: int, begun: CallBegun, arguments: str) -> Json:
        own = begun.id or f"call_{sha256(f'{self._answering.id} {index} {number}'.encode()).hexdigest()[:24]}"
        return {"id": own, "type": "function", "function": {"name": begun.name, "arguments": arguments}}


def _finish(finish: str | None, calls: int, broken: bool) -> str | None:
    """Calls end an answer in a way of their own, unless it was cut off; one that breaks off was."""
    if finish != Finish.STOP:
        return finish
    return Finish.LENGTH if broken else "tool_calls" if calls else finish


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(ChatRequest, fields)
    writer = partial(
        ChatWriter,
        include_usage=asked.include_usage,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        thoughts=asked.include_reasoning,
    )
    return Parsed(asked.generation(), writer, len(unknown_fields(ChatRequest, fields)))


CHAT = Rendering(read, error_response)
