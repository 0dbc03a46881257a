"""Answers drawn at random among what a grammar allows, over a small vocabulary of bytes, a few words and marks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from millpond.grammar.constraint import Bits, Constraint
from millpond.grammar.lexicon import Lexicon
from millpond.types import Grammar

END = "<|end of answer|>"
WORDS = ("arguments", "parameter", "name", "write", "tool", "call", '": "', '", "', "</", ">\n", "functions", "true")
LONG = 300
"""Tokens after which an answer ends where it may."""
CLOSING = frozenset("\"}]),>\n'")
"""Characters that are preferred, so that answers end."""


class WalkVocabulary:
    """The marks are tokens, or, with ``by_token`` false, spelled in letters."""

    def __init__(self, marks: Sequence[str], *, by_token: bool = True, ways_out: Sequence[str] = ()) -> None:
        """``ways_out``: letters beside the marks that end values."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = {letter: index for index, letter in enumerate(alphabet)}
        backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END, *(marks if by_token else ())])
        backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
        self.backend = backend
        self.tokens = {mark: backend.token_to_id(mark) for mark in marks} if by_token else {}
        self.end = backend.token_to_id(END)
        self.ways_out = [*marks, *(f"\n{mark}" for mark in marks), "\n</parameter>", "</parameter>", *ways_out]
        self.named = {index: mark for mark, index in self.tokens.items()}
        size = backend.get_vocab_size()
        self.vocabulary = Lexicon(backend.to_str(), size, size + 3, [self.end], self.bytes_of)
        self.preferred = [
            index
            for index in range(size)
            if index != self.end and CLOSING & set(self.bytes_of(index).decode("latin-1"))
        ]

    def bytes_of(self, token: int) -> bytes:
        text = self.backend.id_to_token(token)
        if self.backend.get_added_tokens_decoder().get(token) is not None:
            return text.encode()
        return byte_letters()[text]

    def ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def constraint(self, grammar: Grammar) -> Constraint:
        matcher = self.vocabulary.matcher(grammar.text) if grammar.text else None
        return Constraint(grammar, matcher, self.vocabulary)

    def walk(self, grammar: Grammar, seed: int, most: int = 3000) -> list[int]:
        """The tokens of one answer, its end left out. Raises DeadEnd, and AssertionError where it does not end."""
        return self.walk_from(self.constraint(grammar), seed, most)

    def walk_from(self, state: Constraint, seed: int, most: int = 3000) -> list[int]:
        """The same, of an answer that has begun."""
        chosen, answer = random.Random(seed), list[int]()
        ways_out = [self.ids(text) for text in self.ways_out]
        while not state.complete:
            allowed = ids_of(state.allowed(), self.vocabulary.size)
            if self.end in allowed and not state.endless and (chosen.random() < 0.5 or len(answer) > LONG):
                return answer
            allowed.discard(self.end)
            if state.endless:  # a thought that never ends tells nothing
                allowed = {token for token in self.tokens.values() if chosen.random() < 0.2} | {self.ids("x")[0]}
            assert allowed, "nothing but an end, which was not drawn"
            way = chosen.choice(ways_out)
            if not state.endless and chosen.random() < 0.2 and state.admitted(way) == len(way):
                for token in way:  # letters that hardly ever come together by chance
                    state.take(token)
                answer += way
                continue
            preferred = [token for token in self.preferred if token in allowed]
            some = preferred if preferred and chosen.random() < 0.25 else sorted(allowed)
            token = chosen.choice(some)
            assert state.permits(token)
            assert state.admitted([token]) == 1
            state.take(token)
            answer.append(token)
            assert len(answer) < most, "it does not end"
        return answer

    def parts(self, answer: Sequence[int]) -> list[tuple[bool, str]]:
        """Texts and (True) marks."""
        found: list[tuple[bool, bytes]] = []
        for token in answer:
            if token in self.named:
                found.append((True, self.named[token].encode()))
            elif found and not found[-1][0]:
                found[-1] = (False, found[-1][1] + self.bytes_of(token))
            else:
                found.append((False, self.bytes_of(token)))
        return [(is_mark, text.decode()) for is_mark, text in found]


def ids_of(bits: Bits | None, size: int) -> set[int]:
    if bits is None:
        return set(range(size))
    spelled = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return {int(token) for token in spelled.nonzero()[0] if token < size}


@lru_cache(maxsize=1)
def byte_letters() -> dict[str, bytes]:
    """The byte that each letter of a byte-level tokenizer stands for."""
    decoder = decoders.ByteLevel()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    letters |= {chr(256 + n): bytes([byte]) for n, byte in enumerate(b for b in range(256) if b not in printable)}
    assert decoder.decode(["Ġ"]) == " "
    return letters
