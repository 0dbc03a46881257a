"""One request inside the engine: its committed tokens, where it stands, how sound its row is. Engine thread only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from millpond.model.pooling import Pooled
from millpond.model.prompt import Prompt
from millpond.prefix.query import PrefixQuery
from millpond.sample.state import SamplingState
from millpond.types import Finish, PrefixReport, Request, TokenLogprob


class Status(Enum):
    """Where a request stands. Each goes on to the next; what is computed may be lost on the way, and then it waits
    again. Any of them may end, and stays ended; what it still holds is freed at the next quiet point."""

    WAITING = auto()
    """Nothing of it is computed."""
    READING = auto()
    """Its prompt has caches of its own."""
    DECODING = auto()
    """It has a row."""
    ENDED = auto()
    """The client has been told its ending."""


class Health(Enum):
    """What is known of the numbers in a request's row."""

    SOUND = auto()
    SPOILT = auto()
    """A step with draft tokens has left some that are not finite: it loses the row and is computed again without."""
    RECOMPUTED = auto()
    """It has lost a spoilt row. That happens once: whatever is not finite from now on is its own."""
    POISONED = auto()
    """They are not finite, and draft tokens are not to blame: nothing of it may be kept, nobody may have its answer."""


@dataclass
class Sequence:
    """``tokens`` is the truth for cache, text, usage and stream: prompt and every token drawn so far."""

    request: Request
    sampling: SamplingState
    """What decides its draws; has taken the answer's tokens."""
    tokens: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    health: Health = Health.SOUND
    prompt: Prompt | None = None
    """Filled chunk by chunk while it is READING."""
    query: PrefixQuery | None = None
    """Its dealings with the prefix cache; None where there is none."""
    report: PrefixReport | None = None
    """What the cache did for its prompt, once it has been begun for the first time."""
    snapshot_at: int = 0
    """Where the last snapshot of recurrent layers was taken or restored."""
    stops: tuple[int, ...] = ()
    """Where snapshots of recurrent layers are taken in any case: this prompt left there what was known, and so may the
    next one, or its client has said that others will."""
    stop_token: int | None = None
    """The drawn token that ended the answer; it is not part of ``tokens``."""
    scored: int = 0
    """Tokens of the prompt whose successors have their log-probabilities, where they are asked for."""
    scores: list[TokenLogprob] = field(default_factory=list)
    """Those of which the client has yet to be told."""
    pooled: Pooled | None = None
    """What has been read for its vector, where that is all that is asked."""
    fault: Exception | None = None
    """Why its own part of a step could not be made: it drew something instead, which nobody may have."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    # --- where it stands --------------------------------------------------------------------------------------

    def read_into(self, prompt: Prompt) -> None:
        """Its prompt is being read from now on, into these caches."""
        assert self.status is Status.WAITING, self.status
        self.status, self.prompt = Status.READING, prompt

    def joined(self) -> None:
        """Its prompt has been read and is a row now."""
        assert self.status is Status.READING, self.status
        self.status, self.prompt = Status.DECODING, None

    def back_to_waiting(self) -> None:
        """What was computed of it is lost; it begins again with all its tokens, unless it has ended."""
        self.prompt, self.snapshot_at, self.stops = None, 0, ()
        if self.pooled is not None:
            self.pooled.reset()
        if self.health is Health.SPOILT:
            self.health = Health.RECOMPUTED
        if self.status is not Status.ENDED:
            self.status = Status.WAITING

    def end(self) -> None:
        """The client has been told its ending."""
        assert self.status is not Status.ENDED, "a request ends once"
        self.status = Status.ENDED

    # --- its row's health -------------------------------------------------------------------------------------

    def not_finite(self, *, guessed: bool) -> None:
        """A step has left numbers that are not finite in its row. In one with draft tokens (``guessed``) those may be
        to blame, and so may the padding of rows that have fewer."""
        self.health = Health.SPOILT if guessed and self.health is Health.SOUND else Health.POISONED

    @property
    def poisoned(self) -> bool:
        """Whether nothing of it may be kept."""
        return self.health is Health.POISONED

    @property
    def dirty(self) -> bool:
        """Whether its row must be zeroed when it is freed."""
        return self.health is Health.POISONED or self.health is Health.SPOILT

    # --- its tokens -------------------------------------------------------------------------------------------

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def scoring(self) -> bool:
        """Whether its client asks what the model thinks of the prompt."""
        return self.request.params.prompt_logprobs is not None

    @property
    def apart(self) -> bool:
        """Whether all of its prompt is read, by itself: without the prefix cache, and not for it."""
        return self.scoring or self.pooled is not None

    @property
    def answered(self) -> bool:
        """Whether the client has had a first token."""
        return len(self.tokens) > self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.request.params.max_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def processed(self) -> list[int]:
        """Every token that may be in its row: a step may already have read the one that ended the answer."""
        return self.tokens if self.stop_token is None else [*self.tokens, self.stop_token]

    def commit(self, token: int) -> tuple[bool, Finish | None]:
        """Take a drawn token. Returns (whether the client gets it, why the answer ends here or None). Raises DeadEnd
        where it cannot be part of the answer."""
        self.sampling.check(token)
        if token in self.request.params.stop_token_ids:
            self.stop_token = token
            return False, Finish.STOP
        self.sampling.take(token)
        self.tokens.append(token)
        if self.sampling.complete:
            return True, Finish.STOP
        return True, Finish.LENGTH if self.remaining == 0 else None
