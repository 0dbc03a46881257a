"""Stop strings found in a text that arrives in pieces.

Of all occurrences of all stop strings the one that starts earliest counts; of two that start together, the shorter.
Everything before it is the answer. The result depends on the text alone, never on how it was cut into pieces, and at
most ``longest - 1`` characters are withheld at any time: the longest end of the text that may still become a match.
The matcher is one automaton over all stop strings (Aho-Corasick), so time is linear in the text, whatever the stops.

The automaton never changes after it was made: all answers of a request share one, from any thread. One matcher belongs
to one answer and one thread.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Iterator, Sequence


class StopStrings:
    """A trie of the stop strings with failure links. A state stands for the string on the path from the root (0).

    A stop string adds its states one after the other, so that nearly every state's one child is the state behind it;
    only where a stop string leaves the path of another there is an entry in a dictionary. That makes about twenty
    bytes per character. Raises ValueError when a stop string is empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.fail = array("l", [0])
        self.depth = array("l", [0])
        self.match = array("l", [0])
        """Length of the longest stop string that ends in this state; 0: none does."""
        self._sample = array("l", [0])
        """Number of a stop string that begins with the state's string."""
        self._behind = bytearray(1)
        """1 where a state is a child of the one before it."""
        self._branches: dict[tuple[int, str], int] = {}
        """The other children."""
        for number, stop in enumerate(self.stops):
            if not stop:
                raise ValueError(f"stop[{number}] is empty; a stop string needs at least one character")
            self._insert(number, stop)
        self._link()
        # Outside a partial match only a first character of some stop string matters: a compiled search skips the rest.
        firsts = "".join(re.escape(stop[0]) for stop in self.stops)
        self.first = re.compile(f"[{firsts}]") if firsts else None

    def string(self, state: int) -> str:
        """What a state stands for."""
        return self.stops[self._sample[state]][: self.depth[state]] if state else ""

    def step(self, state: int, char: str) -> int:
        """The state after one more character: the longest end of the text that begins some stop string."""
        while (following := self._child(state, char)) is None and state:
            state = self.fail[state]
        return following or 0

    def _child(self, state: int, char: str) -> int | None:
        if self._has_behind(state) and self._char(state + 1) == char:
            return state + 1
        return self._branches.get((state, char))

    def _has_behind(self, state: int) -> bool:
        return state + 1 < len(self._behind) and self._behind[state + 1] == 1

    def _char(self, state: int) -> str:
        return self.stops[self._sample[state]][self.depth[state] - 1]

    def _insert(self, number: int, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, start=1):
            following = self._child(state, char)
            if following is None:
                following = len(self.depth)
                self._behind.append(following == state + 1)
                if following != state + 1:
                    self._branches[state, char] = following
                for values, value in ((self.fail, 0), (self.depth, depth), (self.match, 0), (self._sample, number)):
                    values.append(value)
            state = following
        self.match[state] = len(stop)

    def _children(self, branches: dict[int, list[int]], state: int) -> Iterator[int]:
        if self._has_behind(state):
            yield state + 1
        yield from branches.get(state, ())

    def _link(self) -> None:
        branches: dict[int, list[int]] = {}
        for (state, _), following in self._branches.items():
            branches.setdefault(state, []).append(following)
        queue = deque(self._children(branches, 0))
        while queue:
            state = queue.popleft()
            self.match[state] = self.match[state] or self.match[self.fail[state]]
            for following in self._children(branches, state):
                self.fail[following] = self.step(self.fail[state], self._char(following))
                queue.append(following)


class StopMatcher:
    """Cuts one answer's text at its first stop string."""

    def __init__(self, stops: StopStrings) -> None:
        self._automaton = stops
        self._state = 0
        self._seen = 0
        self._emitted = 0
        self._found: int | None = None
        self._stopped = False
        self.matched = ""
        """The stop string that has been found, or may yet lose to a longer one that began before it."""

    @property
    def stopped(self) -> bool:
        """True once a stop string has been found; no text follows."""
        return self._stopped

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is certain now and whether a stop string has ended the answer.

        After a stop everything further is ignored.
        """
        if self._stopped:
            return "", True
        if self._automaton.first is None:
            return text, False
        held = self._held()
        start = self._seen
        self._advance(text)
        return self._release(held, text[: self._seen - start]), self._stopped

    def finish(self) -> str:
        """End of the text: return what was held back, up to the stop string if a match was still in the balance."""
        if self._stopped:
            return ""
        held = self._held()
        if self._found is not None:
            held = held[: self._found - self._emitted]
            self._stopped = True
        self._state = 0
        self._emitted += len(held)
        return held

    def _held(self) -> str:
        """What has been fed and not emitted: always the string of the current state."""
        return self._automaton.string(self._state)

    def _advance(self, text: str) -> None:
        """Run the automaton over the text, up to the character that settles a match if there is one."""
        assert self._automaton.first is not None
        automaton, state, base = self._automaton, self._state, self._seen
        index = 0
        while index < len(text):
            if not state:
                hit = self._automaton.first.search(text, index)
                if hit is None:
                    index = len(text)
                    break
                index = hit.start()
            state = automaton.step(state, text[index])
            index += 1
            if automaton.match[state]:
                start = base + index - automaton.match[state]
                if self._found is None or start < self._found:
                    self._found, self.matched = start, automaton.string(state)[-automaton.match[state] :]
            # A longer stop string that began before the match may still complete and would then win.
            if self._found is not None and base + index - automaton.depth[state] >= self._found:
                self._stopped = True
                break
        self._state = state
        self._seen = base + index

    def _release(self, held: str, text: str) -> str:
        """Emit from the held text and the new one all that can no longer be part of a match."""
        if self._stopped and self._found is not None:
            upto = self._found
        else:
            upto = self._seen - self._automaton.depth[self._state]
        count = upto - self._emitted
        self._emitted = upto
        return held[:count] + text[: max(0, count - len(held))]
