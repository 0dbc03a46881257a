"""Whether a grammar is one, before anybody works for it: schemas and grammars are what strangers send.

No tokenizer is needed, and no engine. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits

from millpond.grammar.levels import MOST_LEVELS, TooManyError, levels_of

MOST_STEP = 1000
MOST_PATTERNS = 50
"""Names that are patterns, of a schema: each is compared with each."""
MOST_CHARACTERS = 1 << 20
"""Of a grammar, with all that it is made of."""
_PLACE = re.compile(r"\s*\n\s+\d+ \| .*", re.DOTALL)
_WHERE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_PLACES = ("$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef")
_TEXTS = ("$ref", "pattern", "format")
_LISTS = ("required", "type")
_DATA = ("enum", "const", "default", "examples")
_IGNORED = re.compile(r'"([^"]+)"')


class GrammarError(ValueError):
    """What cannot be followed as a grammar, in words for whoever sent it."""


def limits() -> LLParserLimits:
    """What a grammar may take to be followed. Errors quote nothing of the grammar or of the answer."""
    return LLParserLimits(verbose_errors=False)


@contextmanager
def errors_for_panics() -> Iterator[None]:
    """What llguidance did not expect is no Exception; it is about the grammar alone. Raises GrammarError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GrammarError("it has something that cannot be followed") from None


def check_schema(schema: Mapping[str, object]) -> None:
    """Refuses what llguidance accepts, and takes all memory for: an automaton has a state for each remainder of a
    division. And what it accepts, and ends the process for. Raises GrammarError."""
    try:
        levels = levels_of(schema)
    except TooManyError:
        raise GrammarError("it is too large to be followed") from None
    if levels > MOST_LEVELS:
        raise GrammarError(f"it has {levels} levels, with its references followed; allowed: {MOST_LEVELS}")
    patterns = 0
    waiting: list[tuple[object, bool, bool]] = [(schema, False, False)]
    while waiting:
        part, together, data = waiting.pop()
        if isinstance(part, Mapping):
            if not data:
                _check_words(part, below=part is not schema)
            step, named = part.get("multipleOf"), part.get("patternProperties")
            if isinstance(step, int | float) and not isinstance(step, bool) and (together or not _small(step)):
                raise GrammarError(f"multipleOf is {step}; allowed: up to three digits, and not within allOf")
            patterns += len(named) if isinstance(named, Mapping) else 0
            if patterns > MOST_PATTERNS:
                raise GrammarError(f"it has more than {MOST_PATTERNS} patternProperties")
            waiting += [(value, together or name == "allOf", data or name in _DATA) for name, value in part.items()]
        elif isinstance(part, list):
            waiting += [(value, together, data) for value in part]


def _check_words(part: Mapping[str, object], *, below: bool) -> None:
    """What stands in a schema, or in an object of properties that has such names. ``below``: it is not the whole."""
    reference = part.get("$ref")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        raise GrammarError(f"$ref is {reference[:100]!r}; allowed: # and what begins with #/")
    for name in _PLACES if below else _PLACES[1:]:
        if isinstance(part.get(name), str):
            raise GrammarError(f"{name} cannot be followed; allowed: $ref with # and what begins with #/")
    for name in _TEXTS:
        if isinstance(part.get(name), list | int | float) and not isinstance(part.get(name), bool):
            raise GrammarError(f"{name} must be a string")
    for name in _LISTS:
        value = part.get(name)
        if isinstance(value, list) and not all(isinstance(each, str) for each in value):
            raise GrammarError(f"{name} must have strings only")


def _small(step: float) -> bool:
    digits = Decimal(str(step)).normalize().as_tuple().digits
    return 0 < step < MOST_STEP and len(digits) <= len(str(MOST_STEP)) - 1


@lru_cache(maxsize=64)
def check(grammar: str) -> Sequence[str]:
    """What of it is left out, in llguidance's words: keywords of schemas that are not strict. Raises GrammarError."""
    if len(grammar) > MOST_CHARACTERS:
        raise GrammarError(f"it is {len(grammar)} characters long; allowed: {MOST_CHARACTERS}")
    with errors_for_panics():
        wrong, said = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if wrong:
        raise GrammarError(_WHERE.sub("", _PLACE.sub("", said[0])).strip())
    return tuple(_left_out(said))


def _left_out(warnings: Sequence[str]) -> list[str]:
    found: list[str] = []
    for warning in warnings:
        if warning.startswith("Unimplemented keys"):
            found += _IGNORED.findall(warning)
        elif warning.startswith("Unknown format: "):
            found.append("format " + warning.removeprefix("Unknown format: "))
    return found
