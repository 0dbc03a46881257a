"""What a generation tells while it runs, whichever API is to be answered: deltas in order, then the usage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from millpond.types import Finish, TokenLogprob

MOST_LOGPROBS = 32
"""Tokens whose log-probabilities are rendered at a time: what a stop string held back may come all at once."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one engine step added to the text of one choice. ``text`` may be empty; ``finish`` ends the choice."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: Finish | None

    @property
    def silent(self) -> bool:
        """There is nothing to show."""
        return not (self.text or self.logprobs or self.finish)

    def parts(self) -> Iterator[TextDelta]:
        """The same in so many that each is little work: the text goes with the first, the end with the last."""
        rest = self
        while len(rest.logprobs) > MOST_LOGPROBS:
            yield replace(rest, logprobs=rest.logprobs[:MOST_LOGPROBS], finish=None)
            rest = replace(rest, text="", logprobs=rest.logprobs[MOST_LOGPROBS:])
        yield rest


Delta = TextDelta
"""What is added to an answer. Reasoning and calls of tools belong here: a class for each, in a union."""


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


Event = Delta | Usage
"""The usage is the last."""
