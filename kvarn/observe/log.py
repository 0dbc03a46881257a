"""Structured log lines on standard error: time, level, message, then key=value pairs.

Modules log through the standard library, ``logging.getLogger("kvarn.part")``, and pass fields with
``extra=kv(key=value)``. Prompts and answers are never logged. Any thread.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping


def kv(**fields: object) -> Mapping[str, object]:
    """Fields of one log line, for the ``extra`` argument of a logging call."""
    return {"fields": fields}


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z info kvarn.http: request id=abc tokens=12``."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_moment(record)} {record.levelname.lower()} {record.name}: {record.getMessage()}"
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line += "".join(f" {key}={_shown(value)}" for key, value in fields.items() if value is not None)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line: dict[str, object] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(fields, Mapping):
            line |= {key: value for key, value in fields.items() if value is not None and key not in line}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, form: str = "text") -> None:
    """Send Kvarn's and the HTTP server's lines to standard error from ``level`` (debug, info, warning, error) up, as
    ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kvarn").setLevel(level.upper())


def _moment(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    plain = text.isprintable() and text and not any(character in text for character in ' "=')
    return text if plain else json.dumps(text)
