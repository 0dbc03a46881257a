"""(M11) Schemas whose references go deep, or round and round: nobody's stack, time or memory ends for them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping

import pytest

from millpond.child import python
from millpond.dialects.answer_grammar import Wanted, answer_grammar
from millpond.dialects.call_grammar import Callee
from millpond.dialects.families import BY_NAME
from millpond.dialects.schemas import flat
from millpond.grammar.check import GrammarError, check_schema
from millpond.grammar.levels import MOST_LEVELS, MOST_VISITED, TooManyError, levels_of

Schema = Mapping[str, object]


def link(number: int) -> Schema:
    return {"$ref": f"#/$defs/{number}"}


LINKS: dict[str, tuple[object, int]] = {
    "properties": ({"properties": {"x": "next"}, "required": ["x"]}, 3),
    "alternatives": ({"properties": {"x": {"anyOf": ["next", {"type": "null"}]}}, "required": ["x"]}, 5),
    "items": ({"items": {"properties": {"x": "next"}, "required": ["x"]}}, 4),
    "places": ({"prefixItems": ["next"], "minItems": 1}, 3),
    "all of": ({"allOf": ["next", {"properties": {"y": {"type": "string"}}}]}, 5),
    "one of": ({"oneOf": ["next", {"type": "integer"}]}, 3),
    "others": ({"additionalProperties": "next"}, 2),
    "names": ({"patternProperties": {"^a": "next"}}, 3),
    "itself": ("next", 1),
}
"""What a schema says that leads to the next one, and how many levels that is."""


def chain(what: object, length: int) -> Schema:
    def with_next(value: object, number: int) -> object:
        if value == "next":
            return link(number + 1)
        if isinstance(value, dict):
            return {name: with_next(part, number) for name, part in value.items()}
        return [with_next(part, number) for part in value] if isinstance(value, list) else value

    parts = {str(number): with_next(what, number) for number in range(length)}
    return {**link(0), "$defs": {**parts, str(length): {"type": "string"}}}


@pytest.mark.parametrize("name", LINKS)
def test_levels_are_counted(name: str) -> None:
    what, levels = LINKS[name]
    for length in (1, 2, 50):
        # The whole with its definitions, each of them once more where it is referred to, and the text at the end.
        assert levels_of(chain(what, length)) == 2 + levels + levels * length + 1, length
    long = chain(what, MOST_LEVELS // levels + 1)
    with pytest.raises(GrammarError, match=f"allowed: {MOST_LEVELS}$"):
        check_schema(long)


def test_circles_and_what_is_not_there() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/properties/left"}}}
    assert levels_of(tree) == 3 + 1
    both = {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"items": {"$ref": "#/$defs/a"}}}
    assert levels_of({"$ref": "#/$defs/a", "$defs": both}) == 4 + 2 + 2
    assert levels_of({"$ref": "#/$defs/none", "$defs": {}}) == 2
    assert levels_of({"$ref": "https://example.org/schema", "enum": [["$ref"]]}) == 3
    assert levels_of({"$ref": {"$ref": 1}}) == 2
    assert levels_of({}) == 1
    everybody = {str(number): {"anyOf": [link(other) for other in range(40)]} for number in range(40)}
    assert levels_of({**link(0), "$defs": everybody}) == 5 + 40 * 3


def test_no_more_is_looked_at_than_somebody_would() -> None:
    with pytest.raises(TooManyError):
        levels_of({"enum": [{}] * (MOST_VISITED + 1)})
    with pytest.raises(GrammarError, match="too large"):
        check_schema({"enum": [{}] * (MOST_VISITED + 1)})


DEEPEST = """
import json, sys, threading
from millpond.grammar.check import GrammarError, check, check_schema
from millpond.grammar.lark import json_value
from millpond.grammar.levels import deep_stacks

def run():
    for schema in json.load(sys.stdin):
        check_schema(schema)
        try:
            check("start: " + json_value(schema, strict=False) + "\\n")
        except GrammarError:
            pass
    print("alive")

with deep_stacks():
    thread = threading.Thread(target=run)
    thread.start()
thread.join()
"""


def test_the_deepest_that_are_allowed_end_nobody() -> None:
    deepest = [chain(what, (MOST_LEVELS - 3) // levels - 1) for what, levels in LINKS.values()]
    assert max(levels_of(schema) for schema in deepest) > MOST_LEVELS - 10
    asked = json.dumps(deepest)
    done = subprocess.run(python("-c", DEEPEST), input=asked, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_what_is_merged_is_followed_once() -> None:
    itself = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}], "type": "object"}}}
    looked_at = itertools.count()

    def work(_: int) -> None:
        assert next(looked_at) < 1000

    assert flat(itself, itself, work)["type"] == "object"
    doubled = chain({"allOf": ["next", "next"]}, 100)
    assert flat(doubled, doubled, work)["type"] == "string"
    layers = {
        "allOf": [{"$ref": "#/$defs/a", "title": "of the part"}, {"description": "second"}],
        "title": "its own",
        "$defs": {"a": {"type": "integer", "title": "referred to", "description": "first"}},
    }
    found = flat(layers, layers)
    assert (found["type"], found["title"], found["description"]) == ("integer", "its own", "second")


EVIL: dict[str, Schema] = {
    "merged with itself": {"allOf": [link(0)], "$defs": {"0": {"allOf": [link(0)]}}},
    "merged doubly": {"properties": {"x": link(0)}, "$defs": chain({"allOf": ["next", "next"]}, 60)["$defs"]},
    "alternatives of alternatives": {
        "properties": {"x": link(0)},
        "$defs": {str(n): {"anyOf": [link(n + 1)] * 20, "title": ""} for n in range(12)} | {"12": {"type": "string"}},
    },
    "alternatives that say more": {
        "properties": {"x": {**link(0), "title": ""}},
        "$defs": {str(n): {"anyOf": [{**link(n + 1), "title": str(m)} for m in range(20)]} for n in range(12)}
        | {"12": {"type": "string"}},
    },
    "shared by many": {
        "properties": {f"p{number}": {"type": "number"} for number in range(3000)},
        "$defs": {"0": {"enum": [f"{number} of many values that nobody needs" for number in range(3000)]}},
    },
    "many that may be missing": {"properties": {f"p{number}": {"type": "boolean"} for number in range(20_000)}},
    "many types": {"properties": {"x": {"type": ["string", "null"] * 20_000}}},
    "deep": {"properties": {"x": chain({"properties": {"x": "next"}, "required": ["x"]}, 125)}}
    | {"$defs": chain({"properties": {"x": "next"}, "required": ["x"]}, 125)["$defs"]},
}
EACH = """
import json, resource, sys
from test_levels import EVIL, grammar_of
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for name in EVIL:
    print(name, grammar_of(sys.argv[1], name), flush=True)
"""


def grammar_of(family: str, name: str) -> str:
    """What becomes of it where it is not promised to be followed."""
    callee = Callee("f", EVIL[name])
    try:
        check_schema(callee.schema)
        answer_grammar(Wanted([callee], must_call=True), BY_NAME[family], {}, thinking=False, blanks=[])
    except (GrammarError, RecursionError) as error:
        return type(error).__name__
    return "made"


@pytest.mark.often("hermes", "qwen_coder", "llama4", "gemma4", "deepseek_v32")
@pytest.mark.parametrize("family", BY_NAME)
def test_what_multiplies_is_made_or_refused(family: str) -> None:
    """In a process of its own, with a few GB of memory: without a bound any of these would take all there is."""
    command = python("-c", f"import sys; sys.path[:0] = {sys.path!r}\n{EACH}", family)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    assert done.stdout.count("\n") == len(EVIL)
