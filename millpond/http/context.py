"""What is known of one HTTP request while it is served, beside what it says itself. Event loop only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from starlette.responses import Response
from starlette.types import Scope

from millpond.http.errors import ApiError
from millpond.http.openai.errors import error_response

KEY = "millpond.request"


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """What is needed to judge a generation and to run it again, by the names that it has in the log."""

    completion: str
    stream: bool
    choices: int
    prompt_tokens: int
    cached_tokens: int
    cached_disk: int
    known_tokens: int
    cache_end: str
    completion_tokens: int
    accepted_draft_tokens: int
    rejected_draft_tokens: int
    ttft: float | None
    """Seconds to the first token of any choice."""
    seed: int


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
        return fields if self.generation is None else fields | asdict(self.generation)


def context_of(scope: Scope) -> RequestContext:
    """That of the request; made when it is first asked for."""
    context: RequestContext = scope.setdefault(KEY, RequestContext())
    return context
