"""The model's chat template: messages in, text of a prompt out.

The template is applied once and its failure is an error, never a prompt of our own making. Nothing is changed after
loading: any number of threads may render at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import jinja2

from kvarn.text.environment import environment

log = logging.getLogger(__name__)

Message = Mapping[str, object]


class TemplateError(Exception):
    """A conversation cannot be made into a prompt; the message is fit for the client."""


class ChatTemplate:
    """One template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: ``bos_token``, ``eos_token`` and so on, as in tokenizer_config.json."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: jinja2.Template | None = None
        self._broken = ""
        try:
            self._compiled = environment().from_string(source)
        except jinja2.TemplateError as error:
            # What is wrong with the template matters to those who chat, not to those who complete.
            self._broken = str(error)

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """The prompt of a conversation. Raises TemplateError.

        Role ``developer`` reads as ``system`` for templates that do not mention it.
        """
        if self._compiled is None:
            raise TemplateError(f"the model's chat template cannot be read: {self._broken}")
        if not messages:
            raise TemplateError("a conversation has at least one message")
        plain = [_plain(message) for message in messages]
        if "developer" not in self.source:
            for message in plain:
                if message.get("role") == "developer":
                    message["role"] = "system"
        try:
            return self._compiled.render(
                {
                    **self._special_tokens,
                    "messages": plain,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": generation_prompt,
                }
            )
        except Exception as error:
            # The template is a program of the model's authors: it may raise anything, on purpose or not.
            log.info("chat template failed: %s: %s", type(error).__name__, error)
            raise TemplateError(f"the model's chat template refuses these messages: {error}") from error


def _plain(message: Message) -> dict[str, object]:
    """A copy for the template, which may change it; keys without a value are left out."""
    return {name: value for name, value in message.items() if value is not None}
