"""(M3, M11) Grammars that clients write: the very texts that they have, and refusals in words."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

import pytest
from grammar_walks import WalkVocabulary

from millpond.child import python
from millpond.grammar.check import GrammarError, check
from millpond.grammar.gbnf import MOST_NAMES, MOST_PARTS, MOST_REPEATS, MOST_TIMES, expression_of

LETTERS = "abc"
LONGEST = 5
"""Letters of the texts that are tried: all of them."""
SQL = """
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "   # a name
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
NUMBERS = r"""
root ::= "[" ws ( number ( "," ws number )* )? "]"
number ::= "-"? ( "0" | [1-9] [0-9]{0,3} ) ( "." [0-9]+ )?
ws ::= [ \t\n]{0,2}"""


@lru_cache(maxsize=1)
def vocabulary() -> WalkVocabulary:
    return WalkVocabulary(())


def accepts(grammar: str, texts: Sequence[str]) -> list[bool]:
    begun = vocabulary().vocabulary.matcher(f"start: ({expression_of(grammar)})\n")
    found = []
    for text in texts:
        matcher = begun.deep_copy()
        taken = all(matcher.consume_token(token) for token in vocabulary().ids(text))
        found.append(taken and matcher.is_accepting())
    return found


def test_texts_of_a_grammar() -> None:
    right = "SELECT col_1  from table_2  where col_2 = 1 "
    assert accepts(SQL, [right, right[:-1], right.lower(), right.replace("col_2", "col_3")]) == [True] + [False] * 3
    right_ones = ["[]", "[1]", "[ -10.25,\n0, 7]", "[\t\t1234]"]
    wrong_ones = ["", "[", "[01]", "[1,]", "[   1]", "[12345]", "[1.]"]
    assert accepts(NUMBERS, [*right_ones, *wrong_ones]) == [True] * len(right_ones) + [False] * len(wrong_ones)


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('root ::= "a" "bc" | "ab"', ["abc", "ab"], ["a", "abb"]),  # the longest text first would lose abc
        ('root ::= [a-z]* "x"', ["x", "axbx", "xx"], ["", "a"]),
        ('root ::= [^"\\\\]+', ["é😀\n]", "a"], ["", '"', "\\"]),
        (r'root ::= "\x41\u00e9\U0001F600\n\"\\" [\x41-\u0043\]\-]', ['Aé😀\n"\\A', 'Aé😀\n"\\]', 'Aé😀\n"\\-'], ["A"]),
        ("root ::= . .", ["é😀", "\n\n"], ["", "a", "aaa"]),
        ('root ::= "a"{2} | "b"{1,} | "c"{,2}', ["aa", "b", "bbb", "", "cc"], ["a", "aaa", "ccc"]),
        ('root::="a"\nother-rule ::=\n "b"\n|"c"', ["a"], ["b"]),
        ('root ::= root "+" root | [0-9]', ["1", "1+2+3"], ["+", "1+"]),
        ('root ::= ("" | ("a" | "")*)*', ["", "aaa"], ["b"]),
        ('root ::= "ab"* "/" "}"', ["/}", "abab/}"], ["a/}"]),
        ('root ::= "a"{0000003} "b"{ 1 ,\t2 }', ["aaab", "aaabb"], ["b", "aaa"]),
        ('root ::= "a"{2}{1,2} "b"+?', ["aa", "aaaab"], ["a", "aaa"]),
        ('root ::= 2fa -id\n2fa ::= "1\n"\n-id ::= [\n]', ["1\n\n"], ["1"]),
    ],
)
def test_small_ones(grammar: str, right: list[str], wrong: list[str]) -> None:
    assert accepts(grammar, [*right, *wrong]) == [True] * len(right) + [False] * len(wrong)


# --- by chance, against all texts of a grammar ----------------------------------------------------------------------

Part = tuple[object, tuple[int, int | None]]
"""A number for a rule, a text, a set of letters, or sequences to choose from; and how often."""


def drawn(chosen: random.Random, depth: int, rules: int) -> list[list[Part]]:
    def part() -> Part:
        kind = chosen.random()
        what: object = "".join(chosen.choices("ab", k=chosen.choice([1, 1, 2])))
        if kind < 0.15:
            what = frozenset(chosen.sample(LETTERS, 2))
        elif kind < 0.45 or (kind < 0.65 and not depth):
            what = chosen.randrange(rules)
        elif kind < 0.65:
            what = drawn(chosen, depth - 1, rules)
        return what, chosen.choice([(1, 1), (1, 1), (1, 1), (0, 1), (0, None), (1, None), (0, 2), (2, 3)])

    return [[part() for _ in range(chosen.choice([0, 1, 1, 2, 3]))] for _ in range(chosen.choice([1, 1, 2, 3]))]


def written(choices: list[list[Part]]) -> str:
    def part(what: object) -> str:
        match what:
            case int():
                return f"r{what}"
            case str():
                return f'"{what}"'
            case list():
                return f"({written(what)})"
            case _:
                assert isinstance(what, frozenset)
                return f"[{''.join(sorted(what))}]"

    def often(least: int, most: int | None) -> str:
        return "" if (least, most) == (1, 1) else f"{{{least},{'' if most is None else most}}}"

    return " | ".join(" ".join(part(what) + often(*times) for what, times in parts) for parts in choices)


def texts_of(rules: list[list[list[Part]]]) -> list[set[str]]:
    """Of each rule, up to the longest length."""

    def joined(ones: set[str], others: set[str]) -> set[str]:
        return {one + other for one in ones for other in others if len(one) + len(other) <= LONGEST}

    def choice(choices: list[list[Part]]) -> set[str]:
        found = set()
        for parts in choices:
            texts = {""}
            for what, (least, most) in parts:
                once = what_of(what)
                several = {""}
                for _ in range(least):
                    several = joined(several, once)
                every = set(several)
                for _ in range(LONGEST + 1 if most is None else most - least):
                    several = joined(several, once)
                    every |= several
                texts = joined(texts, every)
            found |= texts
        return found

    def what_of(what: object) -> set[str]:
        match what:
            case int():
                return known[what]
            case str():
                return {what}
            case list():
                return choice(what)
            case _:
                assert isinstance(what, frozenset)
                return set(what)

    known: list[set[str]] = [set() for _ in rules]
    while (found := [choice(rule) for rule in rules]) != known:
        known = found
    return known


def examine(seeds: range) -> int:
    """Returns how many grammars have texts."""
    tried = ["".join(text) for length in range(LONGEST + 1) for text in itertools.product(LETTERS, repeat=length)]
    examined = 0
    for seed in seeds:
        chosen = random.Random(seed)
        count = chosen.choice([1, 2, 3])
        rules = [drawn(chosen, 1, count) for _ in range(count)]
        grammar = "".join(f"r{number} ::= {written(rule)}\n" for number, rule in enumerate(rules)) + "root ::= r0"
        texts = texts_of(rules)
        if not all(texts):
            continue
        examined += 1
        wrong = [
            text for text, taken in zip(tried, accepts(grammar, tried), strict=True) if taken != (text in texts[0])
        ]
        assert not wrong, (seed, wrong[:5], grammar)
    return examined


def test_the_very_texts_that_it_has() -> None:
    assert examine(range(30)) >= 15


@pytest.mark.slow
def test_the_very_texts_that_it_has_for_long() -> None:
    assert examine(range(30, 630)) >= 300


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "there is no rule root; allowed: rules `name ::= ...`, one of them named root"),
        ('a ::= "b"', "there is no rule root"),
        ('start: "a"', "line 1, at 'start: \"a\"': allowed is a rule: name ::= ..."),
        ("root ::= x", "rule root needs x, which is not there"),
        ('root ::= a\na ::= "b" a', "can never end"),
        ('root ::= "x" | a\na ::= a+', "rule a can never end"),
        ('root ::= ("a"', "line 1, at '': allowed is a closing parenthesis"),
        ('root ::= ("a"\nb ::= "c")', "line 2, at 'b ::= \"c\")': allowed is a closing parenthesis"),
        ('root ::= "a")', "allowed is no closing parenthesis"),
        ("root ::= [z-a]", "allowed is ranges that begin with the lower letter"),
        ("root ::= []", "allowed is a set with letters in it"),
        ("root ::= [^\\q]", "allowed is one of the escapes"),
        ('root ::= "\\ud800"', "allowed is letters that there are"),
        ('root ::= "\\UFFFFFFFF"', "allowed is letters that there are"),
        ("root ::= *", "allowed is something that can be repeated"),
        ("root ::= (*)", "allowed is something that can be repeated"),
        ('root ::= "a"{3,2}', f"allowed is numbers up to {MOST_TIMES}, the larger one last"),
        ('root ::= "a"{0,99999999999}', f"allowed is numbers up to {MOST_TIMES}"),
        ('root ::= "a"{}', "allowed is a number in braces"),
        ('root ::= "a"\nroot ::= "b"', "line 2, at 'root ::= \"b\"': allowed is one rule root"),
        ("root ::= <think>", "line 1, at '<think>': allowed is a rule, a name, a text in quotes"),
        ('root ::= "a', "allowed is a rule, a name, a text in quotes"),
        ("root ::= " + "(" * 20, "parentheses within each other"),
        ("".join(f"r{number} ::= r{number + 1}\n" for number in range(3000)), f"at most {MOST_PARTS} rules"),
        ("root ::= " + '("a")' * 3000, f"at most {MOST_PARTS} rules and parentheses"),
        ("root ::= " + '"a"?' * 3000, f"at most {MOST_REPEATS} things that are repeated or may be missing"),
        ("root ::= " + "a " * 6000 + '\na ::= "b" | ""', f"at most {MOST_NAMES} names of rules within rules"),
    ],
)
def test_what_is_wrong_is_said(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        expression_of(grammar)
    assert message in str(caught.value)


DEEPEST = """
import sys, threading
sys.path[:0] = {path!r}
from grammar_walks import WalkVocabulary
from millpond.grammar.gbnf import MOST_DEEP, MOST_NAMES, MOST_PARTS, MOST_REPEATS, expression_of
from millpond.grammar.levels import deep_stacks

last = MOST_PARTS - 2
few = MOST_REPEATS // 17
LARGEST = (
    "".join(f'r{{n}} ::= "a" r{{n + 1}} | "b"\\n' for n in range(last)) + f"r{{last}} ::= [a-c]\\nroot ::= r0",
    "".join(f"r{{n}} ::= {{'(' * MOST_DEEP}} r{{n + 1}} {{')*' * MOST_DEEP}}\\n" for n in range(few))
    + f"r{{few}} ::= [a-c]\\nroot ::= r0",
    "".join(f"r{{n}} ::= r{{n + 1}} | r0\\n" for n in range(last)) + f"r{{last}} ::= [a-c]\\nroot ::= r0",
    "r0 ::= [a-c]\\nroot ::= " + "|".join(["r0"] * MOST_NAMES),
    "root ::= " + '"a"?' * MOST_REPEATS,
    "root ::= " + "a " * MOST_NAMES + '\\na ::= "a" | ""',
    "root ::= " + "".join('"a"{{%d,%d}}' % (n, 9999 - n) for n in range(MOST_REPEATS)),
)

def run():
    words = WalkVocabulary(())
    for text in LARGEST:
        matcher = words.vocabulary.matcher("start: " + expression_of(text) + "\\n")
        print(matcher.consume_token(words.ids("a")[0]) or matcher.get_error().split(";")[0], flush=True)

with deep_stacks():
    thread = threading.Thread(target=run)
    thread.start()
thread.join()
"""


def test_the_largest_that_are_allowed_end_nobody() -> None:
    """Nor hold anybody up: each is made, and takes a step, or too much for one."""
    program = DEEPEST.format(path=sys.path)
    done = subprocess.run(python("-c", program), capture_output=True, text=True, check=False, timeout=120)
    steps = done.stdout.splitlines()
    assert (done.returncode, len(steps)) == (0, 7), (steps, done.stderr)
    assert all(step == "True" or "Too many items" in step or "Current row has" in step for step in steps), steps
    assert "True" in steps


def test_it_stands_among_others() -> None:
    """As an expression, like every other form."""
    check(f'start: ("x" ({expression_of(SQL)}) | {expression_of(NUMBERS)}) "y"\n')
