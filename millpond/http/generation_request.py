"""What a client asks of the model, whichever API it speaks: each API's codec makes this of a body."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from millpond.http.speculation_fields import SpeculativeOptions
from millpond.http.values import deeper_than
from millpond.text.spelled import Spelled
from millpond.types import SamplingParams

SEED_MASK = 2**64 - 1
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's authors may recommend."""
SamplingDefaults = Mapping[str, float]
"""Their recommendations, by these names."""
NO_DEFAULTS: SamplingDefaults = MappingProxyType({})
NO_ARGUMENTS: Mapping[str, object] = {"type": "object", "properties": {}}
"""The schema of a tool that takes none."""
MOST_DEEP = 64
"""Levels of arguments that a template may look into."""
LONGEST_SALT = 256
"""Characters of a ``cache_salt``."""


Spelling = Callable[[str, str], str]
"""A call's name and arguments → the arguments as the model wrote them; empty where that is not known."""


def as_it_is(_name: str, _arguments: str) -> str:
    """The spelling of whoever has none in mind."""
    return ""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """Of a tool, by an assistant."""

    id: str
    name: str
    arguments: str
    """A JSON text; models write others, too."""

    def for_template(self, spelling: Spelling) -> dict[str, object]:
        """Templates look into arguments, so they are given as values; as a text they are what the model wrote."""
        written = spelling(self.name, self.arguments)
        try:
            arguments = json.loads(written or self.arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict) or deeper_than(arguments, MOST_DEEP):
            arguments = {"_raw": self.arguments}
        elif written:
            arguments = Spelled(arguments, written)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


Part = Text | Reasoning | Call
"""What a message may hold."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What may be called."""

    name: str
    description: str
    parameters: Mapping[str, object]
    """The JSON schema of its arguments; empty: it has none."""
    strict: bool = False
    """Arguments follow the schema to the letter."""
    where: str = "tools"
    """The field of its schema, for messages about that."""
    shared: bool = field(default=False, compare=False)
    """Its client will send others that are alike up to its end."""

    def for_template(self) -> dict[str, object]:
        """As chat templates know tools."""
        shown = {"name": self.name, "description": self.description, "parameters": self.parameters or NO_ARGUMENTS}
        return {"type": "function", "function": shown}


@dataclass(frozen=True, slots=True)
class Message:
    """``role`` is system, developer, user, assistant or tool."""

    role: str
    parts: tuple[Part, ...]
    name: str | None = None
    tool_call_id: str | None = None
    where: str = field(default="", compare=False)
    """The part of the request that it is, or with which it begins."""
    shared: bool = field(default=False, compare=False)
    """Its client will send others that are alike up to its end."""

    @property
    def calls(self) -> bool:
        """Whether it calls something."""
        return any(isinstance(part, Call) for part in self.parts)

    def texts(self) -> Iterator[str]:
        """All that a template may show of it beside its role."""
        for part in self.parts:
            yield from (part.name, part.arguments) if isinstance(part, Call) else (part.text,)
        yield from (text for text in (self.name, self.tool_call_id) if text is not None)

    def for_template(self, spelling: Spelling = as_it_is) -> dict[str, object]:
        """As chat templates know messages."""
        said = "".join(part.text for part in self.parts if isinstance(part, Text))
        thought = "\n".join(part.text for part in self.parts if isinstance(part, Reasoning))
        calls = [part.for_template(spelling) for part in self.parts if isinstance(part, Call)]
        made: dict[str, object] = {"role": self.role, "content": said}
        extra: dict[str, object] = {"name": self.name, "tool_call_id": self.tool_call_id}
        extra |= {"reasoning_content": thought or None, "tool_calls": calls or None}
        return made | {name: value for name, value in extra.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that the chat template makes of messages."""

    messages: tuple[Message, ...]
    generation_prompt: bool = True
    """It ends with the beginning of a new answer."""
    continued: bool = False
    """It ends within the last message, so that the answer goes on with it."""
    tools: tuple[Tool, ...] = ()
    """What the template shows, and the answer may call."""
    introduced: tuple[Tool, ...] = ()
    """It may call these as well: messages show them."""
    must_call: bool = False
    """It has to call one of them."""
    only: frozenset[str] | None = None
    """Names of those that it may call; None: all."""
    one_call: bool = False
    """No more than one of them."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What the chat template is to be told, by its own names."""
    effort: str | None = None
    """How much is to be thought; None: as the template has it."""
    most_thought: int | None = None
    """Tokens of thoughts; None: as the effort has it."""
    lenient: bool = False
    """What a model has no setting for is left out, and not refused."""

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        all_of_them = (*self.tools, *self.introduced)
        return [tool for tool in all_of_them if self.only is None or tool.name in self.only]

    @property
    def schemas(self) -> Mapping[str, Mapping[str, object]] | None:
        """Of their arguments, by name; None where nothing can be called."""
        return {tool.name: tool.parameters for tool in self.callable} or None


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What is said has to look like this, as an expression of a grammar."""

    param: str
    """The field that asks for it, for messages about it."""
    expression: str


@dataclass(frozen=True, slots=True)
class PlainPrompts:
    """Prompts that are texts or token ids."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False
    """Each answer is to be shown behind its prompt."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """``n`` answers to each prompt. Names of fields are as the client's API has them, for messages about them."""

    model: str
    prompt: Conversation | PlainPrompts
    prompt_field: str
    sampling: SamplingParams
    """As the client wants it, but for ``max_tokens``, ``seed`` and ends, which each answer has of its own."""
    unsaid: frozenset[str]
    """Fields of ``sampling`` of which the client said nothing, so that the model's authors may."""
    max_tokens: int | None
    """Most tokens of an answer as the client said it; None when it did not."""
    max_tokens_field: str = "max_tokens"
    clamped: bool = False
    """More than the context has room for is as much as it has."""
    silent: bool = False
    """The prompt is read, and nothing of an answer is shown."""
    default_tokens: int | None = None
    """Most tokens when the client said nothing; None: what is left of the context."""
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """Of the first answer; each further one has the next. None: all are random."""
    ignore_eos: bool = False
    form: AnswerForm | None = None
    """None: what is said may look like anything."""
    ignored: tuple[str, ...] = ()
    """What of the request is left out, each behind the name of its field."""
    stream: bool = False
    parse_special: bool = False
    """Control tokens written out in plain prompts, and in what is expected of their answers, are recognised."""
    user: str = ""
    priority: int = 0
    """The lowest goes first."""
    cache_salt: str = ""
    speculative: SpeculativeOptions | None = None
    prediction: str | None = None
    """What is expected of the answer."""

    @property
    def prompt_count(self) -> int:
        return 1 if isinstance(self.prompt, Conversation) else len(self.prompt.prompts)

    def params(
        self, max_tokens: int, choice: int, ends: Sequence[int], recommended: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        """How answer ``choice`` to a prompt is drawn. ``ends`` are the token ids that end an answer."""
        values = {name: value for name, value in recommended.items() if name in self.unsaid}
        top_k = max(0, int(values.pop("top_k", self.sampling.top_k)))
        seed = secrets.randbits(64) if self.seed is None else (self.seed + choice) & SEED_MASK
        stops = [] if self.ignore_eos else list(ends)
        return msgspec.structs.replace(
            self.sampling, **values, top_k=top_k, max_tokens=max_tokens, seed=seed, stop_token_ids=stops
        )

    def without_content(self) -> GenerationRequest:
        """What is still needed once the prompts have been made: all that is small."""
        return replace(self, prompt=PlainPrompts(), stop=(), prediction=None, form=None)
