"""A JSON object checked against what a body may have; any thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from millpond.http.errors import bad_value, missing

M = TypeVar("M", bound=BaseModel)


def checked(kind: type[M], fields: Mapping[str, object]) -> M:
    """``fields`` as a ``kind``, whose descriptions complete "must be …"; a field that is null counts as absent. Raises
    ApiError 400 naming the field, the value and what is allowed."""
    given = {name: fields[name] for name in kind.model_fields if fields.get(name) is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        allowed = kind.model_fields[name].description or "valid"
        raise (bad_value(name, given[name], allowed) if name in given else missing(name, allowed)) from error
