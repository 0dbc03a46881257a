"""How many values a JSON text has, against a count by hand, however it is cut."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.http import values
from millpond.http.errors import ApiError
from millpond.http.json_body import LARGE, MOST_NAMES, JsonBodies, TooLarge
from millpond.http.values import more_names_than, more_values_than

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
    assert JsonBodies(1000).read(body)["prompt"]


@pytest.mark.parametrize("more", ["[]", "1", '""', "{}", '{"a":1}'])
def test_too_many_are_refused_before_any_is_made(more: str) -> None:
    body = bytearray(('{"prompt":[' + ",".join([more] * 1000) + "]}").encode())
    with pytest.raises(ApiError, match="1000 values") as raised:
        JsonBodies(1000).read(body)
    assert raised.value.status == 413
    assert raised.value.code == "too_many_values"
    assert JsonBodies(6000).read(body)


@pytest.mark.parametrize("name", ["temperature", "nobody_has_this", "metadata"])
def test_of_what_no_field_may_have_nothing_is_made(name: str) -> None:
    """Names and numbers without end where a few may be would hold everybody up while they are made."""
    pairs = json.dumps({f"k{number}": number for number in range(LARGE // 10)})
    body = bytearray(f' {{"prompt":{pairs},"{name}":{pairs},"seed":1}}'.encode())
    read = JsonBodies(1_000_000).read(body)
    assert (read["prompt"], read["seed"]) == (json.loads(pairs), 1)
    assert read[name] == TooLarge(len(pairs))
    assert JsonBodies(1_000_000).read(bytearray(body.replace(b" ", b"")[:-1] + b"}"))["seed"] == 1


@given(value=st.dictionaries(st.text(), JSON, max_size=12), size=st.integers(1, 9), plain=st.booleans())
def test_names_of_the_whole_are_counted(value: dict[str, object], size: int, plain: bool) -> None:
    """(B14) Whatever is in the values."""
    body = bytearray(json.dumps(value, ensure_ascii=plain).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "PIECE", size)
        assert not more_names_than(body, max(1, len(value)))
        assert len(value) < 2 or more_names_than(body, len(value) - 1)


def test_names_without_end_are_refused_before_any_is_made() -> None:
    """(B14) Of a hundred thousand nothing is known but their number; a long list is none."""
    names = ",".join(f'"k{number}":0' for number in range(MOST_NAMES))
    listed = f'"prompt":[{"1," * LARGE}1]'
    assert len(JsonBodies(1_000_000).read(bytearray(f"{{{names[7:]},{listed}}}".encode()))) == MOST_NAMES
    with pytest.raises(ApiError, match=f"more than {MOST_NAMES} fields") as raised:
        JsonBodies(1_000_000).read(bytearray(f"{{{names},{listed}}}".encode()))
    assert raised.value.status == 413


@pytest.mark.parametrize("long", ["[" + "1," * LARGE + "1]", '"' + "a" * LARGE + '"', "1" * LARGE])
def test_large_bodies_are_json_objects(long: str) -> None:
    with pytest.raises(ApiError, match=rf"body: must be a JSON object, got {len(long)} bytes|valid JSON"):
        JsonBodies(1_000_000).read(bytearray(long.encode()))
    for bad in (f'{{"junk":{long}', f'{{"junk":{long}}} 1', f'{{"junk":{long},}}', f'{{"junk":{long},"prompt":"\\x"}}'):
        with pytest.raises(ApiError, match="the body is not valid JSON"):
            JsonBodies(1_000_000).read(bytearray(bad.encode()))


def test_large_values_are_made_one_at_a_time() -> None:
    """While one is, others' small ones need not wait."""
    bodies, done = JsonBodies(1000), threading.Event()
    large, small = (bytearray(json.dumps({"prompt": "a" * size}).encode()) for size in (LARGE, LARGE - 100))

    def read() -> None:
        bodies.read(large)
        done.set()

    waiting = threading.Thread(target=read)
    with bodies._turn:
        waiting.start()
        assert bodies.read(small)
        assert not done.wait(0.2)
    assert done.wait(20)
    waiting.join()
