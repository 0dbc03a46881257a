"""Whether one more request may take memory and a row, and who has to give theirs up. Pure, engine thread.

What is promised to a holder (a row, or a started prefill) is the arena with every holder in a row plus every prefill
cache at its full length. While that promise stays within the limit, any started prefill can be finished and adopted.
"""

from __future__ import annotations

from collections.abc import Iterable

from millpond.memory.budget import MemoryBudget, capacity_bucket
from millpond.schedule.request import SchedulerRequest


class MemoryReservation:
    """The memory promised to a set of requests; adding one is O(1)."""

    def __init__(self, budget: MemoryBudget, holders: Iterable[SchedulerRequest] = ()) -> None:
        self._budget = budget
        self.count = 0
        self._need = self._promised = self._total = self._preempted = self._prefill_bytes = 0
        for request in holders:
            self.add(request)

    def add(self, request: SchedulerRequest) -> None:
        self.count += 1
        self._need = max(self._need, request.need)
        self._promised = max(self._promised, request.promised)
        self._total = max(self._total, request.total)
        self._preempted = max(self._preempted, request.preempted)
        if not request.in_row:
            self._prefill_bytes += self._budget.prefill_bytes(request.prefill)

    @property
    def promised_bytes(self) -> int:
        """What the holders may come to hold in the coming step, every row one token longer."""
        return self._budget.arena_bytes(self.count, self._need) + self._prefill_bytes

    @property
    def fits(self) -> bool:
        """Whether the coming step keeps the promise."""
        return self.promised_bytes <= self._budget.limit_bytes

    @property
    def columns_left(self) -> int:
        """Tokens per row that the coming step can take in without longer arrays."""
        return capacity_bucket(self._need) - self._need + 1

    def has_room_for(self, request: SchedulerRequest, grid: int) -> bool:
        """Whether ``request`` may join. Alone it always may: Scheduler.add refused what does not fit alone.

        Beside others it needs room to grow, four times as much after each preemption, so that a request is
        preempted and recomputed a few times at most and not at every growth of its neighbours.
        """
        if self.count == 0:
            return True
        preempted = max(self._preempted, request.preempted)
        room = grid * 4 ** min(preempted, 16)
        need = max(self._promised, request.promised)
        longest = max(need, min(max(self._total, request.total), need + room))
        arena = self._budget.arena_bytes(self.count + 1, longest)
        prefill = self._prefill_bytes + self._budget.prefill_bytes(request.prefill)
        return arena + prefill <= self._budget.limit_bytes


def choose_victims(budget: MemoryBudget, holders: list[SchedulerRequest]) -> list[SchedulerRequest]:
    """Who must give up a row or a started prefill so that the coming step fits: lowest priority, then youngest first.

    The last row is never chosen, nor the last holder.
    """
    victims: list[SchedulerRequest] = []
    left = list(holders)
    while len(left) > 1 and not MemoryReservation(budget, left).fits:
        only_row = sum(request.in_row for request in left) == 1
        pool = [request for request in left if not (only_row and request.in_row)]
        victim = min(pool, key=lambda request: (request.priority, -request.arrival, -request.number))
        left.remove(victim)
        victims.append(victim)
    return victims
