"""What an answer consists of, in the order in which it is written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Said:
    """More of what is said to the user."""

    text: str
    end: int = field(default=0, compare=False)
    """Characters of the answer up to its end, marks included: all of ``text`` stands directly before that."""


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what is thought."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool is called. Its arguments follow, and its end."""

    name: str
    id: str = ""
    """The model's own; empty where its family has none."""


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments of the call last begun: a part of a JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Of the call last begun. ``whole``: nothing of it is missing."""

    whole: bool = True


Piece = Said | Thought | CallBegun | CallText | CallEnded
