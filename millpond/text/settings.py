"""What a model folder says about its tokenizer beside tokenizer.json: special tokens by name, BOS.

Read as they stand, so that no library's idea of a valid config.json, or of what a class of tokenizer must look like,
comes between the files and what is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """``special_tokens``: ``bos_token``, ``eos_token`` and whatever else is called ``…_token``, by name."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    add_bos: bool | None = None
    """Whether a plain text begins with BOS; None where only tokenizer.json says it."""
    tool_parser: str = ""
    """How mlx-lm calls the model's way of writing calls."""
    response_template: Mapping[str, object] = field(default_factory=dict)
    """How answers are to be taken apart, as transformers has it."""


def read_settings(folder: Path) -> TokenizerSettings:
    """Read tokenizer_config.json and special_tokens_map.json.

    Missing and unreadable files count as saying nothing. special_tokens_map.json wins, except where
    tokenizer_config.json lists the added tokens: then it is the newer of the two.
    """
    config = read_json(folder / "tokenizer_config.json")
    older = {} if "added_tokens_decoder" in config else read_json(folder / "special_tokens_map.json")
    named = {name: _content(value) for name, value in {**config, **older}.items() if name.endswith("_token")}
    add_bos = config.get("add_bos_token")
    parser, template = config.get("tool_parser_type"), config.get("response_template")
    return TokenizerSettings(
        special_tokens={name: token for name, token in named.items() if token},
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        tool_parser=parser if isinstance(parser, str) else "",
        response_template=template if isinstance(template, dict) else {},
    )


def read_json(file: Path) -> dict[str, object]:
    """The object in a file; an empty one where there is none."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _content(value: object) -> str | None:
    """A special token is a text or an object with its text in ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
