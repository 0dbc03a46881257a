"""One request inside the engine: its committed tokens, its prompt cache while it is being read, its one ending."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvarn.model.upstream import PromptCache
from kvarn.types import Finish, Request


@dataclass
class Sequence:
    """``tokens`` is the truth for cache, text, usage and stream: prompt and every token drawn so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    cache: PromptCache | None = None
    """Filled chunk by chunk; given away at adoption."""
    ended: bool = False
    """Its ending has been told to the client. What it still holds is freed at the next quiet point."""
    poisoned: bool = False
    """Its row holds non-finite numbers and must be zeroed when freed."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.request.params.max_tokens - (len(self.tokens) - self.prompt_length)

    def commit(self, token: int) -> tuple[bool, Finish | None]:
        """Take a drawn token. Returns (whether the client gets it, why the answer ends here or None)."""
        if token in self.request.params.stop_token_ids:
            return False, Finish.STOP
        self.tokens.append(token)
        return True, Finish.LENGTH if self.remaining == 0 else None
