"""The model's chat template: messages in, text of a prompt out.

The prompt is what the template makes of the messages, in a form that it takes (`form`), and its failure is an error,
never a prompt of our own making. Every message is in the prompt, or that is an error too: a second rendering, with
marks around what each message says, tells. Nothing is changed after loading: any number of threads may render at once.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import jinja2
from jinja2 import meta

from millpond.observe.log import fields
from millpond.text.allowance import Allowance, EndlessError
from millpond.text.environment import Environment
from millpond.text.form import Form, probe
from millpond.text.marks import Marks, Shown, Span

log = logging.getLogger(__name__)

Message = Mapping[str, object]
Tool = Mapping[str, object]
Settings = Mapping[str, object]
Run = Callable[[Sequence[Message]], str]
NO_SETTINGS: Settings = MappingProxyType({})
_OURS = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "range"),
        *("dict", "namespace", "cycler", "joiner", "lipsum", "tojson"),
    }
)
"""What a template may look at and no client chooses."""

RENDER_SECONDS = 5.0
"""A template may compute so long for one conversation. Half a thousand messages take some hundredths of a second."""


class TemplateError(Exception):
    """A conversation cannot be made into a prompt; the message is fit for the client.

    ``index`` is that of the message at fault, where it is one message's.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class EndlessTemplateError(Exception):
    """A template does not come to an end with the simplest conversations: it cannot be used at all."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt."""

    text: str
    spans: list[Span]
    """Where what messages say stands in it, in characters; none where that is not known."""


class ChatTemplate:
    """One template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], seconds: float = RENDER_SECONDS) -> None:
        """``special_tokens``: ``bos_token``, ``eos_token`` and so on, as in tokenizer_config.json. ``seconds`` is how
        long one conversation may take, in seconds of computing. Raises EndlessTemplateError."""
        self.source = source
        self.form = Form()
        self._special_tokens = dict(special_tokens)
        self._allowance = Allowance(seconds)
        self._compiled: jinja2.Template | None = None
        self._broken = ""
        self._reads: frozenset[str] = frozenset()
        try:
            environment = Environment(self._allowance)
            self._compiled = environment.from_string(source)
            self._reads = frozenset(_read(environment.parse(source)))
        except Exception as error:  # noqa: BLE001 - whatever the compiler stumbles over
            # What is wrong with the template matters to those who chat, not to those who complete.
            self._broken = str(error)
            return
        try:
            self.form = probe(self._probed, source)
        except EndlessError as error:
            raise EndlessTemplateError(f"the chat template cannot be used: {error}") from error
        log.debug("chat template", extra=fields(form=self.form))

    @property
    def reads(self) -> frozenset[str]:
        """Names of what it looks at, beside what it defines itself."""
        return self._reads

    @property
    def settings(self) -> frozenset[str]:
        """Those of them that are for the client to choose."""
        return self._reads - _OURS - self._special_tokens.keys()

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = True,
        continued: bool = False,
        tools: Sequence[Tool] = (),
        settings: Settings = NO_SETTINGS,
    ) -> Rendered:
        """The prompt of a conversation. Raises TemplateError.

        ``generation_prompt``: end with the beginning of an answer. ``continued``: end within the last message, so that
        the answer goes on with it. ``tools``: what may be called. ``settings``: values of ``self.settings``.
        """
        run = partial(self._run, tools=tools, settings=settings)
        if self._compiled is None:
            raise TemplateError(f"the model's chat template cannot be read: {self._broken}")
        if not messages:
            raise TemplateError("a conversation has at least one message")
        with self._allowance.given():
            try:
                shown = self._shown(messages, partial(run, generation_prompt=generation_prompt))
                text = self._continued(messages, run) if continued else run(messages, generation_prompt)
            except Exception as error:
                # The template is a program of the model's authors: it may raise anything, on purpose or not.
                log.info("chat template failed", extra=fields(error=type(error).__name__, reason=error))
                raise TemplateError(f"the model's chat template refuses these messages: {error}") from error
        if shown is None:
            return Rendered(text, [])
        if shown.hidden:
            raise _not_shown(messages, shown.hidden[0])
        # An answer that goes on has the beginning of what was marked.
        return Rendered(text, shown.spans if shown.text.startswith(text) else [])

    def _shown(self, messages: Sequence[Message], run: Run) -> Shown | None:
        """What the template does with the messages; None where it has something against them. Raises EndlessError."""
        try:
            shown = self._marked(messages, run)
            hidden = shown.hidden
            if hidden and all(messages[index].get("role") == "assistant" for index in hidden):
                # Perhaps all of such an answer is a thought, cut off in the midst of it: would it show another?
                said = {index: {**messages[index], "content": "Hello."} for index in hidden}
                others = [said.get(index, message) for index, message in enumerate(messages)]
                hidden = self._marked(others, run).hidden
            return replace(shown, hidden=hidden)
        except EndlessError:
            raise
        except Exception:  # noqa: BLE001 - what the template has against the messages is told without the marks
            return None

    def _marked(self, messages: Sequence[Message], run: Run) -> Shown:
        marks = Marks()
        return marks.shown(messages, run(marks.around(messages)))

    def _continued(self, messages: Sequence[Message], run: Callable[[Sequence[Message], bool], str]) -> str:
        """The prompt up to the end of what the last message says."""
        mark = f"{secrets.randbelow(10**18):018d}"
        last = messages[-1]
        # The space tells whether the template keeps white space at the end of a message.
        text = run([*messages[:-1], {**last, "content": f"{last.get('content') or ''}{mark} "}], False)
        before, found, after = text.rpartition(mark)
        if not found:
            raise _not_shown(messages, len(messages) - 1)
        return before if after.startswith(" ") else before.rstrip()

    def _run(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Tool], settings: Settings
    ) -> str:
        return self._rendered(self.form.adapt(messages), generation_prompt, tools, settings)

    def _probed(self, messages: list[dict[str, object]]) -> str | None:
        with self._allowance.given():
            try:
                return self._rendered(messages, True, (), NO_SETTINGS)
            except EndlessError:
                raise
            except Exception:  # noqa: BLE001 - it refuses these messages
                return None

    def _rendered(
        self,
        messages: list[dict[str, object]],
        generation_prompt: bool,
        tools: Sequence[Tool],
        settings: Settings,
    ) -> str:
        """Raises whatever the template raises, and EndlessError."""
        assert self._compiled is not None
        return self._compiled.render(
            {
                **settings,
                **self._special_tokens,
                "messages": messages,
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": generation_prompt,
            }
        )


def _read(template: jinja2.nodes.Template) -> set[str]:
    """Names that it looks at and does not define itself."""
    blocks = (block.target for block in template.find_all(jinja2.nodes.AssignBlock))  # jinja takes them for undefined
    return meta.find_undeclared_variables(template) - {
        name.name for name in blocks if isinstance(name, jinja2.nodes.Name)
    }


def _not_shown(messages: Sequence[Message], index: int) -> TemplateError:
    role = messages[index].get("role")
    return TemplateError(f"the model's chat template does not show a message of role {role} here", index)
