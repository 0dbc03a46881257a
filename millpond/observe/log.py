"""Structured log lines on standard error: time, level, message, then key=value pairs.

Modules log through the standard library, ``logging.getLogger("millpond.part")``, and pass fields with
``extra=fields(key=value)``. Prompts and answers are never logged. Who logs never waits for a reader of standard error
(see stderr.py). Any thread.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
import time
from collections.abc import Mapping

from millpond.observe.stderr import PatientStderr

LONGEST_VALUE = 400
"""Characters of a field; clients choose some of them, such as the path, and escaped one can be six times as long."""
LONGEST_TEXT = 16 * 1024
"""Characters of a message or a trace."""


def fields(**fields: object) -> Mapping[str, object]:
    """Fields of one log line, for the ``extra`` argument of a logging call."""
    return {"fields": fields}


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z info millpond.http: request id=abc tokens=12``."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_moment(record)} {record.levelname.lower()} {record.name}: {_cut(record.getMessage(), LONGEST_TEXT)}"
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line += "".join(f" {key}={_shown(value)}" for key, value in fields.items() if value is not None)
        if record.exc_info:
            line += "\n" + _cut(self.formatException(record.exc_info), LONGEST_TEXT)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line: dict[str, object] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage(), LONGEST_TEXT),
        }
        if isinstance(fields, Mapping):
            line |= {key: _plain(value) for key, value in fields.items() if value is not None and key not in line}
        if record.exc_info:
            line["trace"] = _cut(self.formatException(record.exc_info), LONGEST_TEXT)
        return json.dumps(line)


def configure(level: str, form: str = "text") -> None:
    """Send Millpond's and the HTTP server's lines to standard error from ``level`` (debug, info, warning, error) up, as
    ``text`` or ``json``. Whatever else this process writes to ``sys.stderr`` goes the same way from now on."""
    formatter = JsonFormatter() if form == "json" else LineFormatter()
    if not isinstance(sys.stderr, PatientStderr):
        sys.stderr = PatientStderr(sys.stderr.fileno(), lambda count: formatter.format(_dropped(count)) + "\n")
        atexit.register(last_words)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("millpond").setLevel(level.upper())


def last_words() -> None:
    """Have what was logged written out, if somebody reads it. The interpreter's end does it; ``os._exit`` does not."""
    if isinstance(sys.stderr, PatientStderr):
        sys.stderr.drain()


def _dropped(count: int) -> logging.LogRecord:
    record = logging.LogRecord("millpond.log", logging.WARNING, "", 0, "lines dropped, nobody read them", None, None)
    record.fields = {"lines": count}
    return record


def _moment(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _cut(str(value), LONGEST_VALUE)
    plain = text.isprintable() and text and not any(character in text for character in ' "=')
    return text if plain else json.dumps(text)


def _plain(value: object) -> object:
    """As JSON can show it."""
    return value if isinstance(value, int | float) else _cut(str(value), LONGEST_VALUE)


def _cut(text: str, most: int) -> str:
    """The beginning of a text that is too long, and how much more there is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more)"
