"""Grammars as texts, in llguidance's form of Lark: rules in small letters, terminals in capitals, `%json` for schemas.

JSON is written as chat templates write it, one blank at most behind commas and colons: models are used to that, and
without end to white space an answer could consist of nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llguidance import regex_to_lark

from millpond.grammar.check import MOST_CHARACTERS, GrammarError
from millpond.types import Symbol

MOST_WORK = 30_000
"""Fields of schemas that are looked at for one grammar."""

_SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LENIENT = {"lenient": True, "coerce_one_of": True}


def literal(text: str) -> str:
    """A text that stands as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def written(symbol: Symbol) -> str:
    """The token itself where it is one, which no letters can be taken for."""
    return literal(symbol.text) if symbol.token < 0 else f"<[{symbol.token}]>"


def regex(pattern: str) -> str:
    """A text that matches a regular expression as a whole. Its digits and letters are ASCII's."""
    return f"/{between_slashes(pattern)}/"


def between_slashes(pattern: str) -> str:
    """A regular expression as it stands in a terminal."""
    return regex_to_lark(pattern, "dw").replace("\n", "\\n")


def json_value(schema: Mapping[str, object], *, strict: bool, escapes: str | None = None) -> str:
    """A JSON value by its schema. ``strict``: a grammar with keywords that cannot be followed is no grammar; else they
    are left out. ``escapes``: the letters that may follow a backslash; None: all that JSON has."""
    how = _SPACES | ({} if strict else _LENIENT) | ({} if escapes is None else {"json_allowed_escapes": escapes})
    return "%json " + json.dumps({**schema, "x-guidance": how}, ensure_ascii=False)


def alternatives(*choices: str) -> str:
    """One of them."""
    return "(" + " | ".join(choices) + ")"


@dataclass
class Rules:
    """A grammar in the making. Whatever makes it longer or more work than anybody will do raises GrammarError."""

    _bodies: dict[str, str] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict)
    """Name by what it was made for."""
    _characters: int = 0
    _work: int = 0

    def work(self, amount: int) -> None:
        """So much of a schema is looked at: references can make one look at the same again and again."""
        self._work += amount + 1
        if self._work > MOST_WORK:
            raise GrammarError("it has too many alternatives to be followed in the way in which this model calls")

    def add(self, name: str, body: str) -> str:
        """A rule, or a terminal: its name, in which ``name`` is made one that is not taken. Attributes may follow it in
        brackets."""
        found, attributes = self._free(name)
        self._put(found + attributes, body)
        return found

    def of(self, what: str, name: str, body: Callable[[], str]) -> str:
        """The rule of ``what``, made when it is first asked for; ``body`` may ask for it, too."""
        if what not in self._known:
            self._known[what], _ = self._free(name)
            self._put(self._known[what], body())
        return self._known[what]

    def _free(self, name: str) -> tuple[str, str]:
        """A name that is not taken, and the attributes behind it."""
        bare, bracket, attributes = name.partition("[")
        number = self._counts[bare] = self._counts.get(bare, -1) + 1
        return (f"{bare}_{number}" if number else bare), bracket + attributes

    def once(self, name: str, body: Callable[[], str]) -> str:
        """The same, for what is the same wherever it is needed."""
        if name not in self._bodies:
            self._put(name, body())
        return name

    def _put(self, name: str, body: str) -> None:
        self._characters += len(body)
        if self._characters > MOST_CHARACTERS:
            raise GrammarError(f"its grammar is longer than {MOST_CHARACTERS} characters")
        self._bodies[name] = body

    def text(self, start: str) -> str:
        """The whole grammar of what ``start`` says."""
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in self._bodies.items())]) + "\n"
