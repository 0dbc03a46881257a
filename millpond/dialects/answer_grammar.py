"""What an answer has to look like, by what its client wants of it and how its model's family writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.dialects import channels
from millpond.dialects.call_grammar import Callee, Calls
from millpond.dialects.dialect import Dialect
from millpond.grammar.lark import Rules, alternatives, literal
from millpond.types import Grammar, Symbol, Thinking


@dataclass(frozen=True)
class Wanted:
    """What a client wants of an answer."""

    callees: Sequence[Callee] = ()
    """Tools that it may call."""
    must_call: bool = False
    """It has to call one of them."""
    one_call: bool = False
    form: str = ""
    """What is said has to be this, as an expression of a grammar; empty: it may be anything."""
    most_thought: int | None = None
    """Tokens of thoughts; None: no limit."""


def answer_grammar(
    wanted: Wanted, dialect: Dialect, tokens: Mapping[str, int], *, thinking: bool, blanks: Sequence[int]
) -> Grammar | None:
    """None: it may look like anything. ``tokens``: the dialect's marks that are tokens of their own, with their ids.
    ``thinking``: the prompt ends within a thought. ``blanks``: ids of line ends."""
    rules = Rules()
    calls = Calls(tokens, wanted.callees, wanted.one_call, rules)
    watched = bool(wanted.callees) and not wanted.must_call and not wanted.form
    triggers: list[Symbol] = []
    start = ""
    if dialect.messages:
        start = "" if watched else _messages(wanted, calls)
    elif watched:
        mark = next(iter(dialect.calls), "") if dialect.section is not None else ""
        if mark:
            triggers = [Symbol(mark, tokens.get(mark, -1))]
            opening = _after(mark, rules) if triggers[0].token < 0 else calls.spell(mark)
            start = _calls(dialect, calls, opening)
    else:
        choices = []
        if wanted.callees and dialect.section is not None:
            mark = "" if dialect.leading is not None else next(iter(dialect.calls), "")
            choices.append(_calls(dialect, calls, calls.spell(mark)))
        if wanted.form and not wanted.must_call:
            choices.append(wanted.form)
        start = alternatives(*choices) if choices else ""
    thoughts = _thinking(wanted, dialect, tokens, thinking=thinking, blanks=blanks)
    if thinking and thoughts is None and start and not triggers and dialect.thoughts is not None:
        start = f"{_after(dialect.thoughts[1], rules)} {calls.line()} {calls.line()} {start}"
    if not start and (thoughts is None or thoughts.most is None):
        return None
    return Grammar(text=rules.text(start) if start else "", triggers=triggers, thinking=thoughts)


def _calls(dialect: Dialect, calls: Calls, opening: str) -> str:
    assert dialect.section is not None
    section = dialect.section(calls)
    first = f"{opening} {section}"
    if not dialect.repeated or calls.one:
        return first
    again = calls.spell(next(iter(dialect.calls)))
    return f"{first} ({calls.line()} {again} {section})*"


def _messages(wanted: Wanted, calls: Calls) -> str:
    """Of answers in messages: thoughts, then a call or what is said to the user. Where both may come nothing is asked:
    letters that would announce a call stand in thoughts, too."""
    constrained = f"({literal(' ')} {calls.spell(channels.CONSTRAIN + 'json')})? {calls.spell(channels.MESSAGE)}"
    callee = (
        calls.each(lambda one: f"{literal(one.name)} {constrained} {calls.arguments(one)}") if wanted.callees else ""
    )
    text = calls.rules.once("ANY", lambda: "/(?s:.+)/")
    analysis = f"{calls.spell(channels.CHANNEL + 'analysis' + channels.MESSAGE)} {text} {calls.spell('<|end|>')} "
    choices = []
    if wanted.callees:
        choices.append(f"{calls.spell(channels.CHANNEL + 'commentary ' + channels.TO)} {callee}")
    if wanted.form and not wanted.must_call:
        choices.append(f"{calls.spell(channels.CHANNEL + 'final' + channels.MESSAGE)} {wanted.form}")
    if not choices:
        return ""
    return f"({analysis} {calls.spell(channels.START + 'assistant')})? {alternatives(*choices)}"


def _after(mark: str, rules: Rules) -> str:
    """All up to behind a mark that is spelled in letters."""
    pattern = "".join(f"\\x{{{ord(character):x}}}" for character in mark)
    return rules.add("after[lazy]", f"/(?s:.*){pattern}/")


def _thinking(
    wanted: Wanted, dialect: Dialect, tokens: Mapping[str, int], *, thinking: bool, blanks: Sequence[int]
) -> Thinking | None:
    """None where thoughts do not show as tokens."""
    marks = dialect.thoughts
    if marks is None or marks[0] not in tokens or marks[1] not in tokens:
        return None
    begins, ends = (tokens[mark] for mark in marks)
    return Thinking(begins, ends, thinking, wanted.most_thought, list(blanks))
