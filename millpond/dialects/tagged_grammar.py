"""Calls whose arguments stand one by one between tags, as grammars: see tagged_calls.py."""

from __future__ import annotations

from millpond.dialects.call_grammar import Callee, Calls, Schema, is_text, parameters
from millpond.dialects.schemas import kinds_of, resolved
from millpond.dialects.tagged_calls import Tags
from millpond.grammar.lark import alternatives, literal


def section(tags: Tags, calls: Calls) -> str:
    """A section's calls, up to behind its end."""
    call = calls.each(lambda callee: _call(tags, calls, callee))
    several = calls.several(call, calls.line()) if tags.call_end else call
    return f"{calls.line()} {several} {calls.line()} {calls.spell(tags.end)}"


def _call(tags: Tags, calls: Calls, callee: Callee) -> str:
    head = tags.call + callee.name + (tags.name_end[0] if tags.name_end[0] != "\n" else "")
    parts = [
        f"({_argument(tags, calls, callee, name, schema)} {calls.line()}){'' if needed else '?'}"
        for name, schema, needed in parameters(callee.schema)
    ]
    end = calls.spell(tags.call_end) if tags.call_end else ""
    return " ".join([calls.spell(head), calls.line(), *parts, end])


def _argument(tags: Tags, calls: Calls, callee: Callee, name: str, schema: Schema) -> str:
    schema = resolved(schema, callee.schema)
    text, frame = is_text(schema, callee.schema), "\n" if tags.framed else ""
    typed = f'" string="{"true" if text else "false"}"' if tags.typed else ""
    head = [calls.spell(tags.key + name + typed + tags.key_end)]
    if tags.value_begin:
        head += [calls.line(), calls.spell(tags.value_begin)]
    if frame:
        head.append(literal(frame))
    return " ".join([*head, _value(tags, calls, callee, schema, text=text, end=frame + tags.value_end)])


def _value(tags: Tags, calls: Calls, callee: Callee, schema: Schema, *, text: bool, end: str) -> str:
    """Up to behind ``end``."""
    if text:
        return calls.raw(schema, end)
    kinds = kinds_of({**callee.schema, "properties": {"it": schema}}, "it") if not tags.typed else None
    if kinds is None or kinds.any or not kinds.string:
        return f"{calls.value(schema, callee)} {calls.spell(end)}"
    # A text, or something else that is told from one by how it begins.
    choices = [calls.raw({}, end)]
    others = sorted(kinds.others & {"object", "array"})
    if "null" in kinds.others:
        choices.append(f"{literal('null')} {calls.spell(end)}")
    choices += [f"{calls.value({'type': kind}, callee)} {calls.spell(end)}" for kind in others]
    return alternatives(*choices)
