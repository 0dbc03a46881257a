"""Where chat templates run: what they may call is what they were written against, and nothing else.

A template is a program that comes with the model. Its authors tried it in the sandbox of `transformers`, so that this
one offers the same: white space handling, ``break`` and ``continue``, ``tojson``, ``raise_exception``,
``strftime_now``, and ``{% generation %}``, which marks an answer for training and here shows only what is inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def environment() -> ImmutableSandboxedEnvironment:
    """A fresh one. Any thread may render what it compiled."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


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
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise JinjaError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
