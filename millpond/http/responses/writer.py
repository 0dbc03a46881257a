"""Answers as Responses show them: items, one after another, in numbered events or in one object.

Each item is told when it begins, while it grows, and whole at its end: Codex reads only what is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b

import msgspec

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.http.errors import ApiError, PromptTooLong
from millpond.http.events import Begun, Delta, Event, Usage
from millpond.http.rendering import Answering
from millpond.http.responses.thoughts import sealed
from millpond.http.responses.tools import Toolbox, text_input
from millpond.http.sse import COMMENT
from millpond.types import Finish

Json = dict[str, object]
QUIET = 32
"""Parts of a custom call's input after which the stream shows that it is alive."""


class ResponseWriter:
    """An AnswerWriter."""

    keepalive = COMMENT

    def __init__(
        self,
        answering: Answering,
        box: Toolbox,
        told: Mapping[str, object],
        *,
        keeps_thoughts: bool,
        keep: Callable[[Json], None] | None = None,
    ) -> None:
        """``told``: what of the request the answer repeats. ``keeps_thoughts``: the client sends them back. ``keep``
        is given the whole answer before its client is."""
        self._answering = answering
        self._box = box
        self._told = told
        self._keeps_thoughts = keeps_thoughts
        self._keep = keep
        self._created = int(time.time())
        self._number = 0
        self._output: list[Json] = []
        """Items that are whole."""
        self._item: Json = {}
        """The one that is being written; empty: none is."""
        self._text: list[str] = []
        self._finish: Finish | None = None
        self._broken = False
        """A call has ended without its end."""

    # --- a stream ---------------------------------------------------------------------------------------------

    def frames(self, event: Event) -> Iterator[bytes]:
        match event:
            case Begun():
                yield self._event("response.created", response=self._response("in_progress"))
                yield self._event("response.in_progress", response=self._response("in_progress"))
            case Usage():
                yield from self._closed(self._finish is Finish.STOP)
                whole = self._answer(event)
                yield self._event(f"response.{whole['status']}", response=whole)
            case _:
                self._finish = event.finish or self._finish
                for piece in event.pieces:
                    yield from self._written(piece)

    def failure(self, error: ApiError) -> bytes:
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else error.code or "server_error"
        failed = self._response("failed") | {"error": {"code": code, "message": error.message}}
        begun = b"" if self._number else self._event("response.created", response=self._response("in_progress"))
        return begun + self._event("response.failed", response=failed)

    def _written(self, piece: Piece) -> Iterator[bytes]:
        match piece:
            case Said(text):
                yield from self._opened("message")
                yield self._part("response.output_text.delta", delta=text, logprobs=[])
                self._text.append(text)
            case Thought(text):
                yield from self._opened("reasoning")
                yield self._part("response.reasoning_text.delta", delta=text)
                self._text.append(text)
            case CallBegun():
                yield from self._closed(whole=True)
                item = self._called(piece)
                if item["type"] == "function_call":
                    yield from self._begun(item)
                else:
                    self._item, self._text = item, []  # its input is known once all of it is there
            case CallText(text):
                self._text.append(text)
                if self._item["type"] == "function_call":
                    yield self._of_item("response.function_call_arguments.delta", delta=text)
                elif len(self._text) % QUIET == 0:
                    yield COMMENT
            case CallEnded(whole):
                self._broken = self._broken or not whole
                yield from self._closed(whole)

    def _opened(self, kind: str) -> Iterator[bytes]:
        if self._item.get("type") == kind:
            return
        yield from self._closed(whole=True)
        yield from self._begun(self._message() if kind == "message" else self._reasoning())
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "message":
            yield self._part("response.content_part.added", part=part)

    def _begun(self, item: Json) -> Iterator[bytes]:
        self._item, self._text = item, []
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _closed(self, whole: bool) -> Iterator[bytes]:
        """The end of the item that is being written. A call that is not whole says so; nobody may carry it out."""
        if not self._item:
            return
        text, kind = "".join(self._text), self._item["type"]
        if kind == "custom_tool_call":
            if not whole:
                self._item = {}
                return
            yield from self._begun({**self._item, "input": ""})
            self._text = [text]
        done = self._whole(whole)
        if kind == "message":
            yield self._part("response.output_text.done", text=text, logprobs=[])
            yield self._part("response.content_part.done", part=done["content"][0])  # type: ignore[index]
        elif kind == "reasoning":
            yield self._part("response.reasoning_text.done", text=text)
        elif kind == "function_call":
            if whole:
                yield self._of_item("response.function_call_arguments.done", name=self._item["name"], arguments=text)
        else:
            given = text_input(text)
            yield self._of_item("response.custom_tool_call_input.delta", delta=given)
            yield self._of_item("response.custom_tool_call_input.done", input=given)
        yield self._event("response.output_item.done", output_index=len(self._output), item=done)
        self._output.append(done)
        self._item = {}

    def _part(self, kind: str, **more: object) -> bytes:
        return self._of_item(kind, content_index=0, **more)

    def _of_item(self, kind: str, **more: object) -> bytes:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output), **more)

    def _event(self, kind: str, **more: object) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(value))

    # --- a whole answer ---------------------------------------------------------------------------------------

    def add(self, delta: Delta) -> None:
        self._finish = delta.finish or self._finish
        for piece in delta.pieces:
            match piece:
                case Said(text):
                    self._grow("message", self._message, text)
                case Thought(text):
                    self._grow("reasoning", self._reasoning, text)
                case CallBegun():
                    self._end(whole=True)
                    self._item = self._called(piece)
                case CallText(text):
                    self._text.append(text)
                case CallEnded(whole):
                    self._broken = self._broken or not whole
                    self._end(whole)

    def body(self, usage: Usage) -> Iterator[bytes]:
        self._end(whole=self._finish is Finish.STOP)
        yield msgspec.json.encode(self._answer(usage))

    def _grow(self, kind: str, made: Callable[[], Json], text: str) -> None:
        if self._item.get("type") != kind:
            self._end(whole=True)
            self._item = made()
        self._text.append(text)

    def _end(self, whole: bool) -> None:
        called = str(self._item.get("type", "")).endswith("_call")
        if self._item and (whole or not called):
            self._output.append(self._whole(whole))
        self._item, self._text = {}, []

    # --- items ------------------------------------------------------------------------------------------------

    def _message(self) -> Json:
        return {"type": "message", "id": self._id("msg"), "status": "in_progress", "role": "assistant", "content": []}

    def _reasoning(self) -> Json:
        return {"type": "reasoning", "id": self._id("rs"), "summary": [], "content": []}

    def _called(self, begun: CallBegun) -> Json:
        space, name = self._box.spaces.get(begun.name, ("", begun.name))
        own = {"call_id": begun.id or self._id("call"), "name": name} | ({"namespace": space} if space else {})
        if begun.name in self._box.custom:
            return {"type": "custom_tool_call", "id": self._id("ctc"), "status": "in_progress", **own, "input": ""}
        return {"type": "function_call", "id": self._id("fc"), "status": "in_progress", **own, "arguments": ""}

    def _whole(self, whole: bool) -> Json:
        """The item that has been written, as it is at its end."""
        text, item = "".join(self._text), dict(self._item)
        match item["type"]:
            case "message":
                item["content"] = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            case "reasoning":
                item["content"] = [{"type": "reasoning_text", "text": text}]
                if self._keeps_thoughts:
                    item["encrypted_content"] = sealed(text)
                return item
            case "function_call":
                item["arguments"] = text
            case _:
                item["input"] = text_input(text)
        return item | {"status": "completed" if whole else "incomplete"}

    def _id(self, kind: str) -> str:
        place = f"{self._answering.id} {kind} {len(self._output)}"
        return f"{kind}_{blake2b(place.encode(), digest_size=16).hexdigest()}"

    # --- the whole of it --------------------------------------------------------------------------------------

    def _status(self) -> str:
        return "incomplete" if self._finish is Finish.LENGTH or self._broken else "completed"

    def _answer(self, usage: Usage) -> Json:
        """All of it, at its end."""
        whole = self._response(self._status(), usage)
        if self._keep is not None:
            self._keep(whole)
        return whole

    def _response(self, status: str, usage: Usage | None = None) -> Json:
        cut = status == "incomplete"
        return {
            "id": f"resp_{self._answering.id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self._answering.model,
            "output": list(self._output),
            **self._told,
            "usage": None if usage is None else _usage(usage),
        }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
