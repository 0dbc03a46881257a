"""How long work tells the user about itself: a line of text, or a bar that advances."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from tqdm import tqdm

Advance = Callable[[int], None]
"""Move a bar forward by so many units."""


class Progress(Protocol):
    """What a long task needs from whoever shows it."""

    @property
    def visible(self) -> bool:
        """False when nothing at all may be written to the terminal, also not by a child process."""

    def say(self, line: str) -> None:
        """Show one line."""

    def bar(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Show a bar of ``total`` units (``B`` for bytes) while the context is open."""


class TerminalProgress:
    """Lines and tqdm bars on standard error."""

    visible = True

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        with tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", file=sys.stderr, dynamic_ncols=True) as b:

            def advance(units: int) -> None:
                b.update(units)

            yield advance


class SilentProgress:
    """Shows nothing."""

    visible = False

    def say(self, line: str) -> None:
        del line

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        del label, total, unit

        def ignore(units: int) -> None:
            del units

        yield ignore
