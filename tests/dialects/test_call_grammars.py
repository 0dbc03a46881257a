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
from millpond.dialects.families import BY_NAME, DSML
from millpond.grammar.check import GrammarError
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


@pytest.mark.often("True-", "False-hermes", "False-deepseek_v32")
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


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"json", "llama", "llama4", "harmony"}))
@pytest.mark.parametrize("by_token", [True, False])
def test_a_call_that_has_begun_is_whole(name: str, by_token: bool) -> None:
    """Before it, anything may be said, and no grammar is asked."""
    dialect, known = BY_NAME[name], vocabulary(name, by_token)
    grammar = answer_grammar(Wanted(CALLEES), dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    assert grammar.triggers
    said = known.ids("I shall.\n") + known.ids(next(iter(dialect.calls)))
    state = known.constraint(grammar)
    for token in said[:-1]:
        assert state.allowed() is None
        state.take(token)
    state.take(said[-1])
    assert state.allowed() is not None
    for seed in range(5):
        rest = known.walk_from(state.copy(), seed)
        found = read(dialect, known.parts(said + rest), TOOLS, known.tokens)
        assert found.said == "I shall."
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


ANYWHERE = {"$defs": {"n": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/n"}]}}}
TREE = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {name: {"$ref": "#/$defs/n"} for name in ("p", "q", "r")},
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
}
HARD = {
    "optional enum": {"type": ["string", "null"], "enum": ["c", "f", None]},
    "literal or none": {"anyOf": [{"enum": ["c", "f"]}, {"type": "null"}]},
    "two texts": {"anyOf": [{"type": "string", "maxLength": 2}, {"const": "long one"}]},
    "all of": {"allOf": [{"type": "string"}, {"maxLength": 2}]},
    "beside a reference": {"$ref": "#/$defs/s", "maxLength": 2},
    "two limits": {"type": "string", "enum": ["abc", "a"], "maxLength": 1},
    "siblings of alternatives": {"type": "string", "anyOf": [{"minLength": 3, "maxLength": 4}, {"maxLength": 1}]},
    "with an end in it": {"enum": ["b</parameter><parameter=x>", "c"]},
    "integers": {"type": "integer", "minimum": 3, "maximum": 5},
    "mixed": {"type": "string", "enum": ["abc", 5]},
}


def walks(name: str, schema: dict[str, object], count: int = 6) -> list[object]:
    """Arguments of calls that had to be made, each of which fits its schema."""
    dialect, known = BY_NAME[name], vocabulary(name, True)
    tools = {"f": schema}
    wanted = Wanted([Callee("f", schema, strict=True)], must_call=True, one_call=True)
    grammar = answer_grammar(wanted, dialect, known.tokens, thinking=False, blanks=())
    assert grammar is not None
    found = []
    for seed in range(count):
        read_ = read(dialect, known.parts(known.walk(grammar, seed)), tools, known.tokens)
        assert (read_.said, read_.whole) == ("", [True])
        found.append(json.loads(read_.calls[0][1]))
        jsonschema.validate(found[-1], closed(schema))
    return found


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("name", ["qwen_coder", "glm", "deepseek_v32", "lfm2", "gemma4", "hermes"])
def test_schemas_that_texts_do_not_fit_by_themselves(name: str, what: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": HARD[what], "x": {"type": "boolean"}, "no": False},
        "required": ["a"],
        "$defs": {"s": {"type": "string"}},
    }
    assert all("a" in arguments for arguments in walks(name, schema))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["qwen_coder", "lfm2", "gemma4", "deepseek_v32"])
def test_a_tool_that_takes_anything_can_be_given_something(name: str) -> None:
    found = walks(name, {"type": "object", "additionalProperties": True}, count=12)
    assert any(found)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("schema", [TREE, {**ANYWHERE, "properties": {"a": {"$ref": "#/$defs/n"}}}])
def test_schemas_that_refer_to_themselves_are_not_spelled_out(name: str, schema: dict[str, object]) -> None:
    known = vocabulary(name, True)
    wanted = Wanted([Callee("f", schema)], must_call=True)
    grammar = answer_grammar(wanted, BY_NAME[name], known.tokens, thinking=False, blanks=())
    assert grammar is not None
    assert len(grammar.text) < 8000


@pytest.mark.parametrize("name", ["qwen_coder", "lfm2"])
def test_arguments_that_cannot_be_written_are_refused_or_left_out(name: str) -> None:
    known = vocabulary(name, True)
    for odd in ("a\nb", "a>b", 'a"b'):
        schema = {"type": "object", "properties": {odd: {"type": "string"}}, "required": [odd]}
        wanted = Wanted([Callee("f", schema)], must_call=True)
        with pytest.raises(GrammarError, match="has to be given"):
            answer_grammar(wanted, BY_NAME[name], known.tokens, thinking=False, blanks=())
        assert walks(name, {"type": "object", "properties": {odd: {"type": "string"}}}) == [{}] * 6


def test_a_long_list_of_tools_has_rules_of_different_names() -> None:
    known = vocabulary("qwen_coder", True)
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(6)}}
    wanted = Wanted([Callee(f"f{number}", schema) for number in range(128)], must_call=True)
    grammar = answer_grammar(wanted, BY_NAME["qwen_coder"], known.tokens, thinking=False, blanks=())
    assert grammar is not None
    names = [line.partition(":")[0].partition("[")[0] for line in grammar.text.splitlines()]
    assert len(names) == len(set(names)) > 128 * 6
