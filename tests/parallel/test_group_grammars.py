"""Two ranks follow grammars as one does: rank 0 alone knows of them, and what it draws counts (M3)."""

from __future__ import annotations

from pathlib import Path

from engine_driver import request
from group_driver import Group, text
from guided import END, THOUGHT, call_grammar, guided, id_of, object_grammar, save_guided, thinking
from msgspec.structs import replace
from tiny_models import prompt

from millpond.types import Finish, Grammar, Request, SpecMode, Speculation

SHAPES: tuple[Grammar | None, ...] = (
    object_grammar(),
    None,
    replace(object_grammar(), thinking=thinking(begun=True, most=12)),
    call_grammar(),
    Grammar(text="start: /(ab|cd)+/\n"),
)
BIAS = {id_of(END): 3.0, id_of(THOUGHT): 3.0}


def requests(tag: str, speculation: Speculation | None = None) -> list[Request]:
    made = []
    for number, shape in enumerate(SHAPES * 2):
        params = {"temperature": 0.9, "seed": number, "logit_bias": BIAS, "min_tokens": number % 3}
        if number % 4 == 3:
            params["repetition_penalty"] = 1.2
        one = guided(request(f"{tag}{number}", prompt(30 + 9 * number, number), 60, **params), shape)
        made.append(replace(one, speculation=speculation))
    return made


def test_two_ranks_answer_what_one_answers(tmp_path: Path) -> None:
    folder = save_guided("llama", tmp_path / "model")
    forced = Speculation(mode=SpecMode.NGRAM, adaptive=False)
    with Group(folder, 1, tmp_path / "one") as one:
        assert one.ready().grammars == ""
        expected = [text(outcome) for outcome in one.answers(requests("a")).values()]
        one.stop()
    with Group(folder, 2, tmp_path / "two") as two:
        assert two.ready().grammars == ""
        plain = two.answers(requests("plain"))
        assert [text(outcome) for outcome in plain.values()] == expected
        drafted = two.answers(requests("drafted", forced))
        assert [text(outcome) for outcome in drafted.values()] == expected
        assert two.stop() == [0, 0]
    assert sum(finish is Finish.STOP for _, finish in expected) >= 4
    assert any(outcome.accepted for outcome in drafted.values())
