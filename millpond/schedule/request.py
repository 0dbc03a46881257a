"""What the scheduler knows about one request. Engine thread only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SchedulerRequest:
    """A request that waits (``in_row`` false; ``done`` > 0 once its prefill has started) or holds a row.

    ``cached``, ``wants``, ``held`` and ``stops`` are what the prefix cache offers it; see Scheduler.offer.

    All sizes are tokens. A request is adopted with ``prefill`` of its ``tokens`` computed; the last one goes through
    the first batched decode.
    """

    id: str
    tokens: int
    """Prompt, and after a requeue the answer so far as well."""
    total: int
    """Most it can ever reach: prompt + max_tokens."""
    priority: int
    client: str
    """Whose request this is."""
    arrival: float
    """Seconds; survives a requeue."""
    number: int
    """Order of arrival, decides ties."""
    prompt: int
    """Tokens that the client sent."""
    whole: bool = False
    """It is promised room for its whole answer when it begins."""
    done: int = 0
    """Tokens in its own prefill cache."""
    in_row: bool = False
    length: int = 0
    """Tokens in its row."""
    preempted: int = 0
    """How often memory pressure has taken its row or its prefill."""
    probation: bool = False
    apart: bool = False
    """Its prompt is never read in one forward with others."""
    cached: int = 0
    wants: bytes | None = None
    held: bool = False
    stops: tuple[int, ...] = ()

    @property
    def prefill(self) -> int:
        return self.tokens - 1

    @property
    def computed(self) -> int:
        """Tokens it need not compute: what it has, or what its restore will give it."""
        return self.done or self.cached

    @property
    def started(self) -> bool:
        return self.done > 0 and not self.in_row

    @property
    def holds(self) -> bool:
        """Whether it holds memory: a row or a started prefill."""
        return self.in_row or self.done > 0

    @property
    def need(self) -> int:
        """Positions its row has to offer in the step in which it decodes next."""
        return self.length + 1 if self.in_row else self.tokens

    @property
    def promised(self) -> int:
        """Positions for which there has to be room from now on."""
        return self.total if self.whole else self.need

    def back_to_waiting(self, tokens: int) -> None:
        """Forget everything computed; ``tokens`` have to be computed again."""
        self.tokens, self.done, self.length, self.in_row = tokens, 0, 0, False
        self.cached, self.wants, self.held, self.stops = 0, None, False, ()
