"""Schemas of growing size: nested, recursive, with enums, patterns, numbers, formats, and many optional keys."""

from __future__ import annotations

import random

Schema = dict[str, object]
PATTERNS = ("^[a-c]{1,4}$", "^[A-Z]{2}-[0-9]{1,3}$", "^(red|green)( sky)?$", "^x.{0,3}y$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
WORDS = ("name", "size", "city", "kind", "note", "list", "item", "part", "unit", "from", "to", "über")


def drawn(number: int) -> Schema:
    """The schema of that number, always the same; the higher, the larger."""
    chosen = random.Random(number)
    depth = 1 + number // 60
    schema = _object(chosen, depth, keys=2 + number // 25)
    if number % 7 == 3:
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        }
        schema["properties"]["tree"] = {"$ref": "#/$defs/node"}  # type: ignore[index]
    if number % 11 == 5:
        for place in range(30):
            schema["properties"][f"option_{place}"] = _leaf(chosen)  # type: ignore[index]
    return schema


def _object(chosen: random.Random, depth: int, keys: int) -> Schema:
    names = [f"{chosen.choice(WORDS)}_{place}" for place in range(max(1, keys))]
    properties = {name: _value(chosen, depth - 1) for name in names}
    required = [name for name in names if chosen.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(chosen: random.Random, depth: int) -> Schema:
    if depth > 0 and chosen.random() < 0.4:
        return _object(chosen, depth, keys=chosen.randint(1, 3))
    if chosen.random() < 0.25:
        least = chosen.randint(0, 2)
        return {"type": "array", "items": _leaf(chosen), "minItems": least, "maxItems": least + chosen.randint(0, 3)}
    if chosen.random() < 0.15:
        return {"anyOf": [_leaf(chosen), {"type": "null"}]}
    return _leaf(chosen)


def _leaf(chosen: random.Random) -> Schema:
    low = chosen.randint(-50, 50)
    choices: list[Schema] = [
        {"type": "string", "maxLength": chosen.randint(1, 12)},
        {"type": "string", "pattern": chosen.choice(PATTERNS)},
        {"type": "string", "format": chosen.choice(FORMATS)},
        {"type": "integer", "minimum": low, "maximum": low + chosen.randint(0, 900)},
        {"type": "number", "minimum": low, "maximum": low + 1, "multipleOf": 0.25}
        if chosen.random() < 0.2
        else {"type": "integer", "exclusiveMinimum": low, "maximum": low + 20},
        {"type": "boolean"},
        {"enum": chosen.sample(["a", "b c", 1, 2.5, True, None, 'q"\n'], chosen.randint(1, 4))},
        {"const": chosen.choice(["x", 0, False])},
    ]
    return chosen.choice(choices)
