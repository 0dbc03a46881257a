"""What a generation tells while it runs, whichever API is to be answered: deltas in order, then the usage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from millpond.dialects.pieces import Piece, Said
from millpond.types import Finish, TokenLogprob

MOST_LOGPROBS = 32
"""Tokens whose log-probabilities are rendered at a time: what a stop string held back may come all at once."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one engine step added to one choice. There may be no ``pieces``; ``finish`` ends the choice."""

    choice: int
    pieces: tuple[Piece, ...]
    logprobs: list[TokenLogprob]
    finish: Finish | None
    stopped_by: str = ""
    """The stop string that has ended it."""
    scored: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's next tokens, where that is asked; before anything of the answer. The first token has no
    log-probability: NaN."""

    @property
    def text(self) -> str:
        """What is said."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Said))

    @property
    def silent(self) -> bool:
        """There is nothing to show."""
        return not (self.pieces or self.logprobs or self.finish or self.scored)

    def parts(self) -> Iterator[ChoiceDelta]:
        """The same in so many that each is little work: the pieces go with the first, the end with the last."""
        rest = self
        while len(rest.scored) > MOST_LOGPROBS:
            yield replace(self, scored=rest.scored[:MOST_LOGPROBS])
            rest = replace(rest, scored=rest.scored[MOST_LOGPROBS:])
        while len(rest.logprobs) > MOST_LOGPROBS:
            yield replace(rest, logprobs=rest.logprobs[:MOST_LOGPROBS], finish=None, stopped_by="")
            rest = replace(rest, pieces=(), logprobs=rest.logprobs[MOST_LOGPROBS:])
        yield rest


Delta = ChoiceDelta


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one HTTP request; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    accepted_tokens: int = 0
    """Those of the answers that had been guessed ahead."""
    rejected_tokens: int = 0
    """Those guessed ahead in vain."""
    thought_tokens: int = 0
    """Those of the answers that are thoughts."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt of a choice is being read, of whose tokens so many were cached."""

    choice: int
    prompt_tokens: int
    cached_tokens: int


Event = Begun | Delta | Usage
"""A choice's beginning comes before its deltas, and the usage last."""
