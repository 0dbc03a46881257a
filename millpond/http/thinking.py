"""How much is thought before an answer, as far as a model's chat template lets one choose."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.http.errors import ApiError, unsupported
from millpond.http.generation_request import Conversation
from millpond.text.tokenizer import Tokenizer

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SWITCHES = ("enable_thinking", "thinking")
"""Names under which templates have thinking switched on and off."""
BUDGETS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096}
"""Tokens of thoughts, where the template has no setting for them."""
LEVELS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Of templates that know three."""


def template_settings(chat: Conversation, tokenizer: Tokenizer) -> Mapping[str, object]:
    """What the template is told. Raises ApiError 400 for what it does not listen to."""
    known = tokenizer.template_settings
    effort = chat.effort if not chat.lenient or _listens(tokenizer) else None
    for name in chat.settings:
        if name not in known:
            where = f"chat_template_kwargs.{name}"
            allowed = f"what this model's chat template reads ({', '.join(sorted(known)) or 'nothing'})"
            raise unsupported(where, chat.settings[name], allowed)
    return _effort(effort, tokenizer) | dict(chat.settings)


def thought_tokens(chat: Conversation, tokenizer: Tokenizer) -> int | None:
    """How many tokens may be thought; None: no limit. Raises ApiError 400 where thoughts cannot be ended."""
    most, param, value = chat.most_thought, "thinking_token_budget", str(chat.most_thought)
    budgets = {"none": 0} if chat.lenient else BUDGETS
    if most is None and chat.effort in budgets and not _listens(tokenizer):
        most, param, value = budgets[chat.effort], "reasoning_effort", chat.effort
    if most is None or tokenizer.dialect.thoughts is None:
        return None
    if any(mark not in tokenizer.marks for mark in tokenizer.dialect.thoughts):
        if chat.lenient:
            return None
        message = f"{param}: {value} is not supported with this model: the ends of its thoughts are not tokens"
        raise ApiError(400, message, param=param, code="unsupported_parameter")
    return most


def _listens(tokenizer: Tokenizer) -> bool:
    """Whether the template itself has how much is thought."""
    return bool({"reasoning_effort", *SWITCHES} & tokenizer.template_settings)


def _effort(effort: str | None, tokenizer: Tokenizer) -> dict[str, object]:
    known = tokenizer.template_settings
    if effort is None:
        return {}
    if "reasoning_effort" in known:
        return {"reasoning_effort": LEVELS.get(effort, effort)}
    for name in SWITCHES:
        if name in known:
            return {name: effort != "none"}
    if tokenizer.dialect.thoughts is not None or (effort == "none" and not tokenizer.dialect.messages):
        return {}
    allowed = "absent: this model's chat template has no setting for it"
    message = f'reasoning_effort: must be {allowed}, got "{effort}"'
    raise ApiError(400, message, param="reasoning_effort", code="unsupported_parameter")
