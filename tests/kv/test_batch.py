"""Who has which row, beside a dict that follows each row as its data is moved."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from millpond.kv.batch import Batch

NAMES = st.sampled_from("abcdefgh")
COUNTS = st.lists(st.integers(0, 9), min_size=8, max_size=8)


def end(length: int) -> int:
    """Of so many tokens, those in whole eights."""
    return length // 8 * 8


class BatchMachine(RuleBasedStateMachine):
    """``data`` is what somebody keeps per row: the name and the length of whom it belongs to, and how many of its
    tokens a forward has put into whole eights."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = Batch(end)
        self.data: dict[int, tuple[str, int, int]] = {}

    @rule(name=NAMES, length=st.integers(0, 99))
    def join(self, name: str, length: int) -> None:
        if name in self.batch:
            with pytest.raises(ValueError, match="already"):
                self.batch.join(name, length)
        else:
            self.data[self.batch.join(name, length)] = name, length, end(length)

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        if name not in self.batch:
            with pytest.raises(ValueError, match="not in list"):
                self.batch.leave(name)
            return
        row, moved = self.batch.leave(name)
        assert self.data[row][0] == name
        self.data[row] = self.data[moved]
        del self.data[moved]

    @rule(leaving=st.sets(NAMES))
    def leave_together(self, leaving: set[str]) -> None:
        order = self.batch.departures(leaving)
        assert sorted(order) == sorted(leaving)
        moved: list[str] = []
        for name in order:
            if name in self.batch:
                _, last = self.batch.leave(name)
                owner = self.data.pop(last)
                if owner[0] != name:
                    moved.append(owner[0])
                    row = self.batch.row(owner[0])
                    self.data[row] = owner
        assert len(set(moved)) == len(moved)
        assert not leaving & set(moved)

    @rule(counts=COUNTS)
    def advance(self, counts: list[int]) -> None:
        before = self.batch.lengths
        told = list(before)
        self.batch.advance(counts[: len(self.batch)])
        assert list(before) == told, "whoever has asked for them keeps what they were"
        self.data = {row: (name, length + counts[row], end(length)) for row, (name, length, _) in self.data.items()}

    @rule(counts=COUNTS)
    @precondition(lambda self: len(self.batch))
    def rewind(self, counts: list[int]) -> None:
        counts = counts[: len(self.batch)]
        if any(length < counts[row] for row, (_, length, _) in self.data.items()):
            with pytest.raises(ValueError, match="cannot go back"):
                self.batch.rewind(counts)
        else:
            self.batch.rewind(counts)
            self.data = {
                row: (name, length - counts[row], min(settled, end(length - counts[row])))
                for row, (name, length, settled) in self.data.items()
            }

    @invariant()
    def everybody_is_where_their_data_is(self) -> None:
        assert sorted(self.data) == list(range(len(self.batch)))
        rows = [self.data[row] for row in range(len(self.batch))]
        assert rows == list(zip(self.batch.names, self.batch.lengths, self.batch.settled, strict=True))
        assert list(self.batch.ends) == [end(length) for length in self.batch.lengths]
        assert all(self.batch.row(name) == row for row, (name, _, _) in self.data.items())


def test_everybody_is_where_their_data_is() -> None:
    run_state_machine_as_test(BatchMachine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))
