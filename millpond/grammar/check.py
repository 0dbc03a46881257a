"""Whether a grammar is one, before anybody works for it: schemas and grammars are what strangers send.

No tokenizer is needed, and no engine. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits

from millpond.grammar.levels import MOST_LEVELS, TooManyError, levels_of

MOST_STEP = 1000
MOST_CHARACTERS = 1 << 20
"""Of a grammar, with all that it is made of."""
_PLACE = re.compile(r"\s*\n\s+\d+ \| .*", re.DOTALL)
_WHERE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_IGNORED = re.compile(r'"([^"]+)"')


class GrammarError(ValueError):
    """What cannot be followed as a grammar, in words for whoever sent it."""


def limits() -> LLParserLimits:
    """What a grammar may take to be followed. Errors quote nothing of the grammar or of the answer."""
    return LLParserLimits(verbose_errors=False)


def check_schema(schema: Mapping[str, object]) -> None:
    """Refuses what llguidance accepts, and takes all memory for: an automaton has a state for each remainder of a
    division. And what it accepts, and ends the process for. Raises GrammarError."""
    try:
        levels = levels_of(schema)
    except TooManyError:
        raise GrammarError("it is too large to be followed") from None
    if levels > MOST_LEVELS:
        raise GrammarError(f"it has {levels} levels, with its references followed; allowed: {MOST_LEVELS}")
    waiting: list[tuple[object, bool]] = [(schema, False)]
    while waiting:
        part, together = waiting.pop()
        if isinstance(part, Mapping):
            step = part.get("multipleOf")
            if isinstance(step, int | float) and not isinstance(step, bool) and (together or not _small(step)):
                raise GrammarError(f"multipleOf is {step}; allowed: up to three digits, and not within allOf")
            waiting += [(value, together or name == "allOf") for name, value in part.items()]
        elif isinstance(part, list):
            waiting += [(value, together) for value in part]


def _small(step: float) -> bool:
    digits = Decimal(str(step)).normalize().as_tuple().digits
    return 0 < step < MOST_STEP and len(digits) <= len(str(MOST_STEP)) - 1


@lru_cache(maxsize=64)
def check(grammar: str) -> Sequence[str]:
    """What of it is left out, in llguidance's words: keywords of schemas that are not strict. Raises GrammarError."""
    if len(grammar) > MOST_CHARACTERS:
        raise GrammarError(f"it is {len(grammar)} characters long; allowed: {MOST_CHARACTERS}")
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
