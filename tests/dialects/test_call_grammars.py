"""(M3) What a family's grammar allows, its reader reads: every answer drawn from it is calls that fit their schemas."""

from __future__ import annotations

import json
from functools import lru_cache

import jsonschema
import pytest
from answers_read import read
from grammar_walks import WalkVocabulary

from millpond.dialects.answer_grammar import Wanted, answer_grammar
from millpond.dialects.call_grammar import Callee, closed
from millpond.dialects.dialect import Dialect
from millpond.dialects.families import DSML, FAMILIES, GENERIC
from millpond.grammar.lark import json_value

WRITE = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "maxLength": 12},
        "text": {"type": "string"},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "kind": {"enum": ["a", "b c"]},
        "on": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "deep": {"$ref": "#/$defs/deep"},
        "some": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["path", "count", "deep"],
    "$defs": {
        "deep": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "string", "maxLength": 3}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = {"write": WRITE, "now": {}, "say.it": {"type": "object", "properties": {"it": {"type": "string"}}}}
CALLEES = [Callee(name, schema, strict=True) for name, schema in TOOLS.items()]
BY_NAME = {dialect.name: dialect for _, dialect in (*FAMILIES, ((), GENERIC))}


@lru_cache(maxsize=8)
def vocabulary(name: str, by_token: bool) -> WalkVocabulary:
    return WalkVocabulary(BY_NAME[name].marks, by_token=by_token, ways_out=(DSML.value_end,))


def check(dialect: Dialect, known: WalkVocabulary, answer: list[int], *, thinking: bool = False) -> int:
    """How many calls it is; nothing of it is said."""
    found = read(dialect, known.parts(answer), TOOLS, known.tokens, thinking=thinking)
    assert found.said == "", known.parts(answer)
    assert all(found.whole)
    for name, arguments in found.calls:
        jsonschema.validate(json.loads(arguments), closed(TOOLS[name]))
    return len(found.calls)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("by_token", [True, False])
def test_answers_that_must_call(name: str, by_token: bool) -> None:
    if name == "harmony" and not by_token:
        return  # nobody has its marks but as tokens
    dialect, known = BY_NAME[name], vocabulary(name, by_token)
    grammar = answer_grammar(Wanted(CALLEES, must_call=True), dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    counts = [check(dialect, known, known.walk(grammar, seed)) for seed in range(12)]
    assert min(counts) >= 1
    assert max(counts) > 1 or name in ("harmony", "json", "llama"), counts


@pytest.mark.parametrize("name", BY_NAME)
def test_no_more_than_one_call(name: str) -> None:
    dialect, known = BY_NAME[name], vocabulary(name, True)
    wanted = Wanted(CALLEES, must_call=True, one_call=True)
    grammar = answer_grammar(wanted, dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    assert {check(dialect, known, known.walk(grammar, seed)) for seed in range(8)} == {1}


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"json", "llama", "llama4"}))
@pytest.mark.parametrize("by_token", [True, False])
def test_a_call_that_has_begun_is_whole(name: str, by_token: bool) -> None:
    """Before it, anything may be said, and no grammar is asked."""
    dialect, known = BY_NAME[name], vocabulary(name, by_token)
    grammar = answer_grammar(Wanted(CALLEES), dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    assert grammar.triggers
    mark = "<|channel|>commentary to=functions." if dialect.messages else next(iter(dialect.calls))
    said = known.ids("" if dialect.messages else "I shall.\n") + known.ids(mark)
    state = known.constraint(grammar)
    for token in said[:-1]:
        assert state.allowed() is None
        state.take(token)
    state.take(said[-1])
    assert state.allowed() is not None
    for seed in range(5):
        rest = known.walk_from(state.copy(), seed)
        found = read(dialect, known.parts(said + rest), TOOLS, known.tokens)
        assert found.said == ("" if dialect.messages else "I shall.")
        assert found.calls
        assert all(found.whole)
        for called, arguments in found.calls:
            jsonschema.validate(json.loads(arguments), closed(TOOLS[called]))


@pytest.mark.parametrize("name", BY_NAME)
def test_calls_or_an_answer_of_a_form(name: str) -> None:
    dialect, known = BY_NAME[name], vocabulary(name, True)
    form = json_value({"enum": [11, 22]}, strict=True)
    grammar = answer_grammar(Wanted(CALLEES, form=form), dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    seen = set()
    for seed in range(30):
        found = read(dialect, known.parts(known.walk(grammar, seed)), TOOLS, known.tokens)
        assert (found.said in ("11", "22")) != bool(found.calls)
        seen.add(bool(found.calls))
    assert seen == {True, False}
