"""How one family of models writes thoughts and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from millpond.dialects.call_grammar import Calls
from millpond.dialects.tagged_calls import Tools
from millpond.dialects.tape import Reading, Tape

Section = Callable[[Calls], str]
"""The grammar of what stands behind the mark with which calls begin, up to behind their end."""
CallReader = Callable[[Tape, Tools], Reading[None]]
"""Reads the calls behind the mark with which they begin. Raises NoCall where there are none."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Marks are texts; whether one is a token of its own is the tokenizer's affair."""

    name: str
    calls: Mapping[str, CallReader] = field(default_factory=dict)
    """By the mark with which they begin."""
    leading: CallReader | None = None
    """Reads an answer that may be nothing but calls, without a mark before them."""
    section: Section | None = None
    """How calls are written, for those that begin with the first of those marks, or with none."""
    repeated: bool = False
    """A section has one call; others follow with the same mark."""
    thoughts: tuple[str, str] | None = None
    """The marks around them."""
    label: str = ""
    """What stands behind the one that begins them, and is none."""
    dropped: tuple[str, ...] = ()
    """Marks that say nothing to anybody."""
    messages: bool = False
    """Answers are messages of several channels, with headers."""
    inner: tuple[str, ...] = ()
    """Further marks that may be tokens of their own."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.calls, *(self.thoughts or ()), *self.dropped, *self.inner)

    @property
    def calls_tools(self) -> bool:
        """Whether its models call tools at all."""
        return bool(self.calls or self.leading or self.messages)
