"""(M2, M4) Answers that are read: for plain text they are what plain answers are, token for token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import BACKENDS
from tool_tokenizer import write_tool_tokenizer

from millpond.dialects.families import HERMES, THINK
from millpond.dialects.pieces import CallText, Piece, Said, Thought
from millpond.dialects.reader import AnswerReader
from millpond.text.answer import Answer, AnswerText
from millpond.text.decoding import decoding_of
from millpond.text.read_answer import ReadAnswer
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import Tokenizer

DIALECT = replace(HERMES, thoughts=THINK)
DECODINGS = {name: decoding_of(make()) for name, make in BACKENDS.items()}


def steps(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


@pytest.mark.parametrize("name", DECODINGS)
@given(
    tokens=st.lists(st.integers(0, 320), max_size=30),
    stops=st.lists(st.text("ab e\n世<", min_size=1, max_size=3), max_size=2),
    size=st.integers(1, 5),
)
def test_text_is_counted_as_in_a_plain_answer(name: str, tokens: list[int], stops: list[str], size: int) -> None:
    decoding, strings = DECODINGS[name], StopStrings(stops)
    reader = AnswerReader(DIALECT, (), {"f": {}})
    answers: list[AnswerText] = [
        Answer(decoding.detokenizer(), strings),
        ReadAnswer(decoding.detokenizer, reader, {}, strings),
    ]
    seen = []
    for answer in answers:
        text, stopped, settled = "", False, 0
        for step in steps(tokens, size):
            delta = answer.add(step)
            text, stopped, settled = text + delta.text, delta.stopped, settled + delta.tokens
            if stopped:
                break
        if not stopped:
            delta = answer.finish()
            text, stopped, settled = text + delta.text, delta.stopped, settled + delta.tokens
        assert settled == answer.completion_tokens
        seen.append((text, stopped, answer.completion_tokens))
    assert seen[0] == seen[1]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tool_tokenizer(tmp_path / "model"))


ANSWER = (
    "<think>\nThey say END.\n</think>\n\nI look. It may END here, or not.\n"
    '<tool_call>\n{"name": "f", "arguments": {"path": "END"}}\n</tool_call>'
)


@pytest.mark.parametrize("stop", ["END", "It", ".\n", "not.", "I look. It", "nowhere"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_stop_strings_cut_what_is_said(tokenizer: Tokenizer, stop: str, size: int) -> None:
    tokens = tokenizer.text_tokens(ANSWER, parse_special=True)
    answer = tokenizer.read_answer(StopStrings([stop]), [], {"f": {}})
    pieces: list[Piece] = []
    settled = 0
    stopped = False
    for step in steps(tokens, size):
        delta = answer.add(step)
        pieces, settled, stopped = [*pieces, *delta.pieces], settled + delta.tokens, delta.stopped
        if stopped:
            break
    else:
        delta = answer.finish()
        pieces, settled, stopped = [*pieces, *delta.pieces], settled + delta.tokens, delta.stopped
    said = "".join(piece.text for piece in pieces if isinstance(piece, Said))
    whole = "I look. It may END here, or not."
    assert said == whole.partition(stop)[0]
    assert stopped == (stop in whole)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought)) == "They say END."
    assert any(isinstance(piece, CallText) for piece in pieces) == (stop not in whole)
    thought = len(tokenizer.text_tokens(ANSWER.partition("</think>")[0], parse_special=True)) + 1
    assert answer.thought_tokens in (thought, thought - 1)
    if not stopped:
        assert settled == answer.completion_tokens == len(tokens)
        return
    counted = tokenizer.decode(tokens[: answer.completion_tokens])
    assert said in counted
    assert said not in tokenizer.decode(tokens[: answer.completion_tokens - 1]) or not said
    assert settled == answer.completion_tokens


@pytest.mark.parametrize(
    ("opening", "thinking"), [("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n\n", False)]
)
def test_a_prompt_may_open_a_thought(tokenizer: Tokenizer, opening: str, thinking: bool) -> None:
    prompt = tokenizer.text_tokens(f"<|im_start|>assistant\n{opening}", parse_special=True)
    answer = tokenizer.read_answer(StopStrings(()), prompt, None)
    pieces = [*answer.add(tokenizer.text_tokens("Hm.")).pieces, *answer.finish().pieces]
    assert {type(piece) for piece in pieces} == {Thought if thinking else Said}
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought | Said)) == "Hm."
