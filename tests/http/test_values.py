"""How many values a JSON text has, against a count by hand, however it is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.http import values
from millpond.http.body import json_object
from millpond.http.errors import ApiError
from millpond.http.values import more_values_than

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('a,:[{"\\\n', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('b,"\\', max_size=3), inner, max_size=3),
    max_leaves=12,
)


def counted(text: str) -> int:
    """One, and one for each comma, colon and opening bracket that is in no string."""
    count, inside, position = 1, False, 0
    while position < len(text):
        char = text[position]
        if inside and char == "\\":
            position += 1
        elif char == '"':
            inside = not inside
        elif not inside:
            count += char in ",:[{"
        position += 1
    return count


@settings(max_examples=300, deadline=None)
@given(value=JSON, size=st.integers(1, 9), most=st.integers(0, 20), plain=st.booleans())
def test_as_many_as_there_are(value: object, size: int, most: int, plain: bool) -> None:
    text = json.dumps(value, ensure_ascii=plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "PIECE", size)
        assert more_values_than(bytearray(text.encode()), most) == (counted(text) > most)


@pytest.mark.parametrize("text", ['"' + "\\" * 7, "\\" * 9 + '"', '"a', '"' * 5, "", "é" * 9, '{"a":"\\'])
def test_no_json_is_no_trouble(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "PIECE", 2)
        assert not more_values_than(bytearray(text.encode()), 20)


def test_what_is_in_strings_does_not_count() -> None:
    """A long text full of commas is one value."""
    body = bytearray(json.dumps({"prompt": '",[{:\\' * 100_000}).encode())
    assert json_object(body, 1000)["prompt"]


@pytest.mark.parametrize("more", ["[]", "1", '""', "{}", '{"a":1}'])
def test_too_many_are_refused_before_any_is_made(more: str) -> None:
    body = bytearray(('{"prompt":[' + ",".join([more] * 1000) + "]}").encode())
    with pytest.raises(ApiError, match="1000 values") as raised:
        json_object(body, 1000)
    assert raised.value.status == 413
    assert raised.value.code == "too_many_values"
    assert json_object(body, 6000)
