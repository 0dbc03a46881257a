"""(K3) What a log call is given is shown: fields come through ``fields``, under names that no formatter drops."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest

import millpond
from millpond.client import EngineClient
from millpond.observe.log import JsonFormatter, LineFormatter, fields
from millpond.wire import Start

PACKAGE = Path(millpond.__file__).parent
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
TAKEN = {"time", "level", "logger", "message", "trace"}
"""Of every line in JSON."""


def made_by_fields(value: ast.expr, scope: ast.AST) -> bool:
    if isinstance(value, ast.Name):
        given = [
            (target, node.value) for node in ast.walk(scope) if isinstance(node, ast.Assign) for target in node.targets
        ]
        named = [
            element
            for target, source in given
            for name, element in (
                zip(target.elts, source.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple)
                else [(target, source)]
            )
            if isinstance(name, ast.Name) and name.id == value.id
        ]
        return bool(named) and all(made_by_fields(element, scope) for element in named)
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "fields"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_field_is_lost(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        where = f"line {node.lineno}"
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS and ast.unparse(node.func.value) == "log":
            for keyword in node.keywords:
                if keyword.arg == "extra":
                    assert made_by_fields(keyword.value, tree), where
                else:
                    assert keyword.arg == "exc_info", where
        if ast.unparse(node.func) == "fields":
            assert not TAKEN & {keyword.arg for keyword in node.keywords}, where


def test_giving_up_says_why(caplog: pytest.LogCaptureFixture) -> None:
    EngineClient(Start(model_path="", max_batch=1, max_itl_ms=1.0))._give_up("the weights are not there")
    record = caplog.records[-1]
    assert 'engine failed reason="the weights are not there"' in LineFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["reason"] == "the weights are not there"


def test_long_values_messages_and_traces_are_cut() -> None:
    record = logging.LogRecord("millpond.x", logging.ERROR, "", 0, "m" * 50_000, None, None)
    try:
        raise ValueError("t" * 50_000)
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    record.fields = fields(path="p" * 50_000, count=7)["fields"]
    assert len(LineFormatter().format(record)) < 40_000
    line = JsonFormatter().format(record)
    assert len(line) < 40_000
    assert json.loads(line)["count"] == 7
