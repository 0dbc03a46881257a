"""Which request has which row of the running batch, and how many tokens it holds: the one place that says so.

Rows are 0..n-1 without gaps, so that a forward reads a prefix of each array: where a row is freed, the last one moves
in. Whoever keeps something per row (arrays, draft tokens) asks here for its place. Plain data, no arrays. Engine thread
only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


class Batch:
    """Names of requests and lengths, in row order."""

    def __init__(self, end: Callable[[int], int] = lambda length: length) -> None:
        """``end``: of a row's length, how many tokens are in what is kept for good; see KvFormat."""
        self._names: list[str] = []
        self._lengths: list[int] = []
        self._settled: list[int] = []
        self._end = end

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def names(self) -> tuple[str, ...]:
        """Who has a row, in row order."""
        return tuple(self._names)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens in each row."""
        return self._lengths

    @property
    def ends(self) -> Sequence[int]:
        """Tokens in each row that a forward puts into what is kept for good, if they are not there."""
        return [self._end(length) for length in self._lengths]

    @property
    def settled(self) -> Sequence[int]:
        """Tokens in each row that are there."""
        return list(self._settled)

    def row(self, name: str) -> int:
        """A request's row. Raises ValueError when it has none."""
        return self._names.index(name)

    def join(self, name: str, length: int) -> int:
        """Give a request the next row; returns it. Raises ValueError when it has one."""
        if name in self:
            raise ValueError(f"request {name!r} has row {self.row(name)} already")
        self._names.append(name)
        self._lengths.append(length)
        self._settled.append(self._end(length))
        return len(self) - 1

    def leave(self, name: str) -> tuple[int, int]:
        """Free a request's row. Returns it, and the row that moves there: the same one if it was the last. Raises
        ValueError when it has none."""
        row, last = self.row(name), len(self) - 1
        self._names[row] = self._names[last]
        self._lengths[row] = self._lengths[last]
        self._settled[row] = self._settled[last]
        del self._names[last], self._lengths[last], self._settled[last]
        return row, last

    def departures(self, leaving: Collection[str]) -> list[str]:
        """All of ``leaving``, those without a row first, in an order in which nobody is moved who leaves, too, and
        nobody twice."""
        names = list(self._names)
        order = [name for name in leaving if name not in self]
        row = 0
        while len(order) < len(leaving):
            if names[-1] in leaving:
                order.append(names.pop())
            elif names[row] in leaving:
                order.append(names[row])
                names[row] = names.pop()
            else:
                row += 1
        return order

    def advance(self, counts: Sequence[int]) -> None:
        """A forward has been built, and row i holds ``counts[i]`` tokens more."""
        self._settled = list(self.ends)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def rewind(self, counts: Sequence[int]) -> None:
        """Row i holds ``counts[i]`` tokens less. Raises ValueError when it has not as many."""
        if any(not 0 <= count <= length for length, count in zip(self._lengths, counts, strict=True)):
            raise ValueError(f"rows of {self._lengths} tokens cannot go back by {list(counts)}")
        self._lengths = [length - count for length, count in zip(self._lengths, counts, strict=True)]
        self._settled = [min(settled, end) for settled, end in zip(self._settled, self.ends, strict=True)]
