"""What an answer has to look like: of the tools, the choice among them and the form that a client asks for, a grammar.

Runs in a text thread: schemas are what strangers send, and checking one may take a while.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from millpond.dialects.answer_grammar import Wanted, answer_grammar
from millpond.dialects.call_grammar import Callee, closed
from millpond.grammar.check import GrammarError, check, check_schema
from millpond.grammar.lark import json_value
from millpond.http.errors import ApiError
from millpond.http.form_fields import ANY_OBJECT
from millpond.http.generation_request import AnswerForm, Conversation, GenerationRequest, Tool
from millpond.http.thinking import thought_tokens
from millpond.text.tokenizer import Tokenizer
from millpond.types import Grammar, ModelInfo

MOST_SHOWN = 1000
"""Bytes of a header."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What answers have to look like."""

    grammar: Grammar | None = None
    ignored: tuple[str, ...] = ()
    """What of the schemas is not seen to, each behind the name of its field."""


def shape_of(asked: GenerationRequest, prompt: Sequence[int], tokenizer: Tokenizer, info: ModelInfo) -> Shape:
    """Of the answers to a prompt. Raises ApiError 400."""
    ignored: list[str] = []
    form, chat = asked.form, asked.prompt
    if form is not None:
        ignored += _checked_form(form, info)
    if not isinstance(chat, Conversation):
        text = "" if form is None else f"start: {form.expression}\n"
        return Shape(Grammar(text=text) if text else None, tuple(ignored))
    callees = [_callee(tool, ignored) for tool in chat.callable]
    if chat.must_call and not callees:
        message = "tool_choice: a call is required, and there is no tool that may be called"
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    if chat.must_call and info.grammars:
        raise _unguided("tool_choice", info)
    most = thought_tokens(chat, tokenizer)
    wanted = Wanted(callees, chat.must_call, chat.one_call, "" if form is None else form.expression, most)
    marks, blanks = tokenizer.marks, tokenizer.line_ends
    thinking = tokenizer.in_thought(prompt)

    def made(wanted: Wanted) -> Grammar | None:
        try:
            found = answer_grammar(wanted, tokenizer.dialect, marks, thinking=thinking, blanks=blanks)
        except RecursionError:
            raise GrammarError("it has too many levels to be followed in the way in which this model calls") from None
        if found is not None and found.text:
            check(found.text)
        return found

    try:
        grammar = made(wanted)
    except GrammarError:
        callees = [_fitting(made, wanted, tool, ignored) for tool in callees]
        grammar = _together(made, wanted, callees, ignored)
    if info.grammars:
        return Shape(None, ())
    return Shape(grammar, tuple(ignored))


def _together(
    made: Callable[[Wanted], Grammar | None], wanted: Wanted, callees: Sequence[Callee], ignored: list[str]
) -> Grammar | None:
    """Of tools that fit each by itself. Where all are too much, those that promise nothing have any arguments."""
    try:
        return made(replace(wanted, callees=callees))
    except GrammarError:
        ignored.append("tools: the schemas of all that are not strict")
    free = [callee if callee.strict else Callee(callee.name, ANY_OBJECT) for callee in callees]
    try:
        return made(replace(wanted, callees=free))
    except GrammarError as error:
        message = f"tools: their schemas cannot be followed together: {error}"
        raise ApiError(400, message, param="tools", code="invalid_schema") from error


def _fitting(made: Callable[[Wanted], object], wanted: Wanted, callee: Callee, ignored: list[str]) -> Callee:
    """A tool that has been found to fit its family's writing by itself; one that does not, with any arguments."""
    try:
        made(replace(wanted, callees=[callee]))
    except GrammarError as error:
        if callee.strict:
            message = f"tools: the schema of {callee.name} cannot be followed: {error}"
            raise ApiError(400, message, param="tools", code="invalid_schema") from error
        ignored.append(f"tools: the schema of {callee.name}")
        return Callee(callee.name, ANY_OBJECT)
    return callee


def _callee(tool: Tool, ignored: list[str]) -> Callee:
    """A tool as it can be called; where its schema cannot be followed, and need not be, with any arguments."""
    try:
        check_schema(tool.parameters)
        left_out = check("start: " + json_value(closed(tool.parameters), strict=tool.strict) + "\n")
    except GrammarError as error:
        if tool.strict:
            raise ApiError(400, f"{tool.where}: {error}", param=tool.where, code="invalid_schema") from error
        ignored.append(f"{tool.where}: all of it")
        return Callee(tool.name, ANY_OBJECT)
    ignored += [f"{tool.where}: {name}" for name in left_out]
    return Callee(tool.name, tool.parameters, tool.strict)


def _checked_form(form: AnswerForm, info: ModelInfo) -> list[str]:
    if info.grammars:
        raise _unguided(form.param, info)
    try:
        return [f"{form.param}: {name}" for name in check(f"start: {form.expression}\n")]
    except GrammarError as error:
        raise ApiError(400, f"{form.param}: {error}", param=form.param, code="invalid_schema") from error


def _unguided(param: str, info: ModelInfo) -> ApiError:
    message = f"{param}: answers of this model cannot be made to follow a grammar: {info.grammars}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


def ignored_header(ignored: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Says what of the schemas is not seen to; nothing where all is."""
    if not ignored:
        return []
    plain = re.sub("[^ -~]", "?", ", ".join(dict.fromkeys(ignored)))  # clients choose some of these words
    shown = plain.encode()[:MOST_SHOWN]
    return [(b"x-millpond-ignored", shown)]
