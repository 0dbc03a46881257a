"""What a tool's schema says of an argument, as far as it decides how raw text is to be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from millpond.dialects.json_values import escaped
from millpond.grammar.levels import target_of

_DEEP = 16
"""References and alternatives that are followed."""
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object"}
_SPELLED = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class Kinds:
    """Types that a value may have."""

    string: bool = True
    others: frozenset[str] = frozenset()
    """Names of other types that are allowed; without any that are and without ``string``, all are but strings."""
    any: bool = False
    """Nothing is said of it."""

    @property
    def text(self) -> bool:
        """It is a string whatever it says."""
        return self.string and not self.others and not self.any


def kinds_of(schema: Mapping[str, object], name: str) -> Kinds:
    """Of the argument ``name``. One that the schema does not know is a string."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if found is None:
        found = schema.get("additionalProperties")
    if not isinstance(found, Mapping):
        return Kinds()
    types = _types(found, schema, 0, set())
    if not types:
        return Kinds(any=True)
    return Kinds("string" in types, frozenset(types - {"string"}))


def flat(
    schema: Mapping[str, object], root: Mapping[str, object], work: Callable[[int], None] = lambda _: None
) -> Mapping[str, object]:
    """With what it refers to and what all of its parts say, in one. Each reference is followed once. ``work`` is told
    how much is looked at."""
    merged: dict[str, object] = {}
    seen: set[str] = set()
    waiting = [schema]
    """The last one is next; what comes later counts."""
    while waiting:
        part = waiting.pop()
        work(len(part))
        reference, parts = part.get("$ref"), part.get("allOf")
        if not isinstance(reference, str) and not isinstance(parts, list):
            merged |= part
            continue
        waiting.append({name: value for name, value in part.items() if name not in ("$ref", "allOf")})
        if isinstance(parts, list):
            waiting += [each for each in reversed(parts) if isinstance(each, Mapping)]
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            target = target_of(root, reference)
            waiting += [] if target is None else [target]
    return merged


def literal(text: str, kinds: Kinds) -> str:
    """Raw text as JSON. Numbers stay as they were spelled; what should be no string and is no JSON becomes one."""
    plain = _SPELLED.get(text.strip(), text.strip())
    if kinds.string and not kinds.any:
        fits = ("null" in kinds.others and plain == "null") or (
            plain[:1] in ("{", "[") and {"{": "object", "[": "array"}[plain[0]] in kinds.others and _valid(plain)
        )
        return plain if fits else f'"{escaped(text)}"'
    return plain if _valid(plain) else f'"{escaped(text)}"'


def _valid(text: str) -> bool:
    try:
        json.loads(text, parse_int=lambda _: 0, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> object:
    raise ValueError(name)


def _types(schema: Mapping[str, object], root: Mapping[str, object], depth: int, seen: set[str]) -> set[str]:
    """Names of types; empty where nothing is said. ``seen``: what has been referred to, and need not be again."""
    if depth > _DEEP:
        return set()
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target = target_of(root, reference) if reference not in seen else None
        seen.add(reference)
        return _types(target, root, depth + 1, seen) if target is not None else set()
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {name for name in named if isinstance(name, str)}
    if "const" in schema:
        return {_name_of(schema["const"])}
    values = schema.get("enum")
    if isinstance(values, list):
        return {_name_of(value) for value in values}
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, Mapping):
                found |= _types(part, root, depth + 1, seen)
    return found


def _name_of(value: object) -> str:
    return _NAMES.get(type(value), "array")
