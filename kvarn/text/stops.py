"""Stop strings found in a text that arrives in pieces.

Of all occurrences of all stop strings the one that starts earliest counts; of two that start together, the shorter.
Everything before it is the answer. The result depends on the text alone, never on how it was cut into pieces, and at
most ``longest - 1`` characters are withheld at any time: the longest end of the text that may still become a match.
The matcher is one automaton over all stop strings (Aho-Corasick), so time is linear in the text, whatever the stops.

One matcher belongs to one request and one thread.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class _Automaton:
    """A trie of the stop strings with failure links. A state stands for the string on the path from the root (0)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.fail: list[int] = [0]
        self.depth: list[int] = [0]
        self.match: list[int] = [0]
        """Length of the longest stop string that ends in this state; 0: none does."""
        self.sample: list[str] = [""]
        """A stop string that begins with the state's string."""
        for stop in stops:
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, start=1):
            following = self.next[state].get(char)
            if following is None:
                following = len(self.next)
                self.next[state][char] = following
                self.next.append({})
                self.fail.append(0)
                self.depth.append(depth)
                self.match.append(0)
                self.sample.append(stop)
            state = following
        self.match[state] = len(stop)

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            self.match[state] = self.match[state] or self.match[self.fail[state]]
            for char, following in self.next[state].items():
                self.fail[following] = self.step(self.fail[state], char)
                queue.append(following)

    def step(self, state: int, char: str) -> int:
        """The state after one more character: the longest end of the text that begins some stop string."""
        while state and char not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(char, 0)


class StopMatcher:
    """Cuts one answer's text at its first stop string.

    Raises ValueError when a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for index, stop in enumerate(stops):
            if not stop:
                raise ValueError(f"stop[{index}] is empty; a stop string needs at least one character")
        self._automaton = _Automaton(stops)
        # Outside a partial match only a first character of some stop string matters: a compiled search skips the rest.
        self._first = re.compile("[" + "".join(re.escape(s[0]) for s in stops) + "]") if stops else None
        self._state = 0
        self._seen = 0
        self._emitted = 0
        self._found: int | None = None
        self._stopped = False

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
        if self._first is None:
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
        return self._automaton.sample[self._state][: self._automaton.depth[self._state]]

    def _advance(self, text: str) -> None:
        """Run the automaton over the text, up to the character that settles a match if there is one."""
        assert self._first is not None
        automaton, state, base = self._automaton, self._state, self._seen
        index = 0
        while index < len(text):
            if not state:
                hit = self._first.search(text, index)
                if hit is None:
                    index = len(text)
                    break
                index = hit.start()
            state = automaton.step(state, text[index])
            index += 1
            if automaton.match[state]:
                start = base + index - automaton.match[state]
                self._found = start if self._found is None else min(self._found, start)
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
