"""How deep a schema goes with its references followed: llguidance follows them by calls within calls, and the end of a
thread's stack is the end of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

MOST_LEVELS = 400
"""Objects and lists on the longest way through a schema. One takes some 4 KB of stack."""
MOST_VISITED = 20_000
"""Values of a schema, those of a definition once more where it is referred to. In places llguidance is
quadratic in them."""
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
    refers: set[int] = field(default_factory=set)


class TooManyError(Exception):
    """More than anybody will look at."""


def levels_of(schema: Mapping[str, object]) -> int:
    """On the longest way through it. Parts that refer to each other in a circle count as if one held the other, once
    each. Raises TooManyError."""
    parts = _definitions(schema)
    longest: dict[int, int] = {}
    for circle in _circles({place: part.refers for place, part in parts.items()}):
        below = (longest[other] for place in circle for other in parts[place].refers - circle)
        levels = sum(parts[place].levels for place in circle) + max(below, default=0)
        longest |= dict.fromkeys(circle, levels)
    return longest[id(schema)]


def target_of(root: Mapping[str, object], reference: str) -> Mapping[str, object] | None:
    """What ``#`` or ``#/a/b`` refers to; None where that is no schema of this document's."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    here: object = root
    for step in reference.split("/")[1:]:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(here, list) and step.isascii() and step.isdecimal() and len(step) < 9:
            here = here[int(step)] if int(step) < len(here) else None
        else:
            here = here.get(step) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else None


def _definitions(schema: Mapping[str, object]) -> dict[int, _Definition]:
    """By place in memory, so that a part has one however it is referred to."""
    found: dict[int, _Definition] = {}
    wanted: list[Mapping[str, object]] = [schema]
    targets: dict[str, Mapping[str, object] | None] = {}
    visited = 0
    while wanted:
        start = wanted.pop()
        if id(start) in found:
            continue
        part = found[id(start)] = _Definition()
        level: list[object] = [start]
        while level:
            part.levels += 1
            inner: list[object] = []
            for each in level:
                if isinstance(each, dict):
                    reference = each.get("$ref")
                    if isinstance(reference, str):
                        if reference not in targets:
                            visited += reference.count("/")
                            targets[reference] = target_of(schema, reference)
                        if (target := targets[reference]) is not None:
                            part.refers.add(id(target))
                            wanted.append(target)
                    inner += each.values()
                elif isinstance(each, list):
                    inner += each
            visited += len(inner)
            if visited > MOST_VISITED:
                raise TooManyError
            level = [each for each in inner if isinstance(each, dict | list)]
    return found


def _circles(graph: Mapping[int, set[int]]) -> Iterator[set[int]]:
    """Strongly connected components, those first that refer to no other (Tarjan's algorithm, without recursion)."""
    numbers: dict[int, int] = {}
    lowest: dict[int, int] = {}
    open_: list[int] = []
    done: set[int] = set()
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
                    circle = {node}
                    while (last := open_.pop()) != node:
                        circle.add(last)
                    done |= circle
                    yield circle
