"""Whether a grammar is one, before anybody works for it: schemas and grammars are what strangers send.

No tokenizer is needed, and no engine. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits

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


@lru_cache(maxsize=256)
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
