"""Text from clients on its way through a chat template, disguised so that it cannot become a control token.

Every character with which a control token begins or ends is replaced by a private one in what a client wrote. So what
the template does with the text (trims, cuts, quotes or puts it together) makes no control token of it, and in the
rendered text those that are there are the template's own. Then the characters are put back.

Replaced is one for one, and texts that the template looks for keep theirs, so that it does the same as without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import jinja2
from tokenizers.normalizers import Normalizer

from millpond.text.allowance import Allowance
from millpond.text.control import any_of
from millpond.text.environment import Environment
from millpond.text.errors import TextError
from millpond.text.spelled import Spelled

_PRIVATE = range(0xE000, 0xF900)
_TAKEN = re.compile(r"[\ue000-\uf8ff]|\\u[ef][0-9a-f]{3}")
_UNFIT = frozenset('"\\')
"""Characters that JSON writes in another way: they must stand for themselves."""
_NAMED = frozenset({"role", "type"})
"""Fields with words of the API's own."""
_ANSWERED = frozenset({"content", "reasoning_content", "reasoning", "thinking"})
_MOST_LOOKED_UP = 1000


@dataclass(slots=True)
class Masked:
    """A conversation in disguise, and what each private character stands for."""

    messages: list[Mapping[str, object]]
    tools: list[Mapping[str, object]]
    originals: Mapping[str, str]

    def lifted(self, text: str) -> str:
        """``text`` with what the client wrote."""
        for private, original in self.originals.items():
            text = text.replace(private, original)
            escaped = _escaped(private)
            if escaped in text:  # a template may write JSON in ASCII
                text = text.replace(escaped, json.dumps(original)[1:-1])
        return text


@dataclass(slots=True)
class _Strings:
    """What is to be replaced in one conversation."""

    characters: set[str] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    """Whole texts of which only the first character is replaced."""
    taken: set[str] = field(default_factory=set)


class Masks:
    """For one tokenizer and template. Nothing is changed after making: any number of threads at once."""

    def __init__(self, controls: Mapping[str, bool], template: str, normalizer: Normalizer | None) -> None:
        """``controls``: texts of the control tokens, each with whether it is special."""
        edges = {edge for text in controls for edge in _edges(text)}
        self._characters = tuple(sorted(edges | _lookalikes(edges, normalizer)))
        self._inside = "\0".join(controls)
        self._longest = max(map(len, controls), default=0)
        self._template_private = set(_TAKEN.findall(template))
        spared = _spared(template, controls, edges)
        self._spared = any_of(spared) if spared else None
        # What a model writes comes back in its next prompt: there, its thoughts are the tokens that it drew.
        drawn = spared | {text for text, special in controls.items() if not special}
        self._spared_answers = any_of(drawn) if drawn else None

    def of(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> Masked | None:
        """The conversation in disguise; None where nothing in it could become a control token. Raises TextError."""
        written = [*messages, *tools]
        found = self._search(written)
        if not found.characters and not found.first:
            return None
        for text in _strings(written):
            if not text.isascii() or "\\u" in text:
                found.taken.update(match[0] for match in _TAKEN.finditer(text))
        private = self._private(found, found.characters | {text.strip()[0] for text in found.first})
        disguise = _Disguise(found, private, self._spared, self._spared_answers)
        return Masked(
            [disguise.message(message) for message in messages],
            [disguise.message(tool) for tool in tools],
            {new: old for old, new in private.items()},
        )

    def _search(self, messages: Sequence[Mapping[str, object]]) -> _Strings:
        found = _Strings()
        looked_up: set[str] = set()
        for text in _strings(messages):
            found.characters.update(character for character in self._characters if character in text)
            if 0 < len(text) <= 2 * self._longest and text not in looked_up:
                looked_up.add(text)
                if self._may_complete(text.strip(), len(looked_up)):
                    found.first.add(text)
        return found

    def _may_complete(self, text: str, number: int) -> bool:
        """Whether the template could make a control token by writing the rest of it around this text."""
        return bool(text) and (number > _MOST_LOOKED_UP or text in self._inside)

    def _private(self, found: _Strings, characters: Collection[str]) -> dict[str, str]:
        taken = found.taken | self._template_private
        free = (chr(code) for code in _PRIVATE)
        left = (character for character in free if character not in taken and _escaped(character) not in taken)
        private = dict(zip(sorted(characters), left, strict=False))
        if len(private) < len(characters):
            raise TextError("the messages have too many different characters of the private use area")
        return private


class _Disguise:
    """Puts private characters into the strings of one conversation."""

    def __init__(
        self,
        found: _Strings,
        private: Mapping[str, str],
        spared: re.Pattern[str] | None,
        spared_answers: re.Pattern[str] | None,
    ) -> None:
        self._first = found.first
        self._private = private
        self._pairs = [(character, private[character]) for character in sorted(found.characters)]
        self._spared = spared
        self._spared_answers = spared_answers

    def message(self, message: Mapping[str, object]) -> Mapping[str, object]:
        assistant = message.get("role") == "assistant"
        return {
            self._hidden(name, self._spared): self._value(
                value, name in _NAMED, self._spared_answers if assistant and name in _ANSWERED else self._spared
            )
            for name, value in message.items()
        }

    def _value(self, value: object, named: bool, spared: re.Pattern[str] | None) -> object:
        if isinstance(value, str):
            if not named and value in self._first and not (spared and spared.fullmatch(value.strip())):
                start = value.strip()[0]
                value = value.replace(start, self._private[start], 1)
            return self._hidden(value, spared)
        if isinstance(value, Mapping):
            hidden = {
                self._hidden(name, spared) if isinstance(name, str) else name: self._value(part, name in _NAMED, spared)
                for name, part in value.items()
            }
            return Spelled(hidden, self._hidden(value.text, spared)) if isinstance(value, Spelled) else hidden
        if isinstance(value, list | tuple):
            return [self._value(part, named, spared) for part in value]
        return value

    def _hidden(self, text: str, spared: re.Pattern[str] | None) -> str:
        if spared is None:
            return self._replaced(text)
        parts: list[str] = []
        end = 0
        for match in spared.finditer(text):
            parts += (self._replaced(text[end : match.start()]), match[0])
            end = match.end()
        parts.append(self._replaced(text[end:]))
        return "".join(parts)

    def _replaced(self, text: str) -> str:
        for old, new in self._pairs:
            text = text.replace(old, new)
        return text


def _strings(value: object) -> Iterator[str]:
    """Every string in it that a client wrote, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if isinstance(value, Spelled):
            yield value.text
        for name, part in value.items():
            if isinstance(name, str) and not name.isidentifier():
                yield name
            if not (name in _NAMED and isinstance(part, str) and part.isalpha()):
                yield from _strings(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _strings(part)


def _edges(text: str) -> Iterator[str]:
    """The first and the last character that can be replaced."""
    fit = [character for character in text if not character.isspace() and character not in _UNFIT]
    if fit:
        yield fit[0]
        yield fit[-1]


def _lookalikes(edges: AbstractSet[str], normalizer: Normalizer | None) -> set[str]:
    """Characters that the tokenizer's normalizer makes into one of ``edges``."""
    if normalizer is None:
        return set()
    found: set[str] = set()
    for start in (*range(0x80, 0xD800, 0x80), *range(0xF900, 0x30000, 0x80)):
        block = "".join(map(chr, range(start, start + 0x80)))
        if not edges.isdisjoint(normalizer.normalize_str(block)):
            found.update(character for character in block if not edges.isdisjoint(normalizer.normalize_str(character)))
    return found


def _spared(template: str, controls: Mapping[str, bool], edges: AbstractSet[str]) -> set[str]:
    """Texts that the template looks for and that are no part of a control token, wherever they stand."""
    try:
        constants = Environment(Allowance(1.0)).parse(template).find_all(jinja2.nodes.Const)
        texts = {node.value for node in constants if isinstance(node.value, str)}
    except Exception:  # noqa: BLE001 - a template that cannot be read makes no prompts
        return set()
    begun = {text[:end] for text in controls for end in range(1, len(text) + 1)}
    ended = {text[start:] for text in controls for start in range(len(text))}
    return {
        text
        for text in texts
        if len(text) > 1
        and not edges.isdisjoint(text)
        and begun.isdisjoint(text[start:] for start in range(len(text)))
        and ended.isdisjoint(text[: end + 1] for end in range(len(text)))
        and not any(control in text for control in controls)
        and not any(text in control for control in controls)
    }


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"
