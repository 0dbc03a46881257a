"""Grammars that requests bring along: compiled beside the engine thread, and kept for others that have the same."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from millpond.grammar.check import GrammarError
from millpond.grammar.constraint import Constraint
from millpond.grammar.levels import deep_stacks
from millpond.grammar.lexicon import Lexicon
from millpond.types import Grammar

log = logging.getLogger(__name__)

MOST_KEPT = 64
"""Grammars."""


@dataclass(frozen=True)
class Compiled:
    """What a thread has made of a grammar, for the engine thread."""

    text: str
    matcher: LLMatcher | GrammarError


class Grammars:
    """Engine thread only; ``deliver`` is called by another."""

    def __init__(self, vocabulary: Lexicon | None, deliver: Callable[[Compiled], None]) -> None:
        """``vocabulary``: None where no answer can follow a grammar."""
        self._vocabulary = vocabulary
        self._deliver = deliver
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._asked: set[str] = set()
        """Texts that are being compiled."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def ready(self, grammar: Grammar | None) -> bool:
        """Whether an answer that follows it can begin; else a Compiled is delivered in a while."""
        if grammar is None or not grammar.text or grammar.text in self._known:
            return True
        if self._vocabulary is None:
            raise GrammarError("answers of this model cannot be made to follow a grammar")
        if grammar.text not in self._asked:
            self._asked.add(grammar.text)
            with deep_stacks():  # its thread is started by the first one
                self._thread.submit(self._compile, self._vocabulary, grammar.text)
        return False

    def keep(self, compiled: Compiled) -> None:
        """Take in what was delivered."""
        self._asked.discard(compiled.text)
        if not isinstance(compiled.matcher, GrammarError):
            self._known[compiled.text] = compiled.matcher
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)

    def constraint(self, grammar: Grammar | None) -> Constraint | None:
        """What an answer has to look like, from its first token on. The grammar must be ready."""
        if grammar is None or self._vocabulary is None:
            return None
        if not grammar.text:
            return Constraint(grammar, None, self._vocabulary)
        self._known.move_to_end(grammar.text)
        return Constraint(grammar, self._known[grammar.text], self._vocabulary)

    def close(self) -> None:
        """Nothing more is compiled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, vocabulary: Lexicon, text: str) -> None:
        found: LLMatcher | GrammarError
        try:
            found = vocabulary.matcher(text)
        except GrammarError as error:
            found = error
        except Exception as error:  # whatever it is, it is about this grammar alone
            log.exception("a grammar cannot be compiled")
            found = GrammarError(f"{type(error).__name__} while it was compiled")
        self._deliver(Compiled(text, found))
