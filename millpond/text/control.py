"""Which added tokens steer the model, and patterns of many texts.

An added token is a text that becomes one token wherever it stands. Some are ordinary text that the model's authors
wanted whole, such as runs of spaces; the others begin turns, end answers, or mark thoughts and calls of tools. Text
from clients must never become one of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import tokenizers

_MARK = re.compile(r"<\|.*\|>|<｜.*｜>|\[/?[A-Z][A-Z_]*\]", re.DOTALL)  # noqa: RUF001 - as DeepSeek writes it
_BRACKETED = re.compile(r"[<\[{].+[>\]}]", re.DOTALL)


def control_tokens(backend: tokenizers.Tokenizer, template: str) -> dict[str, bool]:
    """Texts of the added tokens that steer the model, each with whether the file calls it special.

    Where the file does not, one counts that looks like a mark, or that is in brackets and that ``template``, the text
    of the chat template, mentions: HTML tags and white space are ordinary text, ``<think>`` of a model that thinks is
    not.
    """
    return {
        token.content: token.special
        for token in backend.get_added_tokens_decoder().values()
        if token.content.strip() and (token.special or _steers(token.content, template))
    }


def _steers(text: str, template: str) -> bool:
    return bool(_MARK.fullmatch(text)) or (bool(_BRACKETED.fullmatch(text)) and text in template)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of ``texts`` at a place, in a time that does not grow with how many there are."""
    trie: dict[str, _Node] = {}
    for text in texts:
        node = trie
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_branches(trie) or "(?!)")


_Node = dict[str, "_Node"]


def _branches(node: Mapping[str, _Node]) -> str:
    parts = [re.escape(character) + _branches(rest) for character, rest in sorted(node.items()) if character]
    if not parts:
        return ""
    if "" in node:
        return f"(?:{'|'.join(parts)})?"
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
