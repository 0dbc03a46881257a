"""How deep a schema goes with its references followed: llguidance follows them by calls within calls, and the end of a
thread's stack is the end of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

MOST_LEVELS = 400
"""Objects and lists on the longest way through a schema. One takes some 4 KB of stack."""
MOST_VISITED = 200_000
"""Objects and lists that are looked at, for each reference anew."""
STACK = 64 << 20
"""Bytes, of which only those that are used take memory."""


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads that are started within may check and compile grammars."""
    usual = threading.stack_size(STACK)
    try:
        yield
    finally:
        threading.stack_size(usual)


@dataclass
class _Definition:
    """The whole schema, or what something refers to."""

    levels: int = 0
    """Its own."""
    refers: set[str] = field(default_factory=set)


class TooManyError(Exception):
    """More than anybody will look at."""


def levels_of(schema: Mapping[str, object]) -> int:
    """On the longest way through it. Parts that refer to each other in a circle count as if one held the other, once
    each. Raises TooManyError."""
    parts = _parts(schema)
    longest: dict[str, int] = {}
    for circle in _circles({name: part.refers for name, part in parts.items()}):
        below = (longest[other] for name in circle for other in parts[name].refers - circle)
        levels = sum(parts[name].levels for name in circle) + max(below, default=0)
        longest |= dict.fromkeys(circle, levels)
    return longest["#"]


def target_of(root: Mapping[str, object], reference: str) -> Mapping[str, object] | None:
    """What ``#/a/b`` refers to; None where that is no schema of this document's."""
    if not reference.startswith("#"):
        return None
    here: object = root
    for step in filter(None, reference[1:].split("/")):
        step = step.replace("~1", "/").replace("~0", "~")
        here = here.get(step) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else None


def _parts(schema: Mapping[str, object]) -> dict[str, _Definition]:
    """By reference, the whole one as ``#``."""
    found: dict[str, _Definition] = {}
    wanted, visited = ["#"], 0
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        part = found[name] = _Definition()
        level: list[object] = [target_of(schema, name)]
        while level:
            visited += len(level)
            if visited > MOST_VISITED:
                raise TooManyError
            part.levels += 1
            inner: list[object] = []
            for each in level:
                if isinstance(each, Mapping):
                    reference = each.get("$ref")
                    if isinstance(reference, str) and target_of(schema, reference) is not None:
                        part.refers.add(reference)
                    inner += each.values()
                elif isinstance(each, list):
                    inner += each
            level = [each for each in inner if isinstance(each, Mapping | list)]
        wanted += part.refers
    return found


def _circles(graph: Mapping[str, set[str]]) -> Iterator[set[str]]:
    """Strongly connected components, those first that refer to no other (Tarjan's algorithm, without recursion)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    done: set[str] = set()
    for start in graph:
        if start in numbers:
            continue
        path = [(start, iter(graph[start]))]
        numbers[start] = lowest[start] = len(numbers)
        open_.append(start)
        while path:
            node, others = path[-1]
            for other in others:
                if other not in numbers:
                    numbers[other] = lowest[other] = len(numbers)
                    open_.append(other)
                    path.append((other, iter(graph[other])))
                    break
                if other not in done:
                    lowest[node] = min(lowest[node], numbers[other])
            else:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == numbers[node]:
                    cut = open_.index(node)
                    circle = set(open_[cut:])
                    del open_[cut:]
                    done |= circle
                    yield circle
