"""(M2) Whatever arguments are: written as a family's template writes them, cut anywhere, they are read as they were."""

from __future__ import annotations

import itertools
import json

import pytest
from answers_read import read, tokens_of
from family_calls import MARKED, RAW, WRITTEN, schema_of
from hypothesis import given
from hypothesis import strategies as st

from millpond.dialects.families import BY_NAME

NAMES = st.text("abc_XYZ09", min_size=1, max_size=8).map(lambda name: "k" + name)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
PLAIN = TEXTS.filter(lambda text: "<" not in text)
"""Without what might be one of a family's marks."""
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)


def values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[object]:
    scalars: st.SearchStrategy[object] = SCALARS | texts
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@pytest.mark.often("hermes", "harmony", "qwen_coder", "mistral", "deepseek_v32")
@pytest.mark.parametrize("name", WRITTEN)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject) -> None:
    texts = PLAIN if name in (*MARKED, *RAW) else TEXTS
    arguments = data.draw(st.dictionaries(NAMES, values(texts), max_size=4))
    dialect = BY_NAME[name]
    wire = WRITTEN[name](arguments)
    marks = dialect.marks if data.draw(st.booleans()) or name == "harmony" else ()
    parts = [
        (is_mark, piece)
        for is_mark, whole in tokens_of(wire, marks)
        for piece in ([whole] if is_mark else cut(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=4))))
    ]
    found = read(dialect, parts, {"f": schema_of(arguments)}, marks)
    ((called, text),) = found.calls
    assert (called, json.loads(text), found.whole, found.said) == ("f", arguments, [True], "")


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, *places, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]
