"""(M2) Forty hostile answers in every family's writing: the same calls and texts however they come in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from answers_read import Read, cuts, put_together, read, tokens_of
from family_calls import MARKED, RAW, WRITTEN, Arguments, schema_of
from tiny_tokenizers import CHATML, byte_level_backend, write_folder
from tokenizers import AddedToken

from millpond.dialects.dialect import Dialect
from millpond.dialects.families import BY_NAME, THINK
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import Tokenizer

ARGUMENTS: Arguments = {"path": "a/b", "count": 3}
TEXTS = {
    "braces": "}{][ {x: [1, 2}",
    "quotes": "He said: \"no\" and 'yes', `maybe`",
    "backslashes": "\\ \\n \\\\ \\u00e9 C:\\new",
    "lines": "\n\tone\r\n\n  two",
    "letters": "ü 漢字 🧑\u200d🚀 \u2028 e\u0301",
    "a number": "007",
    "a word": "null",
    "of python": "f(a=1), None]",
    "nothing": "",
    "blanks": "   ",
    "a thought": "</think> <think>",
    "an end": "<|im_end|></s><|eot_id|>",
    "a call": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "a fence": '```json\n{"name": "f", "arguments": {}}\n```',
    "markup": "<b>bold</b> <!-- no --> </p",
}
"""What texts within arguments may be like."""
VALUES: dict[str, object] = {
    "large": 9007199254740993,
    "negative": -(2**70),
    "tiny": 1e-07,
    "yes": True,
    "none": None,
    "nested": {"a": [1, {"b": ["}"]}], "c": {}},
    "list": [],
    "object": {},
}


def hostile(name: str) -> Iterator[tuple[str, str, Arguments | None]]:
    """What is odd, the answer, and, where nothing else would do, the arguments of the one call that it is."""
    written = WRITTEN[name]
    for title, text in TEXTS.items():
        exact = name not in (*MARKED, *RAW) or "<" not in text
        yield f"text: {title}", written({"path": text, "count": 3}), {"path": text, "count": 3} if exact else None
    for title, value in VALUES.items():
        yield f"value: {title}", written({"path": value}), {"path": value}
    plain = written(ARGUMENTS)
    yield "no arguments", written({}), {}
    yield "text before", f"I will. {{1}}\n\n{plain}", None
    yield "text behind", f"{plain}\nAnd so on.", None
    yield "blanks around", f"\n\n {plain}\n\n", None
    yield "twice", f"{plain}\n{plain}", None
    yield "its end twice", plain + plain[-12:], None
    yield "its end alone", plain[-12:], None
    yield "no name", plain.replace("f", "", 1), None
    yield "behind a thought", f"<think>\nI see. {{\n</think>\n\n{plain}", None
    yield "within a thought", f"<think>\nI see.\n{plain}", None
    yield "a thought without an end", "<think>\nStill", None
    for title, share in (("a quarter", 0.25), ("a half", 0.5), ("three quarters", 0.75)):
        yield f"{title} of it", plain[: int(share * len(plain))], None
    yield "all but its last letter", plain[:-1], None
    yield "begun, and then text", f"{plain[:9]} is how it begins.", None
    yield "another family's", WRITTEN["deepseek" if name == "hermes" else "hermes"](ARGUMENTS), None


def as_it_is_read(name: str) -> Dialect:
    dialect = BY_NAME[name]
    return dialect if dialect.thoughts or dialect.messages else replace(dialect, thoughts=THINK)


def test_there_are_forty_for_every_family() -> None:
    assert WRITTEN.keys() == BY_NAME.keys()
    assert {len(list(hostile(name))) for name in WRITTEN} == {40}


@pytest.mark.often("hermes-", "qwen_coder-")
@pytest.mark.parametrize("by_token", [True, False], ids=["tokens", "letters"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_at_every_cut(name: str, by_token: bool) -> None:
    dialect = as_it_is_read(name)
    marks = dialect.marks if by_token or dialect.messages else ()
    for title, wire, arguments in hostile(name):
        tools = {"f": schema_of(arguments or ARGUMENTS)}
        whole, *others = cuts(tokens_of(wire, marks))
        found = read(dialect, whole, tools, marks)
        for parts in others:
            assert read(dialect, parts, tools, marks) == found, (title, parts)
        if arguments is not None:
            assert [(called, json.loads(text)) for called, text in found.calls] == [("f", arguments)], title
            assert (found.whole, found.said, found.thought) == ([True], "", ""), title
        if not dialect.messages:
            assert written_somewhere(found, wire), title


def written_somewhere(found: Read, wire: str) -> bool:
    """Nothing that is told is made up: what is said and thought stands in the answer, in pieces."""
    return all(word in wire for text in (found.said, found.thought) for word in text.split())


@pytest.mark.often("hermes", "mistral", "harmony", "qwen_coder")
@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_for_tokens_that_come_together(name: str, tmp_path: Path) -> None:
    """As they do where draft tokens were right: one, some, all at once."""
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in (*BY_NAME[name].marks, *THINK)])
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    folder = write_folder(tmp_path / "model", backend, settings, {"model_type": "llama", "vocab_size": 1000})
    tokenizer = Tokenizer.load(folder, name)
    assert tokenizer.dialect.name == name
    for title, wire, arguments in hostile(name):
        tokens = tokenizer.text_tokens(wire, parse_special=True)
        tools = {"f": schema_of(arguments or ARGUMENTS)}
        found = told(tokenizer, tools, tokens, 1)
        for size in (2, 3, 4, 5, 7, 9, len(tokens)):
            assert told(tokenizer, tools, tokens, size) == found, (title, size)


def told(tokenizer: Tokenizer, tools: dict[str, object], tokens: Sequence[int], size: int) -> tuple[Read, int, int]:
    answer = tokenizer.read_answer(StopStrings(()), [], tools)
    steps = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    pieces = [piece for step in steps for piece in answer.add(step).pieces]
    pieces += answer.finish().pieces
    return put_together(pieces), answer.completion_tokens, answer.thought_tokens
