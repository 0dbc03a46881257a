"""How the family of a model is found: by what its folder says, and by what its chat template writes.

Marks in the template and in the vocabulary say which family it may be. What decides is whether that family's reader
finds, in what the template itself writes for a call, the call that it was given: a mark may be there for another
reason, and a template may have been changed. Where no family's does, the writing is taken from the template, if it is
JSON between marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from millpond.dialects.call_grammar import json_objects
from millpond.dialects.dialect import Dialect
from millpond.dialects.families import BY_NAME, FAMILIES, GENERIC, OTHER_THOUGHTS, PARSERS, of_objects
from millpond.dialects.json_calls import ARGUMENTS, NAMES

TRIED_NAME = "millpond_probe"
TRIED: Mapping[str, object] = {"a": "x", "n": 1}
"""The arguments of the call that a template is given."""
_MARK = re.compile(r"[<\[{|`]\S{1,62}")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

Reads = Callable[[Dialect], bool]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to know of a model."""

    template: str
    """The text of its chat template."""
    vocabulary: Collection[str]
    """Its added tokens."""
    shows_tools: bool
    """Its template does something with tools; otherwise nothing is ever called."""
    asked: str = "auto"
    """The family that the user names; auto: none."""
    parser: str = ""
    """``tool_parser_type`` of its tokenizer_config.json."""
    declared: Mapping[str, object] = field(default_factory=dict)
    """``response_template`` of the same."""
    call: str = ""
    """What its template writes for a call of TRIED_NAME with TRIED; empty where it writes none."""
    thought: tuple[str, str] | None = None
    """What it writes around a thought."""

    def has(self, text: str) -> bool:
        """Whether a mark is known to the model."""
        return text in self.template or text in self.vocabulary or text in json.dumps(self.declared, ensure_ascii=False)


class Family(NamedTuple):
    """How a model writes, and how that is known."""

    dialect: Dialect
    how: str
    """For people; behind it the family's name would make a sentence."""
    read: bool = True
    """False: its own template writes calls that are not read."""


def find(evidence: Evidence, reads: Reads) -> Family:
    """``reads``: whether a dialect's reader finds the call that was given in what the template wrote."""
    found = _with_calls(evidence, reads)
    dialect = found.dialect
    if not evidence.shows_tools and not dialect.messages:
        dialect = replace(dialect, calls={}, leading=None, section=None)
    if dialect.thoughts is None:
        dialect = replace(dialect, thoughts=_thoughts(evidence))
    return found._replace(dialect=dialect)


def _with_calls(evidence: Evidence, reads: Reads) -> Family:
    asked = BY_NAME.get(evidence.asked)
    if asked is not None:
        return Family(asked, "--tool-format", not evidence.call or asked.messages or reads(asked))
    by_marks = next((dialect for marks, dialect in FAMILIES if all(map(evidence.has, marks))), GENERIC)
    declared = BY_NAME.get(PARSERS.get(evidence.parser, ""))
    likely = [dialect for dialect in (declared, by_marks) if dialect is not None]
    if not evidence.call or by_marks.messages:
        return Family(likely[0], "its marks" if declared is None else f"tool_parser_type {evidence.parser}")
    for dialect in chain(likely, _others(likely), _shaped(evidence.call)):
        if not dialect.messages and reads(dialect):
            return Family(dialect, "what its chat template writes")
    return Family(likely[0], "its marks", read=False)


def _others(likely: Sequence[Dialect]) -> Iterator[Dialect]:
    return (dialect for dialect in BY_NAME.values() if dialect not in likely)


def _shaped(call: str) -> Iterator[Dialect]:
    """Calls as objects between marks that no family has."""
    decoder = json.JSONDecoder()
    for start in (place for place, character in enumerate(call) if character == "{"):
        try:
            value, end = decoder.raw_decode(call, start)
        except ValueError:
            continue
        name = next((key for key in NAMES if isinstance(value, dict) and value.get(key) == TRIED_NAME), None)
        given = next((key for key in ARGUMENTS if name and value.get(key) == TRIED), None)
        before, after = call[:start].strip(), call[end:].strip()
        listed = before.endswith("[") and after.startswith("]")
        if listed:
            before, after = before[:-1].strip(), after[1:].strip()
        if name and given and is_mark(before) and (not after or is_mark(after)):
            yield Dialect(
                "template",
                {before: of_objects(after) if after else of_objects()},
                section=json_objects(after, name=name, arguments=given, listed=listed),
                repeated=not listed,
                inner=(after,) if after else (),
            )


def is_mark(text: str) -> bool:
    """Whether it looks like one, and not like something that might be said."""
    return _MARK.fullmatch(text) is not None


def _thoughts(evidence: Evidence) -> tuple[str, str] | None:
    fields = evidence.declared.get("fields")
    known_fields = fields if isinstance(fields, Mapping) else {}
    for name in _THOUGHTS:
        told = known_fields.get(name)
        opened, closed = (told.get("open"), told.get("close")) if isinstance(told, Mapping) else (None, None)
        if isinstance(opened, str) and isinstance(closed, str) and is_mark(opened.strip()) and is_mark(closed.strip()):
            return opened.strip(), closed.strip()
    known = next((marks for marks in OTHER_THOUGHTS if evidence.has(marks[1])), None)
    return known or evidence.thought
