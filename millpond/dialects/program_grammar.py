"""Calls as a program makes them, as grammars: see program_calls.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from millpond.dialects.call_grammar import Callee, Calls, Schema, chosen, closed, open_ended, parameters
from millpond.dialects.literals import NAME
from millpond.dialects.schemas import flat
from millpond.grammar.check import GrammarError
from millpond.grammar.lark import alternatives, json_value, literal

_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,40}/"
_ABOUT = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
"""Fields that change nothing about what is written."""
_DEEP = 8
"""Levels of a schema that are followed; what is deeper may be anything."""


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls and values."""

    opening: str
    """Between a name and its arguments."""
    closing: str
    assign: str
    """Between an argument's name and its value."""
    true: str
    false: str
    null: str
    mark: str = ""
    """Around texts, which are as they are; empty: they are quoted as in JSON."""
    before: str = ""
    """Before a call's name."""
    quoted_keys: bool = True
    """Within objects."""


PYTHON = Syntax("(", ")", "=", "True", "False", "None")


def named(mark: str) -> Syntax:
    """Gemma's: `call:f{a:<|"|>x<|"|>}`."""
    return Syntax("{", "}", ":", "true", "false", "null", mark, "call:", quoted_keys=False)


def listed(syntax: Syntax, closing: str, calls: Calls) -> str:
    """Calls in brackets, up to behind ``closing``."""
    several = calls.several(_call(syntax, calls), literal(", "))
    return f"{literal('[')} {several} {literal(']')} {calls.spell(closing)}"


def single(syntax: Syntax, closing: str, calls: Calls) -> str:
    """One, up to behind ``closing``."""
    return f"{_call(syntax, calls)} {calls.spell(closing)}"


def _call(syntax: Syntax, calls: Calls) -> str:
    def one(callee: Callee) -> str:
        parts = [
            (
                calls.rules.add("part", f"{literal(name + syntax.assign)} {_value(syntax, calls, callee, schema, 0)}"),
                needed,
            )
            for name, schema, needed in parameters(callee, callee.schema, _readable)
        ]
        given = calls.in_order(parts, _comma(calls))
        if open_ended(callee):
            key = calls.rules.once("KEY", lambda: _KEY)
            pair = f"{key} {literal(syntax.assign)} {_simple(syntax, calls, callee)}"
            given = f"({pair} ({_comma(calls)} {pair})*)?"
        return f"{literal(syntax.before + callee.name + syntax.opening)} {given} {literal(syntax.closing)}"

    return calls.each(one)


def _comma(calls: Calls) -> str:
    return calls.rules.once("COMMA", lambda: "/, ?/")


def _value(syntax: Syntax, calls: Calls, callee: Callee, schema: Schema, depth: int) -> str:
    """What is referred to is a rule of its own, however often and from within itself."""
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target = flat(schema, callee.schema, calls.rules.work)
        if schema.keys() - _ABOUT - {"$ref"}:  # it says more than what it refers to
            return _value(syntax, calls, callee, target, depth + 1)
        what = f"{callee.name} {reference}"
        return calls.rules.of(what, "shared", lambda: _value(syntax, calls, callee, target, 0))
    if depth > _DEEP:
        return _unsaid(syntax, calls, callee, "what is so deep")
    schema = flat(schema, callee.schema, calls.rules.work)
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list) and choices:
            rest = {name: value for name, value in schema.items() if name != key}
            parts = [
                {**rest, **({} if part is True else part)}
                for part in choices
                if part is True or isinstance(part, Mapping)
            ]
            if not parts:
                raise GrammarError("no value can be written in the way in which this model calls")
            return alternatives(*(_value(syntax, calls, callee, part, depth + 1) for part in parts))
    if "const" in schema or isinstance(schema.get("enum"), list):
        left = [_constant(syntax, calls, value) for value in chosen(schema)]
        if not left:
            raise GrammarError("no value can be written in the way in which this model calls")
        return alternatives(*left)
    kind = schema.get("type")
    if isinstance(kind, list):
        return alternatives(*(_value(syntax, calls, callee, {**schema, "type": one}, depth + 1) for one in kind))
    if not isinstance(kind, str):
        return _anything(syntax, calls, callee)
    match kind:
        case "string":
            return _text(syntax, calls, callee, schema)
        case "integer" | "number":
            return calls.value(schema, callee)
        case "boolean":
            return alternatives(literal(syntax.true), literal(syntax.false))
        case "null":
            return literal(syntax.null)
        case "array":
            return _list(syntax, calls, callee, schema, depth)
        case _:
            return _object(syntax, calls, callee, schema, depth)


def _text(syntax: Syntax, calls: Calls, callee: Callee, schema: Schema) -> str:
    if not syntax.mark:
        return calls.value(schema, callee, escapes='nrbtf"\\')
    return f"{calls.spell(syntax.mark)} {calls.raw(schema, syntax.mark, strict=callee.strict)}"


def _list(syntax: Syntax, calls: Calls, callee: Callee, schema: Schema, depth: int) -> str:
    if "prefixItems" in schema:
        return _unsaid(syntax, calls, callee, "prefixItems")
    items = schema.get("items")
    item = calls.rules.add(
        "item", _value(syntax, calls, callee, items if isinstance(items, Mapping) else {}, depth + 1)
    )
    least, most = (found if isinstance(found, int) else None for found in map(schema.get, ("minItems", "maxItems")))
    if most == 0:
        return literal("[]")
    rest = f"({_comma(calls)} {item}){{{max(0, (least or 0) - 1)},{'' if most is None else most - 1}}}"
    inner = f"({item} {rest})" + ("" if least else "?")
    return f"{literal('[')} {inner} {literal(']')}"


def _object(syntax: Syntax, calls: Calls, callee: Callee, schema: Schema, depth: int) -> str:
    if not schema.get("properties"):
        if isinstance(schema.get("additionalProperties"), Mapping):
            return _unsaid(syntax, calls, callee, "additionalProperties with a schema")
        return _anything_keyed(syntax, calls, callee)
    quote = '"' if syntax.quoted_keys else ""
    parts = []
    for name, part, needed in parameters(callee, closed(schema), _readable):
        said = f"{literal(f'{quote}{name}{quote}:')} {_space(calls)} {_value(syntax, calls, callee, part, depth + 1)}"
        parts.append((calls.rules.add("part", said), needed))
    return f"{literal('{')} {calls.in_order(parts, _comma(calls))} {literal('}')}"


def _readable(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def _unsaid(syntax: Syntax, calls: Calls, callee: Callee, what: str) -> str:
    """Anything, where nothing is promised. Raises GrammarError where it is."""
    if callee.strict:
        raise GrammarError(f"{what} cannot be followed in the way in which this model calls")
    return _anything(syntax, calls, callee)


def _space(calls: Calls) -> str:
    return calls.rules.once("BLANK", lambda: literal(" ")) + "?"


def _constant(syntax: Syntax, calls: Calls, value: object) -> str:
    match value:
        case bool():
            return literal(syntax.true if value else syntax.false)
        case None:
            return literal(syntax.null)
        case str() if syntax.mark:
            return f"{calls.spell(syntax.mark)} {literal(value)} {calls.spell(syntax.mark)}"
        case _:
            return calls.rules.add("const", json_value({"const": value}, strict=True))


def _anything(syntax: Syntax, calls: Calls, callee: Callee) -> str:
    """A value of which nothing is said: one level of it."""
    simple = _simple(syntax, calls, callee)
    several = f"({simple} ({_comma(calls)} {simple})*)?"
    return alternatives(simple, f"{literal('[')} {several} {literal(']')}", _anything_keyed(syntax, calls, callee))


def _anything_keyed(syntax: Syntax, calls: Calls, callee: Callee) -> str:
    simple = _simple(syntax, calls, callee)
    key = calls.rules.once("KEY", lambda: _KEY)
    quote = literal('"') if syntax.quoted_keys else ""
    pair = calls.rules.once("pair", lambda: f"{quote} {key} {quote} {literal(':')} {_space(calls)} {simple}")
    return f"{literal('{')} ({pair} ({_comma(calls)} {pair})*)? {literal('}')}"


def _simple(syntax: Syntax, calls: Calls, callee: Callee) -> str:
    def made() -> str:
        text, number = ({"type": kind} for kind in ("string", "number"))
        words = map(literal, (syntax.true, syntax.false, syntax.null))
        return alternatives(_text(syntax, calls, callee, text), calls.value(number, callee), *words)

    return calls.rules.once("simple", made)
