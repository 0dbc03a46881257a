"""Grammars as clients write them, in GBNF (`name ::= …`, as llama.cpp's servers and vLLM's take them).

Every terminal that llguidance gets is one character. It takes the longest terminal that fits, so that longer ones would
forbid texts that the grammar has ("a" "bc" | "ab" has no abc left); and a terminal that may be empty, in a rule that
ends with itself, makes it compute for ever.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millpond.grammar.check import GrammarError
from millpond.grammar.lark import literal

ROOT = "root"
MOST_DEEP = 16
"""Parentheses within each other."""
MOST_PARTS = 2000
"""Rules, and parentheses in them: llguidance follows them by calls within calls."""
MOST_REPEATS = 500
"""Things that are repeated or may be missing: a step has to do with all of them at once."""
MOST_NAMES = 5000
MOST_TIMES = 10_000
_TOKEN = re.compile(
    r"""
    (?P<blank> \s+ | \#[^\n]* )
    | (?P<rule> [\w-]+ ) [ \t]* ::=
    | (?P<name> [\w-]+ )
    | " (?P<text> (?: [^"\\] | \\. )* ) "
    | \[ (?P<set> (?: [^\]\\] | \\. )* ) \]
    | (?P<times> [?*+] | \{ \s* \d* \s* (?: , \s* \d* \s* )? \} )
    | (?P<mark> [.()|] )
    """,
    re.VERBOSE | re.ASCII,
)
_LETTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {letter: letter for letter in "\\\"[]-^'/"}
_TIMES: Mapping[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}


def expression_of(text: str) -> str:
    """The grammar of a text in GBNF as one expression of a grammar in Lark. Raises GrammarError."""
    rules = _Reader(text).rules()
    if ROOT not in rules:
        raise GrammarError(f"there is no rule {ROOT}; allowed: rules `name ::= ...`, one of them named {ROOT}")
    for name, body in rules.items():
        for unknown in body.names() - rules.keys():
            raise GrammarError(f"rule {name} needs {unknown}, which is not there")
    for endless in rules.keys() - _ending(rules):
        raise GrammarError(f"rule {endless} can never end")
    numbers = {name: f"r{number}" for number, name in enumerate(rules)}
    bodies = [f"{numbers[name]}: {body.written(numbers)}" for name, body in rules.items()]
    return "\n".join(["%lark {", f"start: {numbers[ROOT]}", *bodies, "}"])


def _number(digits: str) -> int:
    """At most six digits of it: what has more is too large anyhow."""
    return int(digits.lstrip("0")[:6] or 0)


def _ending(rules: Mapping[str, _Alternatives]) -> set[str]:
    """Rules that some finite text fits; as long as it takes to look at everything once."""
    owners: list[_Alternatives] = []
    """Of each sequence."""
    missing: list[int] = []
    """Parts of each sequence that are not known to end."""
    users: dict[int, list[int]] = defaultdict(list)
    """Sequences by the choices that they need."""
    choices = list(rules.values())
    for choice in choices:  # it grows
        for sequence in choice.sequences:
            choices += [part.what for part in sequence if isinstance(part.what, _Alternatives)]
            needed = [part.choice(rules) for part in sequence if part.times[0]]
            for other in needed:
                if other is not None:
                    users[id(other)].append(len(owners))
            owners.append(choice)
            missing.append(sum(other is not None for other in needed))
    ending: set[int] = set()
    ready = [index for index, count in enumerate(missing) if not count]
    while ready:
        choice = owners[ready.pop()]
        if id(choice) not in ending:
            ending.add(id(choice))
            for index in users[id(choice)]:
                missing[index] -= 1
                if not missing[index]:
                    ready.append(index)
    return {name for name, body in rules.items() if id(body) in ending}


@dataclass
class _Alternatives:
    """One of several sequences of parts."""

    sequences: list[list[_Element]] = field(default_factory=lambda: [[]])

    def parts(self) -> Sequence[_Element]:
        return [part for sequence in self.sequences for part in sequence]

    def names(self) -> set[str]:
        """Rules that are needed."""
        return set().union(*(part.names() for part in self.parts()))

    def written(self, numbers: Mapping[str, str]) -> str:
        sequences = (" ".join(part.written(numbers) for part in sequence) for sequence in self.sequences)
        return " | ".join(sequence or '""' for sequence in sequences)


@dataclass
class _Element:
    """A rule, terminals, or a choice in parentheses, so many times."""

    what: str | _Alternatives
    """The name of a rule where ``named``, else terminals as Lark writes them."""
    named: bool = False
    times: tuple[int, int | None] = (1, 1)
    """From so many to so many; None: any number."""

    def names(self) -> set[str]:
        if isinstance(self.what, _Alternatives):
            return self.what.names()
        return {self.what} if self.named else set()

    def choice(self, rules: Mapping[str, _Alternatives]) -> _Alternatives | None:
        """What it consists of; None for terminals."""
        if isinstance(self.what, _Alternatives):
            return self.what
        return rules[self.what] if self.named else None

    def written(self, numbers: Mapping[str, str]) -> str:
        if isinstance(self.what, _Alternatives):
            text = self.what.written(numbers)
        else:
            text = numbers[self.what] if self.named else self.what
        least, most = self.times
        return f"({text})" if self.times == (1, 1) else f"({text}){{{least},{'' if most is None else most}}}"


class _Reader:
    """From the first letter to the last."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._parts = 0
        """Rules and parentheses so far."""
        self._repeats = 0
        self._named = 0
        """Names of rules within rules."""

    def rules(self) -> dict[str, _Alternatives]:
        """By name, in their order. Raises GrammarError."""
        found: dict[str, _Alternatives] = {}
        open_: list[_Alternatives] = []
        """The rule's own choice, and those in parentheses that have not been closed."""
        while self._at < len(self._text):
            token = _TOKEN.match(self._text, self._at)
            kind = token.lastgroup if token else None
            if token is None or kind is None:
                raise self._wrong("a rule, a name, a text in quotes, [a set], or one of ( ) | ? * + {m,n}")
            if kind == "rule":
                if len(open_) > 1:
                    raise self._wrong("a closing parenthesis")
                if token["rule"] in found:
                    raise self._wrong(f"one rule {token['rule']}")
                self._count()
                open_ = [found.setdefault(token["rule"], _Alternatives())]
            elif kind != "blank":
                if not open_:
                    raise self._wrong("a rule: name ::= ...")
                self._part(kind, token[kind], open_)
            self._at = token.end()
        if len(open_) > 1:
            raise self._wrong("a closing parenthesis")
        return found

    def _part(self, kind: str, text: str, open_: list[_Alternatives]) -> None:
        sequence = open_[-1].sequences[-1]
        match kind, text:
            case "name", _:
                sequence.append(_Element(text, named=True))
                self._named += 1
                if self._named > MOST_NAMES:
                    raise self._wrong(f"a grammar of at most {MOST_NAMES} names of rules within rules")
            case "text", _:
                letters = [literal(chr(letter)) for letter, _ in self._letters(text)]
                sequence.append(_Element(" ".join(letters) or '""'))
            case "set", _:
                sequence.append(_Element(self._set(text)))
            case "times", _:
                if not sequence:
                    raise self._wrong("something that can be repeated")
                if sequence[-1].times != (1, 1):
                    sequence[-1] = _Element(_Alternatives([[sequence[-1]]]))
                sequence[-1].times = self._times(text)
                self._repeats += 1
                if self._repeats > MOST_REPEATS:
                    raise self._wrong(f"a grammar of at most {MOST_REPEATS} things that are repeated or may be missing")
            case _, ".":
                sequence.append(_Element("/(?s:.)/"))
            case _, "|":
                open_[-1].sequences.append([])
            case _, "(":
                if len(open_) > MOST_DEEP:
                    raise self._wrong(f"at most {MOST_DEEP} parentheses within each other")
                self._count()
                inner = _Alternatives()
                sequence.append(_Element(inner))
                open_.append(inner)
            case _, ")":
                if len(open_) == 1:
                    raise self._wrong("no closing parenthesis")
                open_.pop()

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise self._wrong(f"a grammar of at most {MOST_PARTS} rules and parentheses")

    def _times(self, text: str) -> tuple[int, int | None]:
        if text in _TIMES:
            return _TIMES[text]
        least, comma, most = (part.strip() for part in text.strip("{}").partition(","))
        if not least and not most:
            raise self._wrong("a number in braces")
        lower, upper = _number(least), _number(most) if most else None if comma else _number(least)
        if max(lower, upper or 0) > MOST_TIMES or (upper is not None and upper < lower):
            raise self._wrong(f"numbers up to {MOST_TIMES}, the larger one last")
        return lower, upper

    def _set(self, text: str) -> str:
        letters = self._letters(text.removeprefix("^"))
        ranges: list[str] = []
        index = 0
        while index < len(letters):
            first = last = letters[index][0]
            if index + 2 < len(letters) and letters[index + 1] == (ord("-"), False):
                last = letters[index + 2][0]
                index += 2
            if last < first:
                raise self._wrong("ranges that begin with the lower letter")
            ranges.append(f"\\x{{{first:x}}}" if first == last else f"\\x{{{first:x}}}-\\x{{{last:x}}}")
            index += 1
        if not ranges:
            raise self._wrong("a set with letters in it")
        return f"/[{'^' if text.startswith('^') else ''}{''.join(ranges)}]/"

    def _letters(self, text: str) -> list[tuple[int, bool]]:
        """Code points, and whether each was written with a backslash."""
        found = []
        for match in _LETTER.finditer(text):
            *coded, escaped, plain = match.groups()
            number = next((int(digits, 16) for digits in coded if digits), -1)
            if number < 0:
                letter = plain or _ESCAPES.get(escaped)
                if letter is None:
                    raise self._wrong('one of the escapes \\n \\r \\t \\\\ \\" \\[ \\] \\- \\xHH \\uHHHH \\UHHHHHHHH')
                number = ord(letter)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise self._wrong("letters that there are")
            found.append((number, plain is None))
        return found

    def _wrong(self, wanted: str) -> GrammarError:
        line = self._text.count("\n", 0, self._at) + 1
        shown = self._text[self._at :].partition("\n")[0][:40]
        return GrammarError(f"line {line}, at {shown!r}: allowed is {wanted}")
