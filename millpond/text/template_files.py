"""Where a model folder has its chat template, and which of several counts.

As in transformers: chat_template.jinja and the files of additional_chat_templates come before the ``chat_template`` of
tokenizer_config.json, which is a text or a list of named ones. chat_template.json, which once came with processors of
images, counts where there is none of these. Of several, the one named ``default`` is for plain chats.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

log = logging.getLogger(__name__)

DEFAULT = "default"


class TemplateFileError(Exception):
    """A file that should have the chat template cannot be used; the message says why."""


def find_template(folder: Path) -> str | None:
    """The source of the chat template, or None where there is none for plain chats. Raises TemplateFileError."""
    named = _of_files(folder) or _of_json(folder / "tokenizer_config.json") or _of_json(folder / "chat_template.json")
    if named and DEFAULT not in named:
        names = ", ".join(sorted(named))
        log.warning("none of the model's chat templates (%s) is named %s: no chats, only completions", names, DEFAULT)
    return named.get(DEFAULT)


def _of_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    return {name: _text(path) for name, path in files.items()}


def _of_json(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_text(path))
    except ValueError as error:
        raise TemplateFileError(f"{path.name} is not JSON: {error}") from error
    value = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, str):
        value = {DEFAULT: value} if value else {}
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in value.items()
    ):
        raise TemplateFileError(f"{path.name}: chat_template must be a text or a list of texts with names")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateFileError(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
