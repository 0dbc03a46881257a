"""What the APIs have in common about the form of an answer: schemas, and how large they may be."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.grammar.check import GrammarError, check_schema
from millpond.grammar.lark import json_value
from millpond.http.errors import ApiError, bad_value
from millpond.http.generation_request import AnswerForm
from millpond.http.values import deeper_than

ANY_OBJECT: Mapping[str, object] = {"type": "object", "additionalProperties": True}
MOST_DEEP = 32
"""Levels of a schema."""
MOST_CHARACTERS = 65_536
"""Of a schema, a grammar or all choices."""
SCHEMA = f"a JSON schema of at most {MOST_CHARACTERS} characters and {MOST_DEEP} levels"


def schema_form(schema: object, param: str, *, strict: bool) -> AnswerForm:
    """The form that a schema asks for. Raises ApiError 400."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping) or deeper_than(schema, MOST_DEEP):
        raise bad_value(param, schema, SCHEMA)
    try:
        check_schema(schema)
    except GrammarError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_schema") from error
    expression = json_value(schema, strict=strict)
    bounded(len(expression), param)
    return AnswerForm(param, expression)


def bounded(characters: int, param: str) -> None:
    """Raises ApiError 400 for what is too long."""
    if characters > MOST_CHARACTERS:
        message = f"{param}: must be at most {MOST_CHARACTERS} characters long, got {characters}"
        raise ApiError(400, message, param=param, code="invalid_value")
