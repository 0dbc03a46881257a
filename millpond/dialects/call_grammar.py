"""Calls as grammars: what a family's readers read, and nothing that they would not.

What they say follows the tool's schema. Between marks stands what chat templates write there: a model that is made to
write otherwise than it has learnt writes worse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from millpond.dialects.schemas import flat
from millpond.grammar.check import GrammarError
from millpond.grammar.lark import Rules, alternatives, between_slashes, json_value, literal, written
from millpond.types import Symbol

Schema = Mapping[str, object]
SHARED = ("$defs", "definitions")
"""What other parts of a schema refer to."""
_ABOUT = ("$schema", "$id", "x-guidance")
_TEXT = "(?s:.*)"


@dataclass(frozen=True)
class Callee:
    """A tool that may be called."""

    name: str
    schema: Schema
    """Of its arguments; empty: it takes none."""
    strict: bool = False
    """A schema that cannot be followed to the letter is not to be followed at all."""


@dataclass(frozen=True)
class Calls:
    """Whom an answer may call, and the rules made for that so far."""

    tokens: Mapping[str, int]
    """Marks that are tokens of their own, with their ids."""
    callees: Sequence[Callee]
    one: bool
    """No more than one call."""
    rules: Rules = field(default_factory=Rules)

    def spell(self, text: str) -> str:
        """A text with the marks in it."""
        marks = "|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True)))
        parts = re.split(f"({marks})", text) if marks else [text]
        return " ".join(written(Symbol(part, self.tokens.get(part, -1))) for part in parts if part)

    def each(self, call: Callable[[Callee], str]) -> str:
        """A call of one of them."""
        return self.rules.add("call", alternatives(*(self.rules.add("of", call(callee)) for callee in self.callees)))

    def several(self, call: str, between: str) -> str:
        """One, or as many as may be."""
        return call if self.one else f"{call} ({between} {call})*"

    def in_order(self, parts: Sequence[tuple[str, bool]], between: str) -> str:
        """Parts of which those may be missing that are not needed; ``between`` stands between two of them."""
        rest, choices = "", list[str]()
        for part, needed in reversed(parts):
            if needed:
                choices.clear()
            choices.append(f"{part} {rest}".strip())
            rest = self.rules.add("rest", f"({between} {part}){'' if needed else '?'} {rest}".strip())
        if not choices:
            return ""
        return alternatives(*reversed(choices)) + ("" if any(needed for _, needed in parts) else "?")

    def line(self) -> str:
        """A line's end, or none."""
        return self.rules.once("NL", lambda: literal("\n")) + "?"

    def arguments(self, callee: Callee) -> str:
        """As one JSON object."""
        return self.rules.add("args", json_value(closed(callee.schema), strict=callee.strict))

    def value(self, schema: Schema, callee: Callee, *, escapes: str | None = None) -> str:
        """A JSON value by a part of a tool's schema."""
        shared = {name: callee.schema[name] for name in SHARED if name in callee.schema}
        return self.rules.add("json", json_value({**shared, **schema}, strict=callee.strict, escapes=escapes))

    def raw(self, schema: Schema, end: str, *, strict: bool) -> str:
        """A text as it is, up to behind ``end``, which is not in it, by what the schema says of it. Raises
        GrammarError."""
        values = [value for value in _values(schema) if isinstance(value, str)]
        if values:
            found = [value for value in values if end.strip() not in value and _long_enough(value, schema)]
            if not found:
                raise GrammarError("none of its values can be written in the way in which this model calls")
            return f"{alternatives(*map(literal, found))} {self.spell(end)}"
        if strict and "format" in schema:
            raise GrammarError("format cannot be followed in the way in which this model calls")
        kinds = [f"/{_TEXT}/", *_lengths(schema), *_pattern(schema)]
        token = end.strip() in self.tokens
        if not token:
            kinds.append(f"~/{_TEXT}{_escaped(end.strip())}{_TEXT}/")
        text = self.rules.add("TEXT", " & ".join(kinds))
        if token:
            empty = "" if schema.get("minLength") or "pattern" in schema else "?"
            return f"{text}{empty} {self.spell(end)}"
        return self.rules.add(f"raw[suffix={literal(end)}]", text)


def closed(schema: Schema) -> Schema:
    """A tool's schema as that of an object, in which nothing is that it does not name."""
    plain = {name: value for name, value in schema.items() if name not in _ABOUT}
    if any(name in plain for name in ("$ref", "anyOf", "oneOf", "allOf")):
        return plain
    named = "additionalProperties" in plain or "patternProperties" in plain
    return plain | {"type": "object"} | ({} if named else {"additionalProperties": False})


def parameters(
    callee: Callee, schema: Schema, readable: Callable[[str], bool] = bool
) -> list[tuple[str, Schema, bool]]:
    """Each argument's name, schema, and whether it has to be given, of a schema of the tool. ``readable``: names that
    the family can write. Raises GrammarError where one that has to be given cannot be."""
    found = flat(schema, callee.schema)
    properties, required = found.get("properties"), found.get("required")
    named = properties if isinstance(properties, Mapping) else {}
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    for name in sorted(needed):
        if name not in named or not readable(name) or named[name] is False:
            raise GrammarError(f"{name!r} has to be given, and cannot be in the way in which this model calls")
    given = [(name, part) for name, part in named.items() if readable(name) and part is not False]
    return [(name, part if isinstance(part, Mapping) else {}, name in needed) for name, part in given]


def open_ended(callee: Callee) -> bool:
    """Whether there may be arguments that its schema does not name."""
    found = flat(callee.schema, callee.schema)
    more = found.get("additionalProperties")
    unsaid = not found.get("properties") and any(name in found for name in ("anyOf", "oneOf"))
    if unsaid and callee.strict:
        raise GrammarError("anyOf at the top cannot be followed in the way in which this model calls")
    return not found.get("properties") and (bool(more) or unsaid)


# --- families ---------------------------------------------------------------------------------------------------


def json_objects(
    closing: str, *, name: str = "name", arguments: str = "arguments", listed: bool = False, before: str = ""
) -> Callable[[Calls], str]:
    """`{"name": …, "arguments": {…}}`, or several in a list, up to behind ``closing``. ``before``: what an object says
    first."""

    def section(calls: Calls) -> str:
        def one(callee: Callee) -> str:
            head = literal(f'"{name}": "{callee.name}", "{arguments}": ')
            return f"{literal('{')} {before} {head} {calls.arguments(callee)} {literal('}')}"

        call = calls.each(one)
        if listed:
            space = calls.rules.once("SPACE", lambda: r"/[ \n]{1,6}/") + "?"
            several = calls.several(call, f"{literal(',')} {space}")
            call = f"{literal('[')} {space} {several} {space} {literal(']')}"
        return f"{calls.line()} {call} {calls.line()} {calls.spell(closing)}"

    return section


def with_arguments(
    before: str, between: str, after: str, closing: str = "", *, own: str = ""
) -> Callable[[Calls], str]:
    """A name and JSON between marks, each as a section holds one or several. ``own``: what stands behind a name."""

    def section(calls: Calls) -> str:
        def one(callee: Callee) -> str:
            head = f"{calls.spell(before + callee.name)} {own} {calls.spell(between)}"
            return f"{head} {calls.arguments(callee)} {calls.spell(after)}"

        call = calls.each(one)
        if not closing:
            return call
        return f"{calls.several(call, calls.line())} {calls.line()} {calls.spell(closing)}"

    return section


# --- what schemas say of texts ----------------------------------------------------------------------------------


def _values(schema: Schema) -> Sequence[object]:
    values = schema.get("enum")
    return values if isinstance(values, list) else [schema["const"]] if "const" in schema else []


def chosen(schema: Schema) -> list[object]:
    """The values that a schema with ``enum`` or ``const`` leaves, by what else it says."""
    kind = schema.get("type")
    kinds = (
        {kind}
        if isinstance(kind, str)
        else {one for one in kind if isinstance(one, str)}
        if isinstance(kind, list)
        else None
    )
    return [
        value
        for value in _values(schema)
        if (kinds is None or kind_of(value) in kinds or (kind_of(value) == "integer" and "number" in kinds))
        and (not isinstance(value, str) or _long_enough(value, schema))
    ]


def kind_of(value: object) -> str:
    """The name of its type."""
    names = {bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object"}
    return names.get(type(value), "string")


def _lengths(schema: Schema) -> list[str]:
    least, most = (schema.get(name) for name in ("minLength", "maxLength"))
    if not isinstance(least, int) and not isinstance(most, int):
        return []
    return [f"/(?s:.){{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}/"]


def _long_enough(value: str, schema: Schema) -> bool:
    least, most = (schema.get(name) for name in ("minLength", "maxLength"))
    return len(value) >= (least if isinstance(least, int) else 0) and (not isinstance(most, int) or len(value) <= most)


def _pattern(schema: Schema) -> list[str]:
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return []
    begin = "" if pattern.startswith("^") else _TEXT
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else _TEXT
    inner = pattern.removeprefix("^") if not begin else pattern
    inner = inner.removesuffix("$") if not end else inner
    return [f"/{begin}(?:{between_slashes(inner)}){end}/"]


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")
