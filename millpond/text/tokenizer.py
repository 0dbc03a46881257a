"""The tokenizer of the model being served: text and chats to token ids, and ids back to text.

Invariants: no prompt begins with two BOS tokens; ends of turn are known by id. After loading nothing here is changed,
so every method may be called from any number of threads at once.

Its parts: ``settings``, ``template_files`` and ``loading`` read the files, ``template`` makes a conversation into a
text, ``masks`` and ``encoder`` see to it that what clients write is text and nothing else, ``decoding`` turns ids back
into text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import tokenizers

from millpond.dialects.dialect import Dialect
from millpond.dialects.find import Evidence, Family, find
from millpond.dialects.reader import AnswerReader
from millpond.dialects.tagged_calls import Tools
from millpond.text.answer import Answer, AnswerText
from millpond.text.control import control_tokens
from millpond.text.decoding import decoded, decoding_of
from millpond.text.detokenize import Detokenizer
from millpond.text.encoder import Encoder
from millpond.text.ends import configured_ends, turn_ends
from millpond.text.errors import TextError
from millpond.text.loading import TokenizerError, load_backend
from millpond.text.marks import Span
from millpond.text.masks import Masks
from millpond.text.own_writing import TOOL, TOOLS, OwnWriting, own_writing, reads_call
from millpond.text.read_answer import ReadAnswer
from millpond.text.settings import TokenizerSettings, read_settings
from millpond.text.stops import StopStrings
from millpond.text.template import (
    NO_SETTINGS,
    ChatTemplate,
    EndlessTemplateError,
    Message,
    Rendered,
    Settings,
    TemplateError,
    Tool,
)
from millpond.text.template_files import TemplateFileError, find_template

__all__ = ["ChatPrompt", "Message", "Span", "TemplateError", "TextError", "Tokenizer", "TokenizerError"]

_BLANKS = 4
"""White space that a template may write behind a mark, in tokens."""


class ChatPrompt(NamedTuple):
    """A conversation as a model reads it."""

    tokens: list[int]
    spans: tuple[Span, ...]
    """Where what messages say stands in them, from its first token to the one behind it, in order; none where that is
    not known."""


class Tokenizer:
    """See the module's docstring. Made by ``load``."""

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: TokenizerSettings, folder: Path, tool_format: str = "auto"
    ) -> None:
        """``backend`` becomes this object's own; ``folder`` may hold config files that name more end tokens.
        ``tool_format``: the family as the user names it; auto: it is found out."""
        self._backend = backend
        self._decoding = decoding_of(backend)
        self._spelled: dict[int, bytes] = {}
        self._special_tokens = dict(settings.special_tokens)
        source = find_template(folder)
        self._template = None if source is None else ChatTemplate(source, settings.special_tokens)
        controls = control_tokens(backend, source or "")
        self._encoder = Encoder(backend, controls)
        self._masks = Masks(controls, source or "", backend.normalizer)
        self._added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of(settings.special_tokens.get("bos_token"))
        self._prefix = _prefix(backend, settings.add_bos, self.bos_token_id)
        self._frame = _frame(backend)
        self.line_ends = _single(self._encoder, "\n", "\n\n")
        """Ids of tokens that end lines and nothing else."""
        self.eos_token_ids = self._find_ends(folder, self._id_of(settings.special_tokens.get("eos_token")))
        self.family = self._find_family(settings, tool_format)
        """How the model writes, and how that is known."""
        self.marks = self._marks_of(self.dialect)
        """Those of the dialect that are tokens of their own, with their ids."""

    @classmethod
    def load(cls, folder: Path, tool_format: str = "auto") -> Tokenizer:
        """Read the tokenizer in a model folder; nothing is fetched and no code from the folder is run.

        Raises TokenizerError when there is none, it needs code of its own, or its chat template cannot be had.
        """
        try:
            return cls(load_backend(folder), read_settings(folder), folder, tool_format)
        except (TemplateFileError, EndlessTemplateError) as error:
            raise TokenizerError(str(error)) from error

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, those included that were added to the vocabulary."""
        return self._backend.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """As tokenizer.json has it."""
        return str(self._backend.to_str())

    def described(self) -> dict[str, object]:
        """What the model's folder says of it: names of special tokens with what they spell, and the chat template."""
        template = None if self._template is None else self._template.source
        return {**self._special_tokens, "chat_template": template, "vocab_size": self.vocab_size}

    @property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls."""
        return self.family.dialect

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template_settings(self) -> frozenset[str]:
        """Names of what a client may set in the chat template."""
        return frozenset() if self._template is None else self._template.settings

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a plain text, after the BOS that the tokenizer puts first.

        Control tokens written out in the text are text, unless ``parse_special``: then they are recognised, and a text
        that begins with BOS gets no second one. Lone surrogates read as U+FFFD. Raises TextError.
        """
        ids = self.text_tokens(text, parse_special=parse_special)
        return ids if parse_special and ids[:1] == self._prefix[:1] else self._prefix + ids

    def whole(self, text: str) -> list[int]:
        """Ids of a text by itself, with what tokenizer.json puts around every text: what models that make vectors of
        texts were trained with. Nothing in it is a control token. Raises TextError."""
        before, behind = self._frame
        return [*before, *self._encoder.plain(text), *behind]

    def text_tokens(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Like ``encode``, but of a text that stands behind another: nothing is put first."""
        return self._encode(text) if parse_special else self._encoder.plain(text)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = True,
        continued: bool = False,
        tools: Sequence[Tool] = (),
        settings: Settings = NO_SETTINGS,
    ) -> ChatPrompt:
        """A conversation, ready for the assistant to answer, who may call ``tools``.

        The template alone decides about BOS and writes control tokens. What the messages say is text, whatever it
        spells, except for the marks of thoughts and calls in the assistant's own answers, which are as they were
        drawn. ``generation_prompt``: with the beginning of an answer; ``continued``: up to the end of what the last
        message says. ``settings``: those of the template that a client chooses, in words and numbers that need no
        disguise. Raises TemplateError, TextError.
        """
        masked = None if self._template is None else self._masks.of(messages, tools)
        if masked is None:
            rendered = self._render(messages, generation_prompt, continued, tools, settings)
            tokens = self._encode(rendered.text)
            return ChatPrompt(tokens, self._in_tokens(rendered, tokens, str))
        try:
            rendered = self._render(masked.messages, generation_prompt, continued, masked.tools, settings)
        except TemplateError as error:
            raise TemplateError(masked.lifted(str(error)), error.index) from error
        tokens = self._encoder.plain(masked.lifted(self._encoder.named(rendered.text)))
        return ChatPrompt(tokens, self._in_tokens(rendered, tokens, masked.lifted))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens and unknown ids left out. Raises TextError."""
        return decoded(self._backend, ids)

    def answer(self, stops: StopStrings) -> AnswerText:
        """The text side of an answer that is nothing but text."""
        return Answer(self.detokenizer(), stops)

    def read_answer(
        self, stops: StopStrings, prompt: Sequence[int], tools: Tools | None, *, one_call: bool = False
    ) -> AnswerText:
        """That of an answer to a chat's ``prompt``, in which thoughts and calls of ``tools`` are told apart.

        ``one_call``: the first one ends it.
        """
        dialect = self.dialect
        if tools is None and not dialect.thoughts and not dialect.messages:
            return self.answer(stops)
        return self._read(dialect, self.marks, tools, stops, thinking=self.in_thought(prompt), one_call=one_call)

    def in_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends right behind the mark that begins a thought: templates may write it themselves."""
        if self.dialect.thoughts is None:
            return False
        opening = self.dialect.thoughts[0]
        tail = b"".join(map(self.token_bytes, prompt[-len(opening) - _BLANKS :])).decode("utf-8", "replace")
        return tail.rstrip().endswith(opening)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental form of ``decode``, for one answer."""
        return self._decoding.detokenizer()

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, maybe only part of a character; special tokens are spelled out."""
        return self._decoding.token_bytes(token)

    def spelled(self, tokens: Sequence[int]) -> list[bytes]:
        """``token_bytes`` of each."""
        known = self._spelled
        for token in set(tokens) - known.keys():
            known[token] = self.token_bytes(token)
        return [known[token] for token in tokens]

    def token_text(self, token: int) -> str:
        """``token_bytes`` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _read(
        self,
        dialect: Dialect,
        marks: Mapping[str, int],
        tools: Tools | None,
        stops: StopStrings,
        *,
        thinking: bool = False,
        one_call: bool = False,
    ) -> ReadAnswer:
        reader = AnswerReader(dialect, marks, tools, thinking=thinking)
        by_id = {index: mark for mark, index in marks.items()}
        return ReadAnswer(self.detokenizer, reader, by_id, stops, one_call=one_call)

    def _marks_of(self, dialect: Dialect) -> dict[str, int]:
        return {mark: self._added[mark] for mark in dialect.marks if mark in self._added}

    def _find_family(self, settings: TokenizerSettings, tool_format: str) -> Family:
        template = self._template
        shows_tools = template is not None and "tools" in template.reads
        own = own_writing(partial(self._rendered_or_none, tools=[TOOL] if shows_tools else [])) if template else None
        own = own or OwnWriting()
        written: list[int] = []
        with suppress(TextError):  # a vocabulary that cannot spell it
            written = list(takewhile(lambda token: token not in self.eos_token_ids, self._encode(own.call)))
        evidence = Evidence(
            template.source if template else "",
            self._added.keys(),
            shows_tools,
            asked=tool_format,
            parser=settings.tool_parser,
            declared=settings.response_template,
            call=b"".join(self.spelled(written)).decode("utf-8", "replace") if shows_tools else "",
            thought=own.thought,
        )

        marks = set(self._added.values()).intersection(written)

        def reads(dialect: Dialect) -> bool:
            known = self._marks_of(dialect)
            if dialect.leading is not None and marks - set(known.values()):
                return False  # it would find the call because it does not see what stands before it
            answer = self._read(dialect, known, TOOLS, StopStrings())
            return reads_call([*answer.add(written).pieces, *answer.finish().pieces])

        return find(evidence, reads)

    def _encode(self, text: str) -> list[int]:
        """What tokenizer.json makes of a text, control tokens in it recognised."""
        return self._encoder.parsed(text)

    def _render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        continued: bool = False,
        tools: Sequence[Tool] = (),
        settings: Settings = NO_SETTINGS,
    ) -> Rendered:
        if self._template is None:
            raise TemplateError("this model has no chat template; use /v1/completions")
        return self._template.render(messages, generation_prompt, continued, tools, settings)

    def _in_tokens(self, rendered: Rendered, tokens: Sequence[int], lifted: Callable[[str], str]) -> tuple[Span, ...]:
        """The spans of a prompt in its tokens; none where these spell another text, as by some normalizers."""
        edges = sorted({edge for _, begin, end in rendered.spans for edge in (begin, end)} | {len(rendered.text)})
        parts = [
            lifted(rendered.text[begin:end]).encode(errors="surrogatepass") for begin, end in pairwise((0, *edges))
        ]
        pieces, text = self.spelled(tokens), b"".join(parts)
        spelled = b"".join(pieces)
        if not spelled.endswith(text) or spelled[: -len(text) or None].strip(b" "):  # some put a blank first
            return ()
        ends, extra = list(accumulate(map(len, pieces))), len(spelled) - len(text)
        bytes_before = dict(zip(edges, accumulate(map(len, parts)), strict=True))

        def token(edge: int) -> int:
            return bisect_right(ends, bytes_before[edge] + extra)

        return tuple(Span(message, token(begin), token(end)) for message, begin, end in rendered.spans)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _find_ends(self, folder: Path, named: int | None) -> frozenset[int]:
        ends = configured_ends(folder)
        if named is not None:
            ends |= {named}
        if self._template is not None:
            ends |= turn_ends(self._backend, self._template.source, self._render_answer)
        return frozenset(ends)

    def _render_answer(self, answer: str) -> str | None:
        """A conversation that ends with this answer, without generation prompt; None if the template refuses it."""
        return self._rendered_or_none([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}])

    def _rendered_or_none(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str | None:
        try:
            return self._render(messages, generation_prompt=False, tools=tools).text
        except TemplateError:
            return None


def _single(encoder: Encoder, *texts: str) -> list[int]:
    """Ids of those that are one token."""
    found: list[int] = []
    for text in texts:
        with suppress(TextError):  # a vocabulary that cannot spell it
            ids = encoder.plain(text)
            found += ids if len(ids) == 1 else []
    return found


def _frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that tokenizer.json puts before and behind every text."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    found = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    start = next(found, None)
    return ([], []) if start is None else (whole[:start], whole[start + len(bare) :])


def _prefix(backend: tokenizers.Tokenizer, add_bos: bool | None, bos: int | None) -> list[int]:
    """The ids that stand before any text: BOS, or nothing. ``add_bos`` None: as tokenizer.json says."""
    if add_bos is not None and bos is not None:
        return [bos] if add_bos else []
    try:
        plain = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a", add_special_tokens=True).ids
    except Exception:  # noqa: BLE001 - a vocabulary that cannot spell this letter
        return []
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
