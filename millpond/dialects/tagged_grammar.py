"""Calls whose arguments stand one by one between tags, as grammars: see tagged_calls.py."""

from __future__ import annotations

from millpond.dialects.call_grammar import Callee, Calls, Schema, chosen, kind_of, open_ended, parameters
from millpond.dialects.schemas import flat
from millpond.dialects.tagged_calls import Tags
from millpond.grammar.check import GrammarError
from millpond.grammar.lark import alternatives, json_value, literal

_DEEP = 8
"""Alternatives within alternatives."""
Way = tuple[bool, Schema]
"""Whether a value is written as it is, being a text, or as JSON; and its schema."""


def section(tags: Tags, calls: Calls) -> str:
    """A section's calls, up to behind its end. Raises GrammarError."""
    call = calls.each(lambda callee: _call(tags, calls, callee))
    several = calls.several(call, calls.line()) if tags.call_end else call
    return f"{calls.line()} {several} {calls.line()} {calls.spell(tags.end)}"


def _call(tags: Tags, calls: Calls, callee: Callee) -> str:
    head = tags.call + callee.name + (tags.name_end[0] if tags.name_end[0] != "\n" else "")

    def readable(name: str) -> bool:
        return bool(name) and not any(mark in name for mark in ("\n", "<", ">", '"', tags.key_end, *calls.tokens))

    parts = [
        f"({_argument(tags, calls, callee, literal(name), schema)} {calls.line()}){'' if needed else '?'}"
        for name, schema, needed in parameters(callee, callee.schema, readable)
    ]
    if open_ended(callee):
        more = callee.schema.get("additionalProperties")
        name = calls.rules.once("KEY", lambda: "/[A-Za-z_][A-Za-z0-9_.\\-]{0,60}/")
        schema = more if isinstance(more, dict) else {"type": "string"}
        parts.append(f"({_argument(tags, calls, callee, name, schema)} {calls.line()})*")
    end = calls.spell(tags.call_end) if tags.call_end else ""
    return " ".join([calls.spell(head), calls.line(), *parts, end])


def _argument(tags: Tags, calls: Calls, callee: Callee, name: str, schema: Schema) -> str:
    """``name``: as an expression."""
    ways = _ways(calls, schema, callee, 0)
    if not tags.typed and any(text for text, _ in ways):
        # Among texts only what begins as no text does is read as something else.
        ways = [way for way in ways if way[0] or way[1].get("type") in ("null", "object", "array")]
    said = [_written(tags, calls, callee, schema, text=text) for text, schema in ways]
    frame = [calls.line(), calls.spell(tags.value_begin)] if tags.value_begin else []
    return " ".join([calls.spell(tags.key), name, "" if tags.typed else calls.spell(tags.key_end), *frame, _one(said)])


def _one(choices: list[str]) -> str:
    if not choices:
        raise GrammarError("no value can be written in the way in which this model calls")
    return choices[0] if len(choices) == 1 else alternatives(*choices)


def _written(tags: Tags, calls: Calls, callee: Callee, schema: Schema, *, text: bool) -> str:
    """A value, up to behind its end."""
    frame = "\n" if tags.framed else ""
    end = frame + tags.value_end
    typed = literal(f'" string="{"true" if text else "false"}"') + f" {calls.spell(tags.key_end)}" if tags.typed else ""
    value = (
        calls.raw(schema, end, strict=callee.strict) if text else f"{_json(calls, callee, schema)} {calls.spell(end)}"
    )
    return " ".join(filter(None, [typed, literal(frame) if frame else "", value]))


def _json(calls: Calls, callee: Callee, schema: Schema) -> str:
    if "const" in schema:
        return calls.rules.add("const", json_value({"const": schema["const"]}, strict=True))
    return calls.value(schema, callee)


def _ways(calls: Calls, schema: Schema, callee: Callee, depth: int) -> list[Way]:
    """How a value may be written, by what its schema says of it. Raises GrammarError."""
    schema = flat(schema, callee.schema, calls.rules.work)
    if "const" in schema or isinstance(schema.get("enum"), list):
        left = chosen(schema)
        texts = [value for value in left if isinstance(value, str)]
        others: list[Way] = [(False, {"const": v, "type": kind_of(v)}) for v in left if not isinstance(v, str)]
        return ([(True, {"enum": texts})] if texts else []) + others
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        if isinstance(parts, list) and depth < _DEEP:
            rest = {name: value for name, value in schema.items() if name != key}
            return [
                way
                for part in parts
                if isinstance(part, dict)
                for way in _ways(calls, {**rest, **part}, callee, depth + 1)
            ]
    kind = schema.get("type")
    if isinstance(kind, list):
        return [way for one in kind for way in _ways(calls, {**schema, "type": one}, callee, depth + 1)]
    return [(kind == "string", schema)]
