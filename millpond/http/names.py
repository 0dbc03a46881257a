"""What a model is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelNames:
    """The name shown to clients, and every name they may use."""

    served: str
    aliases: frozenset[str]

    @classmethod
    def of(cls, shown: str, given: str, name: str, path: Path) -> ModelNames:
        """``shown`` is the name chosen for it, if one was; ``given`` is what the command was given, ``name`` how that
        is called, ``path`` where it lies."""
        return cls(shown or name, frozenset({given, name, path.name}))

    def __contains__(self, asked: str) -> bool:
        return asked == self.served or asked in self.aliases
