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
from millpond.grammar.check import GrammarError, check, check_schema
from millpond.grammar.levels import MOST_LEVELS, MOST_VISITED, levels_of, target_of

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
    assert levels_of({"$ref": {"$ref": 1}}) == 2
    assert levels_of({}) == 1
    everybody = {str(number): {"anyOf": [link(other) for other in range(40)]} for number in range(40)}
    assert levels_of({**link(0), "$defs": everybody}) == 5 + 40 * 3


def test_what_references_lead_to() -> None:
    """As llguidance follows them: names, escaped in either way, and places of lists."""
    root = {"a/b~c": {"": {"x": 1}}, "é": [{"y": 2}, {"z": 3}], "$anchor": "a", "b": 5}
    found = {
        "#": root,
        "#/a~1b~0c": root["a/b~c"],
        "#/a%2Fb~0c/": root["a/b~c"][""],  # type: ignore[index,call-overload]
        "#/%C3%A9/1": root["é"][1],  # type: ignore[index,call-overload]
        **dict.fromkeys(("", "#a", "/b", "#/b", "#/é/2", "#/é/-1", "#/é/1/z", "#/none", "#//b", "http://a#/b"), None),
    }
    assert {reference: target_of(root, reference) for reference in found} == found


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"enum": [0] * (MOST_VISITED + 1)}, "it is too large to be followed"),
        ({"d": [0] * 150, "r": [{"$ref": "#/d"}, *({"$ref": f"#/x{'/y' * n}"} for n in range(300))]}, "too large"),
        ({"properties": {f"p{n}": {"patternProperties": {"^a": {}}} for n in range(60)}}, "patternProperties"),
        ({"$ref": "http://example.org/x"}, "\\$ref is 'http://example.org/x'; allowed: # and what begins with #/"),
        ({"$ref": "#x", "$defs": {}}, "\\$ref is '#x'"),
        ({"items": {"$id": "https://example.org"}}, "\\$id cannot be followed"),
        ({"items": {"$anchor": "x"}}, "\\$anchor cannot be followed"),
        ({"items": {"$dynamicRef": "#x"}}, "\\$dynamicRef cannot be followed"),
        ({"required": [["é" * 100]]}, "required must have strings only"),
        ({"items": {"type": ["string", ["x"]]}}, "type must have strings only"),
        ({"pattern": ["a"]}, "pattern must be a string"),
        ({"$ref": ["#"]}, "\\$ref must be a string"),
    ],
)
def test_what_cannot_be_followed_is_said(schema: Schema, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        check_schema(schema)


def test_names_and_values_that_only_look_so() -> None:
    named = {name: {"type": "string"} for name in ("$id", "$anchor", "required", "type", "pattern", "format", "$ref")}
    data = {"required": [1], "$id": "x", "type": [2], "pattern": 3}
    check_schema({"$id": "https://example.org", "properties": named, "default": data, "enum": [data], "items": True})


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
            print("made")
        except GrammarError as error:
            print(error)

with deep_stacks():
    thread = threading.Thread(target=run)
    thread.start()
thread.join()
"""


def test_the_deepest_that_are_allowed_end_nobody() -> None:
    kinds = [kind for name, kind in LINKS.items() if name != "names"]  # of which there may not be so many
    deepest = [chain(what, (MOST_LEVELS - 3) // levels - 1) for what, levels in kinds]
    assert max(levels_of(schema) for schema in deepest) > MOST_LEVELS - 10
    asked = json.dumps(deepest)
    done = subprocess.run(python("-c", DEEPEST), input=asked, capture_output=True, text=True, check=False)
    results = done.stdout.splitlines()
    assert (done.returncode, len(results)) == (0, len(kinds)), done.stderr
    assert results.count("made") >= len(kinds) - 2, results


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
    "as people write them": {
        "properties": {"path": {"type": "string"}, "node": link(0)},
        "required": ["path"],
        "$defs": {"0": {"properties": {"next": {**link(0), "title": "again"}, "kind": {"enum": ["a", "b"]}}}},
    },
    "what is no word": {"properties": {"a": {"enum": [1], "type": [["x"]]}, "b": {"type": "string"}}, "required": [1]},
    "anything goes": {"properties": {"a": {"anyOf": [True]}, "b": {"anyOf": [False]}}},
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
        made = answer_grammar(Wanted([callee], must_call=True), BY_NAME[family], {}, thinking=False, blanks=[])
        assert made is not None
        check(made.text)
    except (GrammarError, RecursionError) as error:
        return type(error).__name__
    return "made"


@pytest.mark.parametrize("family", ["deepseek_v32", "glm", "minimax", "qwen_coder"])
def test_a_grammar_stops_growing(family: str) -> None:
    """Of families that write each value out where it stands: long before anybody counts what was made."""
    schema = {"properties": {f"p{number}": link(0) for number in range(300)}, "$defs": {"0": {"enum": ["y" * 20_000]}}}
    with pytest.raises(GrammarError, match="its grammar is longer than"):
        answer_grammar(Wanted([Callee("f", schema)], must_call=True), BY_NAME[family], {}, thinking=False, blanks=[])


@pytest.mark.often("hermes", "qwen_coder", "llama4", "gemma4", "deepseek_v32")
@pytest.mark.parametrize("family", BY_NAME)
def test_what_multiplies_is_made_or_refused(family: str) -> None:
    """In a process of its own, with a few GB of memory: without a bound any of these would take all there is."""
    command = python("-c", f"import sys; sys.path[:0] = {sys.path!r}\n{EACH}", family)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    told = done.stdout.splitlines()
    assert len(told) == len(EVIL)
    assert told[0].endswith(" made")
