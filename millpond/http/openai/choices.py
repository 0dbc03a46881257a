"""Answers as chats and text completions both show them: choices, in chunks that end with [DONE] or all at once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.http.errors import ApiError
from millpond.http.events import Begun, Delta, Event, Usage
from millpond.http.openai.errors import error_body
from millpond.http.openai.logprobs import GrowingLogprobs, PromptLogprobs, Render
from millpond.http.rendering import Answering
from millpond.http.sse import COMMENT
from millpond.types import Finish

Json = dict[str, object]
"""JSON values, in which there may be ``msgspec.Raw``."""


class Choice:
    """One choice, as far as it is there. In a stream nothing of it is kept."""

    def __init__(self, render: Render | None, prompt: PromptLogprobs | None = None, *, echoed: bool = False) -> None:
        """``prompt``: takes what the model thinks of the prompt, where that is wanted; ``echoed``: the choice's own
        log-probabilities begin with that."""
        self.render = render
        """None: log-probabilities are not wanted."""
        self._logprobs = GrowingLogprobs(render) if render is not None else None
        self._prompt = prompt
        self._echoed = echoed
        self.opened = False
        """In a stream: something of it has been told."""
        self._pieces: list[Piece] = []
        self.calls = 0
        """Begun so far."""
        self.broken = False
        """One has ended without its end."""
        self.finish: str | None = None

    def score(self, delta: Delta) -> None:
        """Take what a delta tells of the prompt."""
        if self._echoed and self._logprobs is not None:
            self._logprobs.add(delta.scored)
        if self._prompt is not None:
            self._prompt.add(delta.scored)

    def add(self, delta: Delta) -> None:
        self.score(delta)
        self._pieces += delta.pieces
        self.broken = self.broken or any(isinstance(piece, CallEnded) and not piece.whole for piece in delta.pieces)
        if self._logprobs is not None:
            self._logprobs.add(delta.logprobs)
        self.finish = delta.finish

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._pieces if isinstance(piece, Said))

    @property
    def thought(self) -> str:
        return "".join(piece.text for piece in self._pieces if isinstance(piece, Thought))

    @property
    def called(self) -> list[tuple[CallBegun, str]]:
        """The calls of which nothing is missing, each with its arguments."""
        found: list[tuple[CallBegun, str]] = []
        begun, arguments = CallBegun(""), list[str]()
        for piece in self._pieces:
            match piece:
                case CallBegun():
                    begun, arguments = piece, []
                case CallText(text):
                    arguments.append(text)
                case CallEnded(whole=True):
                    found.append((begun, "".join(arguments)))
        return found

    @property
    def logprobs(self) -> Json | None:
        return self._logprobs.whole() if self._logprobs is not None else None

    @property
    def prompt_logprobs(self) -> msgspec.Raw | None:
        return self._prompt.whole() if self._prompt is not None else None


class ChoicesWriter(ABC):
    """An AnswerWriter; subclasses say how a choice looks. What all chunks begin with is encoded once."""

    keepalive = COMMENT

    def __init__(self, chunk: Json, whole: Json, *, include_usage: bool, silent: bool = False) -> None:
        """``chunk`` and ``whole``: what stands before the choices. ``silent``: no token of an answer was asked for."""
        self._silent = silent
        self._chunk = b"data: " + _opened(chunk)
        self._chunk_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._whole = _opened(whole)
        self._include_usage = include_usage
        self._choices: defaultdict[int, Choice] = defaultdict(self.choice)

    @abstractmethod
    def choice(self) -> Choice:
        """One that is still empty."""

    @abstractmethod
    def opening(self, index: int, choice: Choice) -> Json | None:
        """What comes before a choice's first text in a stream, if anything does."""

    @abstractmethod
    def deltas(self, delta: Delta, choice: Choice) -> Iterator[Json]:
        """The choices of so many chunks."""

    @abstractmethod
    def whole(self, index: int, choice: Choice) -> Json:
        """A choice of a whole answer."""

    def frames(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Usage):
            if self._include_usage:
                yield self._chunk + b'],"usage":' + self._usage(event) + b"}\n\n"
            yield b"data: [DONE]\n\n"
            return
        if isinstance(event, Begun):
            return
        event, choice = self._heard(event), self._choices[event.choice]
        if event.scored:
            choice.score(event)
            return
        if not choice.opened and (opening := self.opening(event.choice, choice)) is not None:
            yield self._frame(opening)
        choice.opened = True
        if not event.silent:
            yield from map(self._frame, self.deltas(event, choice))

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def add(self, delta: Delta) -> None:
        self._choices[delta.choice].add(self._heard(delta))

    def _heard(self, delta: Delta) -> Delta:
        """As much of it as was asked for."""
        if not self._silent:
            return delta
        return replace(delta, pieces=(), logprobs=[], finish=Finish.LENGTH if delta.finish else None)

    def body(self, usage: Usage) -> Iterator[bytes]:
        """In the order of the API: choices between what is known before and after them."""
        first = self._choices[0].prompt_logprobs if self._choices else None
        yield self._whole
        for index in range(len(self._choices)):
            choice = self.whole(index, self._choices.pop(index))  # it is not needed twice
            yield (b"," if index else b"") + msgspec.json.encode(choice)
        yield b'],"usage":' + self._usage(usage) + self._after(first) + b"}"

    def _after(self, prompt_logprobs: msgspec.Raw | None) -> bytes:  # noqa: ARG002 - of the first choice
        """What comes behind all of an answer."""
        return b""

    def _usage(self, usage: Usage) -> bytes:
        if self._silent:
            usage = replace(usage, completion_tokens=0, accepted_tokens=0, rejected_tokens=0, thought_tokens=0)
        return _usage(usage)

    def _frame(self, choice: Json) -> bytes:
        return self._chunk + msgspec.json.encode(choice) + self._chunk_end


def described(answering: Answering) -> Json:
    """What is in every answer beside its id and kind."""
    fingerprint = f"millpond-{answering.fingerprint[:12]}"
    return {"created": int(time.time()), "model": answering.model, "system_fingerprint": fingerprint}


def _opened(head: Json) -> bytes:
    return msgspec.json.encode(head)[:-1] + b',"choices":['


def _usage(usage: Usage) -> bytes:
    return msgspec.json.encode(
        {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": usage.thought_tokens,
                "accepted_prediction_tokens": usage.accepted_tokens,
                "rejected_prediction_tokens": usage.rejected_tokens,
            },
        }
    )
