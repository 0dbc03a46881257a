"""Where chat templates run: what they may call is what they were written against, and nothing else.

A template is a program that comes with the model. Its authors tried it in the sandbox of transformers, so that this one
offers the same: white space handling, ``break`` and ``continue``, ``tojson``, ``raise_exception``, ``strftime_now``,
and ``{% generation %}``, which marks an answer for training and here shows only what is inside. Unlike there, a
template may compute only so long.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sized
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from millpond.text.allowance import Allowance
from millpond.text.spelled import Spelled

MOST_MADE = 100_000
"""Items or digits of what ``*`` and ``**`` make."""
_SPEND = "spend"
"""The filter that is put into loops and macros."""


class Environment(ImmutableSandboxedEnvironment):
    """Any thread may render what it has compiled, inside of ``allowance.given``."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, allowance: Allowance) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _Days()
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.filters = {name: _spending(work, allowance) for name, work in self.filters.items()}
        self.filters[_SPEND] = _spending(_same, allowance)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for loop in source.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_spend(nodes.Const(None))))
            if isinstance(loop.test, nodes.Expr):
                loop.test = _spend(loop.test)
        for macro in source.find_all(nodes.Macro):
            macro.body.insert(0, nodes.ExprStmt(_spend(nodes.Const(None))))
        return super()._generate(source, name, filename, defer_init)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if _size(operator, left, right) > MOST_MADE:
            raise SecurityError(f"{operator} makes more than {MOST_MADE} items or digits")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: object, right: object) -> int:
    """Items of the sequence, or digits to the base of 2, that ``left * right`` or ``left ** right`` may have."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            return left.bit_length() * max(0, right)
        return left.bit_length() + right.bit_length()
    if operator == "*" and isinstance(left, Sized) and isinstance(right, int):
        return len(left) * right
    if operator == "*" and isinstance(left, int) and isinstance(right, Sized):
        return len(right) * left
    return 0


def _spend(value: nodes.Expr) -> nodes.Filter:
    """An expression that is a round of a loop, too."""
    return nodes.Filter(value, _SPEND, [], [], None, None)


def _spending(work: Callable[..., object], allowance: Allowance) -> Callable[..., object]:
    @functools.wraps(work)
    def spending(*args: object, **kwargs: object) -> object:
        allowance.spend()
        return work(*args, **kwargs)

    return spending


@jinja2.pass_context  # without a context, the compiler would work it out beforehand, once for all rounds
def _same(_context: Context, value: object) -> object:
    return value


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``."""

    tags = {"generation"}  # noqa: RUF012 - read by jinja as it stands in its own class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """``dict`` without the attributes of a class, through which one could climb out."""

    def __call__(self, *args: Iterable[tuple[object, object]], **kwargs: object) -> dict[object, object]:
        made: dict[object, object] = {}
        made.update(*args, **kwargs)
        return made

    def fromkeys(self, *args: object) -> dict[object, object]:
        return dict.fromkeys(*args)  # type: ignore[call-overload, no-any-return]


class _Namespace(Namespace):
    """``namespace`` that takes no names with a leading underscore."""

    def __init__(*args: object, **kwargs: object) -> None:
        # `self` is among the arguments so that a template may give a value that name.
        self, *values = args
        assert isinstance(self, _Namespace)
        given = dict(*values, **kwargs)
        for name in given:
            _allow_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: object) -> None:
        _allow_name(name)
        super().__setitem__(name, value)


def _allow_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore, got {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML. What a model has written stays so, unless a template has a form of
    its own for it."""
    if isinstance(value, Spelled) and not (ensure_ascii or indent or separators or sort_keys):
        return value.text
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


class _Days:
    """``strftime_now``: the date, and of each day the time at which it was first asked. Were it the time of every
    request, none would begin like another, and nothing of its prompt could be cached."""

    def __init__(self) -> None:
        self._moment = datetime.min

    def __call__(self, form: str) -> str:
        now = datetime.now()
        if now.date() != self._moment.date():
            self._moment = now
        return self._moment.strftime(form)
