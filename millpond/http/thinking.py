"""How much is thought before an answer, as far as a model's chat template lets one choose."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.http.errors import ApiError, unsupported
from millpond.http.generation_request import Conversation
from millpond.text.tokenizer import Tokenizer

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SWITCHES = ("enable_thinking", "thinking")
"""Names under which templates have thinking switched on and off."""
LEVELS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Of templates that know three."""


def template_settings(chat: Conversation, tokenizer: Tokenizer) -> Mapping[str, object]:
    """What the template is told. Raises ApiError 400 for what it does not listen to."""
    known = tokenizer.template_settings
    for name in chat.settings:
        if name not in known:
            where = f"chat_template_kwargs.{name}"
            allowed = f"what this model's chat template reads ({', '.join(sorted(known)) or 'nothing'})"
            raise unsupported(where, chat.settings[name], allowed)
    return _effort(chat.effort, tokenizer) | dict(chat.settings)


def _effort(effort: str | None, tokenizer: Tokenizer) -> dict[str, object]:
    known = tokenizer.template_settings
    if effort is None:
        return {}
    if "reasoning_effort" in known:
        return {"reasoning_effort": LEVELS.get(effort, effort)}
    for name in SWITCHES:
        if name in known:
            return {name: effort != "none"}
    if effort == "none" and tokenizer.dialect.thoughts is None and not tokenizer.dialect.messages:
        return {}
    allowed = "absent: this model's chat template has no setting for it"
    message = f'reasoning_effort: must be {allowed}, got "{effort}"'
    raise ApiError(400, message, param="reasoning_effort", code="unsupported_parameter")
