"""Grammars over the vocabulary of the tiny models: 256 tokens, of which some are letters, some words and some marks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from grammar_walks import byte_letters
from msgspec.structs import replace
from tiny_models import VOCAB, save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from millpond.grammar.lark import json_value
from millpond.grammar.lexicon import Lexicon
from millpond.types import Grammar, Request, Symbol, Thinking

END, THINK, THOUGHT, CALL, CALLED = "<end>", "<think>", "</think>", "<call>", "</call>"
MARKS = (END, THINK, THOUGHT, CALL, CALLED)
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 6},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
        "c": {"enum": ["red", "green"]},
        "d": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b", "c", "d"],
    "additionalProperties": False,
}


@cache
def backend() -> Tokenizer:
    letters = byte_letters()
    alphabet = [letter for letter, byte in letters.items() if byte[0] < 128]
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(MARKS))
    words = ['": ', '", "', '{"', '"a', '"b', '"c": "', "red", "green", '"}', "true", "false", '"d": [', "]}", ": "]
    words += [f"{first}{second}" for first in "abcdefghijx" for second in "klmnopqrst"]
    made.add_tokens([AddedToken(word, normalized=False) for word in words][: VOCAB - made.get_vocab_size()])
    assert made.get_vocab_size() == VOCAB
    return made


def id_of(mark: str) -> int:
    return int(backend().token_to_id(mark))


def bytes_of(token: int) -> bytes:
    if token in backend().get_added_tokens_decoder():
        return backend().id_to_token(token).encode()
    return byte_letters()[backend().id_to_token(token)]


@cache
def vocabulary() -> Lexicon:
    return Lexicon(backend().to_str(), VOCAB, VOCAB, [id_of(END)], bytes_of)


def spelled(tokens: Sequence[int]) -> str:
    return b"".join(map(bytes_of, tokens)).decode()


def ids(text: str) -> list[int]:
    return list(backend().encode(text, add_special_tokens=False).ids)


def object_grammar(schema: Mapping[str, object] = SCHEMA) -> Grammar:
    return Grammar(text=f"start: {json_value(schema, strict=True)}\n")


def call_grammar() -> Grammar:
    """Whatever stands behind a call's mark is an object, up to the mark of its end."""
    text = f"start: <[{id_of(CALL)}]> {json_value(SCHEMA, strict=True)} <[{id_of(CALLED)}]>\n"
    return Grammar(text=text, triggers=[Symbol(CALL, id_of(CALL))])


def thinking(*, begun: bool, most: int | None = None) -> Thinking:
    return Thinking(id_of(THINK), id_of(THOUGHT), begun, most, ids("\n"))


def guided(one: Request, grammar: Grammar | None) -> Request:
    """With this to look like, and an end."""
    return replace(one, grammar=grammar, params=replace(one.params, stop_token_ids=[id_of(END)]))


def save_guided(kind: str, folder: Path) -> Path:
    """A tiny model with its tokenizer."""
    save(kind, folder)
    backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder
