"""What an API is to the rest of the front end: how a body is read as one, and how its answers and refusals look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response

from millpond.http.errors import ApiError
from millpond.http.events import Delta, Event, Usage
from millpond.http.generation_request import GenerationRequest
from millpond.text.tokenizer import Tokenizer


class AnswerWriter(Protocol):
    """Writes what answers one request, either as a stream or whole."""

    keepalive: bytes
    """What is written into a stream when there has long been nothing else."""

    def frames(self, event: Event) -> Iterator[bytes]:
        """What an event is in a stream, ready to be sent, each in one write."""

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""

    def add(self, delta: Delta) -> None:
        """Take the next part of a whole answer. Large deltas come in parts, so that each call is little work."""

    def body(self, usage: Usage) -> Iterator[bytes]:
        """The whole answer, in parts of which each is one choice's work at most."""


@dataclass(frozen=True, slots=True)
class Answering:
    """What a writer may need to know of what it writes."""

    id: str
    """32 hexadecimal digits."""
    model: str
    """Its name as it is shown."""
    fingerprint: str
    """Of the model's content and how it runs."""
    tokenizer: Tokenizer
    echoes: list[str]
    """Of each prompt the text that is to be repeated; may be empty."""
    n: int
    """Choices of each prompt; they are numbered on from prompt to prompt."""
    thoughts: tuple[str, ...] = ("reasoning_content",)
    """The names under which chats tell thoughts."""
    clamped: bool = False
    """The answer ends with the context, before the tokens that were asked for."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """One API's request, read and checked."""

    asked: GenerationRequest
    writer: Callable[[Answering], AnswerWriter]
    unknown_fields: int
    """How many were ignored because nothing here knows them."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """One API."""

    read: Callable[[Mapping[str, object]], Parsed]
    """Check a body. Any thread; raises ApiError."""
    refuse: Callable[[ApiError], Response]
    """A request that is not answered, with the API's body and headers."""
