"""What is known of one HTTP request while it is served, beside what it says itself. Event loop only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Scope

from millpond.http.errors import ApiError
from millpond.http.events import Usage
from millpond.http.openai.errors import error_response
from millpond.types import PrefixReport

KEY = "millpond.request"


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """What is needed to judge a generation and to run it again."""

    id: str
    stream: bool
    choices: int
    seed: int
    usage: Usage
    prefix: PrefixReport
    differs: str
    """The part of the request with which its prompt leaves all that the prefix cache knows."""
    first_seconds: float | None
    """To the first token of any choice."""

    def log_fields(self) -> dict[str, object]:
        return {
            "completion": self.id,
            "stream": self.stream,
            "choices": self.choices,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "cached_disk": self.prefix.disk,
            "known_tokens": self.prefix.known,
            "cache_end": self.prefix.end,
            "differs": self.differs or None,
            "completion_tokens": self.usage.completion_tokens,
            "accepted_draft_tokens": self.usage.accepted_tokens,
            "rejected_draft_tokens": self.usage.rejected_tokens,
            "ttft": round(self.first_seconds, 4) if self.first_seconds is not None else None,
            "seed": self.seed,
        }


@dataclass(slots=True)
class RequestContext:
    """Filled in on the way in (`connection`, `access`, `gate`) and by whoever answers; read for the log line."""

    id: str = ""
    connections: int = 0
    """How many were open when it came, its own included."""
    owner: str = ""
    """Of the API key that it showed; empty without keys."""
    tenant: str = ""
    """The owner if his cached prefixes are kept apart from those of others; empty: nobody's are."""
    refused: str | None = None
    """The code of the gate's refusal."""
    error: ApiError | None = None
    """What it was answered with. It holds what was wrong, and is let go once it has been counted."""
    render_error: Callable[[ApiError], Response] = error_response
    """In the shape of the API that was asked; OpenAI's where there is none."""
    left: str | None = None
    """How the client went before the end: gone, stalled or cut off."""
    generation: GenerationRecord | None = None

    def refuse(self, error: ApiError) -> Response:
        """What to answer instead, noted."""
        self.error = error
        return self.render_error(error)

    def log_fields(self) -> dict[str, object]:
        """What the log line has beside the request's head, its status and its time."""
        fields: dict[str, object] = {"owner": self.owner or None, "refused": self.refused, "client": self.left}
        return fields if self.generation is None else fields | self.generation.log_fields()


def context_of(scope: Scope) -> RequestContext:
    """That of the request; made when it is first asked for."""
    context: RequestContext = scope.setdefault(KEY, RequestContext())
    return context
