"""Answers as Anthropic's API shows them: blocks one after another, in events or in one message."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from hashlib import blake2b

import msgspec

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.http.anthropic.errors import error_value
from millpond.http.errors import ApiError
from millpond.http.events import Begun, Delta, Event, Usage
from millpond.http.rendering import Answering
from millpond.types import Finish

Json = dict[str, object]
_SIGNED = b"millpond thoughts"


def signature(thought: str) -> str:
    """Clients send it back with the thought and cannot look into it. The same thought has the same, so that the same
    conversation has the same bytes."""
    return b64encode(blake2b(thought.encode("utf-8", "replace"), key=_SIGNED, digest_size=32).digest()).decode()


class MessageWriter:
    """An AnswerWriter."""

    keepalive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, answering: Answering, *, silent: bool) -> None:
        """``silent``: the answer is empty, whatever the model has to say."""
        self._answering = answering
        self._silent = silent
        self._blocks: list[Json] = []
        """Those of a whole answer; of a stream only their number counts."""
        self._open = ""
        """The type of the block that is being written."""
        self._text: list[str] = []
        """What it has: of a thought, and where the answer is whole."""
        self._count = 0
        self._named = 0
        """Calls that have an id."""
        self._whole = 0
        """Calls of which nothing is missing."""
        self._broken = False
        """One that has ended without its end."""
        self._finish: Finish | None = None
        self._stopped_by = ""

    # --- a stream ---------------------------------------------------------------------------------------------

    def frames(self, event: Event) -> Iterator[bytes]:
        match event:
            case Begun():
                usage = _usage(event.prompt_tokens, event.cached_tokens, 1)
                yield _event({"type": "message_start", "message": self._message([], usage)})
            case Usage():
                yield from map(_event, self._closed())
                usage = _usage(event.prompt_tokens, event.cached_tokens, self._spoken(event))
                yield _event({"type": "message_delta", "delta": self._end(), "usage": usage})
                yield _event({"type": "message_stop"})
            case _:
                self._note(event)
                for piece in () if self._silent else event.pieces:
                    yield from map(_event, self._written(piece))

    def failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + msgspec.json.encode(error_value(error)) + b"\n\n"

    def _written(self, piece: Piece) -> Iterator[Json]:
        match piece:
            case Said(text):
                yield from self._opened("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case Thought(text):
                yield from self._opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._text.append(text)
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegun():
                yield from self._closed()
                yield from self._opened("tool_use", self._called(piece, {}))
            case CallText(text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnded():
                yield from self._closed()

    def _opened(self, kind: str, block: Json) -> Iterator[Json]:
        if self._open == kind:
            return
        yield from self._closed()
        self._open, self._text = kind, []
        yield {"type": "content_block_start", "index": self._count, "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._count, "delta": delta}

    def _closed(self) -> Iterator[Json]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": signature("".join(self._text))})
        yield {"type": "content_block_stop", "index": self._count}
        self._open = ""
        self._count += 1

    # --- a whole answer ---------------------------------------------------------------------------------------

    def add(self, delta: Delta) -> None:
        self._note(delta)
        for piece in () if self._silent else delta.pieces:
            match piece:
                case Said(text):
                    self._grow("text", text)
                case Thought(text):
                    self._grow("thinking", text)
                case CallBegun():
                    self._end_block()
                    self._open = "tool_use"
                    self._blocks.append(self._called(piece, {}))
                case CallText(text):
                    self._text.append(text)
                case CallEnded(whole):
                    text, self._text, self._open = "".join(self._text), [], ""
                    if whole:
                        self._blocks[-1]["input"] = _object(text)
                    else:
                        self._blocks.pop()

    def body(self, usage: Usage) -> Iterator[bytes]:
        self._end_block()
        told = _usage(usage.prompt_tokens, usage.cached_tokens, self._spoken(usage))
        yield msgspec.json.encode(self._message(self._blocks, told) | self._end())

    def _grow(self, kind: str, text: str) -> None:
        if self._open != kind:
            self._end_block()
            self._open = kind
        self._text.append(text)

    def _end_block(self) -> None:
        text, self._text = "".join(self._text), []
        if self._open == "text":
            self._blocks.append({"type": "text", "text": text})
        elif self._open == "thinking":
            self._blocks.append({"type": "thinking", "thinking": text, "signature": signature(text)})
        self._open = ""

    # --- both -------------------------------------------------------------------------------------------------

    def _note(self, delta: Delta) -> None:
        ended = [piece.whole for piece in delta.pieces if isinstance(piece, CallEnded)]
        self._whole += sum(ended)
        self._broken = self._broken or not all(ended)
        self._finish = delta.finish or self._finish
        self._stopped_by = delta.stopped_by or self._stopped_by

    def _called(self, begun: CallBegun, given: Json) -> Json:
        self._named += 1
        number = blake2b(f"{self._answering.id} {self._named}".encode(), digest_size=12).hexdigest()
        name = begun.id or f"toolu_{number}"
        return {"type": "tool_use", "id": name, "name": begun.name, "input": given}

    def _spoken(self, usage: Usage) -> int:
        return 0 if self._silent else usage.completion_tokens

    def _message(self, content: list[Json], usage: Json) -> Json:
        return {
            "id": f"msg_{self._answering.id}",
            "type": "message",
            "role": "assistant",
            "model": self._answering.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _end(self) -> Json:
        reason = "end_turn"
        if self._finish is Finish.LENGTH or self._silent or self._broken:
            clamped = self._answering.clamped and self._finish is Finish.LENGTH and not self._silent
            reason = "model_context_window_exceeded" if clamped else "max_tokens"
        elif self._stopped_by:
            reason = "stop_sequence"
        elif self._whole:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": self._stopped_by or None}


def _object(arguments: str) -> msgspec.Raw:
    """A call's arguments, as the model spelled them: large numbers survive. What is no object is told as a text."""
    text = arguments.encode("utf-8", "replace") or b"{}"
    try:
        if isinstance(msgspec.json.decode(text), dict):
            return msgspec.Raw(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    return msgspec.Raw(msgspec.json.encode({"_raw": text.decode()}))


def _usage(prompt: int, cached: int, answer: int) -> Json:
    """What was found in the prefix cache is not in ``input_tokens`` there."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": answer,
    }


def _event(value: Json) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(value["type"]).encode(), msgspec.json.encode(value))
