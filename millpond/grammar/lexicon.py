"""The tokens of a model as grammars see them: made once, at an engine's start, and read by any thread from then on.

Building it holds the interpreter for up to seconds, so nobody may be waiting for tokens meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from llguidance import LLMatcher, LLTokenizer

from millpond.grammar.check import GrammarError, errors_for_panics, limits

_TRIED = 200
"""Tokens that are compared."""


def first_line(error: str) -> str:
    """What llguidance says, without what it says about the place."""
    return error.partition("\n")[0]


class LexiconError(Exception):
    """Grammars cannot be followed in this vocabulary, and why."""


class Lexicon:
    """``size`` tokens, those included that only fill the model's logits up."""

    def __init__(
        self, backend: str, tokens: int, size: int, ends: Collection[int], bytes_of: Callable[[int], bytes]
    ) -> None:
        """``backend``: the tokenizer as tokenizer.json has it, with so many ``tokens``. ``size``: width of the logits.
        ``ends``: ids that end answers. ``bytes_of``: what a token stands for. Raises LexiconError."""
        if not ends:
            raise LexiconError("no token ends an answer")
        try:
            self._tokens = LLTokenizer(backend, n_vocab=max(size, tokens), eos_token=sorted(ends))
        except Exception as error:  # whatever a foreign file makes it raise
            raise LexiconError(f"its tokenizer cannot be used for grammars: {error}") from error
        self.size = size
        self._agrees(min(tokens, size), bytes_of)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of an answer; takes milliseconds. Raises GrammarError."""
        with errors_for_panics():
            found = LLMatcher(self._tokens, grammar, log_level=0, limits=limits())
            if not found.is_error():
                found.compute_bitmask()  # the first one takes longest
        if found.is_error():
            raise GrammarError(first_line(found.get_error()))
        return found

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return self._tokens.decode_bytes([token])

    def _agrees(self, tokens: int, bytes_of: Callable[[int], bytes]) -> None:
        """A vocabulary that is read in another way than answers are would forbid the wrong tokens."""
        chosen = random.Random(0)  # noqa: S311 - no secret
        for token in sorted(chosen.sample(range(tokens), min(tokens, _TRIED))):
            mine, theirs = self.bytes_of(token), bytes_of(token)
            if mine != theirs and not self._tokens.is_special_token(token):
                raise LexiconError(f"token {token} is {theirs!r}, and grammars would take it for {mine!r}")
