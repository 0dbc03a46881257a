"""The form of an answer, as clients of OpenAI's API send it (`response_format`) and vLLM's (`structured_outputs`)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from millpond.grammar.check import GrammarError
from millpond.grammar.gbnf import expression_of
from millpond.grammar.lark import alternatives, json_value, literal, regex
from millpond.http.errors import ApiError, bad_value, unsupported
from millpond.http.form_fields import ANY_OBJECT, SCHEMA, bounded, schema_form
from millpond.http.generation_request import AnswerForm

MOST_CHOICES = 1024
FORMAT = "an object whose type is text, json_object or json_schema"
OUTPUTS = "an object with one of json, regex, choice, grammar and json_object"
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def read_response_format(value: object, param: str = "response_format") -> AnswerForm | None:
    """Check a ``response_format`` value; None: anything goes. Raises ApiError 400."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise bad_value(param, value, FORMAT)
    match kind:
        case "text":
            return None
        case "json_object":
            return AnswerForm(param, json_value(ANY_OBJECT, strict=False))
        case "json_schema":
            return _named_schema(value.get("json_schema"), f"{param}.json_schema")
    raise unsupported(f"{param}.type", kind, "text, json_object or json_schema")


def _named_schema(value: object, param: str) -> AnswerForm:
    if not isinstance(value, Mapping):
        raise bad_value(param, value, "an object with name and schema")
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise bad_value(f"{param}.strict", strict, "true or false")
    schema = value.get("schema")
    return schema_form(ANY_OBJECT if schema is None else schema, f"{param}.schema", strict=bool(strict))


def read_structured_outputs(value: object) -> AnswerForm | None:
    """Check a ``structured_outputs`` value; None: anything goes. Raises ApiError 400."""
    param = "structured_outputs"
    if not isinstance(value, Mapping):
        raise bad_value(param, value, OUTPUTS)
    given = {name: found for name, found in value.items() if found is not None and found is not False}
    for name in given:
        if name not in _KINDS:
            raise unsupported(f"{param}.{name}", given[name], "absent")
    if not given:
        return None
    if len(given) > 1:
        raise bad_value(param, sorted(given), OUTPUTS)
    name, found = next(iter(given.items()))
    param = f"{param}.{name}"
    match name:
        case "json":
            return schema_form(_parsed(found, param), param, strict=True)
        case "json_object":
            return AnswerForm(param, json_value(ANY_OBJECT, strict=False))
        case "choice":
            return AnswerForm(param, alternatives(*map(literal, _choices(found, param))))
    if not isinstance(found, str) or not found:
        raise bad_value(param, found, "a string, not empty")
    bounded(len(found), param)
    if name == "regex":
        return AnswerForm(param, regex(found))
    try:
        return AnswerForm(param, expression_of(found))
    except GrammarError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error


def _parsed(value: object, param: str) -> object:
    if not isinstance(value, str):
        return value
    bounded(len(value), param)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise bad_value(param, value, SCHEMA) from None


def _choices(value: object, param: str) -> list[str]:
    allowed = f"a list of 1 to {MOST_CHOICES} strings, none of them empty"
    if not isinstance(value, list) or not 0 < len(value) <= MOST_CHOICES:
        raise bad_value(param, value, allowed)
    if not all(isinstance(choice, str) and choice for choice in value):
        raise bad_value(param, value, allowed)
    bounded(sum(map(len, value)), param)
    return value
