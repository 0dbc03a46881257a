"""One request inside the engine: its committed tokens, its prompt cache while it is being read, its one ending."""

from __future__ import annotations

from dataclasses import dataclass, field

from millpond.model.prompt import Prompt
from millpond.prefix.visit import Visit
from millpond.sample.state import SamplingState
from millpond.types import Finish, PrefixReport, Request


@dataclass
class Sequence:
    """``tokens`` is the truth for cache, text, usage and stream: prompt and every token drawn so far."""

    request: Request
    sampling: SamplingState
    """What decides its draws; has taken the answer's tokens."""
    tokens: list[int] = field(default_factory=list)
    prompt: Prompt | None = None
    """Filled chunk by chunk; given away at adoption."""
    visit: Visit | None = None
    """Its dealings with the prefix cache; None where there is none."""
    report: PrefixReport | None = None
    """What the cache did for its prompt, once it is known."""
    begun: bool = False
    """Whether the client knows it, and with it that its prompt has been begun."""
    told: bool = False
    """Whether the client has had a first token."""
    snapshot_at: int = 0
    """Where the last snapshot of recurrent layers was taken or restored."""
    branch: int = 0
    """Where this prompt left what was known (models with recurrent layers): a snapshot there serves the next such."""
    stop_token: int | None = None
    """The drawn token that ended the answer; it is not part of ``tokens``."""
    ended: bool = False
    """Its ending has been told to the client. What it still holds is freed at the next quiet point."""
    spoilt: bool = False
    """A step with draft tokens left what is not finite in its row; it is computed again, without drafts."""
    again: bool = False
    """That has happened before."""
    fault: Exception | None = None
    """Why its own part of a step could not be made: it drew something instead, which nobody may have."""
    poisoned: bool = False
    """Its row holds non-finite numbers and must be zeroed when freed."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    @property
    def dirty(self) -> bool:
        """Whether its row must be zeroed when it is freed."""
        return self.poisoned or self.spoilt

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.request.params.max_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def processed(self) -> list[int]:
        """Every token that may be in its row: a step may already have read the one that ended the answer."""
        return self.tokens if self.stop_token is None else [*self.tokens, self.stop_token]

    def commit(self, token: int) -> tuple[bool, Finish | None]:
        """Take a drawn token. Returns (whether the client gets it, why the answer ends here or None)."""
        if token in self.request.params.stop_token_ids:
            self.stop_token = token
            return False, Finish.STOP
        self.tokens.append(token)
        self.sampling.take(token)
        return True, Finish.LENGTH if self.remaining == 0 else None
