"""From what the client sent to prompt tokens that fit the model's context.

Runs in a text thread. A text that is far too long is refused after reading a part of it, so that the refusal is quick
whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from millpond.client.public import public
from millpond.http.errors import ApiError, PromptTooLong, bad_value
from millpond.http.generation_request import Conversation, GenerationRequest, Spelling, as_it_is
from millpond.http.places import NOWHERE, Places, places_of, shared_ends
from millpond.http.speculation_fields import check_mode
from millpond.http.thinking import template_settings
from millpond.text.tokenizer import TemplateError, TextError, Tokenizer
from millpond.types import ModelInfo

CHARACTERS_PER_TOKEN = 4
"""Texts shorter than this many characters per token of context are simply tokenised."""
PIECE = 16_384
"""Characters tokenised at a time when only counting."""
PIECE_SLACK = 8
"""Tokens that a cut between pieces, and what a tokenizer puts first, may add."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """One prompt ready for the engine. ``echo`` is its text where the client wants it repeated, else empty."""

    tokens: list[int]
    echo: str
    max_tokens: int
    clamped: bool = False
    """More were asked for than the context has room for."""
    places: Places = NOWHERE
    """Where in it the parts of its request are."""
    shared: tuple[int, ...] = ()
    """Positions behind which the client's next prompts may differ, as it says."""


def check_limits(asked: GenerationRequest, info: ModelInfo) -> None:
    """Refuse without reading the prompt what no prompt could make valid. Raises ApiError 400."""
    wanted = asked.max_tokens
    if wanted is not None and wanted >= info.context_length and not asked.clamped:
        raise _too_many(asked, wanted, info.context_length, 1)
    for token in asked.sampling.logit_bias:
        if token >= info.vocab_size:
            raise bad_value("logit_bias", str(token), f"token ids below {info.vocab_size}")
    check_mode(asked.speculative, info)


def read_prompts(
    asked: GenerationRequest, tokenizer: Tokenizer, info: ModelInfo, spelling: Spelling = as_it_is
) -> list[TokenPrompt]:
    """Apply the template, tokenise what is text, check what is token ids. Raises ApiError 400."""
    if isinstance(asked.prompt, Conversation):
        return [_chat_prompt(asked, asked.prompt, tokenizer, info, spelling)]
    for prompt in asked.prompt.prompts:  # before any work is done for the others
        if not isinstance(prompt, str) and len(prompt) >= info.context_length:
            raise _prompt_too_long(asked, len(prompt), info.context_length)
    return [_plain_prompt(asked, prompt, asked.prompt.echo, tokenizer, info) for prompt in asked.prompt.prompts]


def prediction_tokens(text: str, tokenizer: Tokenizer, most: int, *, parse_special: bool = False) -> list[int]:
    """The tokens that a client expects of its answer; a text that is far too long is read only so far.

    So is one that the tokenizer cannot read: what is expected changes nothing of the answer.
    """
    tokens: list[int] = []
    whole = len(text) <= CHARACTERS_PER_TOKEN * most
    for piece in [text] if whole else (piece for piece, _ in _pieces([text])):
        try:
            tokens += tokenizer.text_tokens(piece, parse_special=parse_special)
        except TextError:
            break
        if len(tokens) >= most:
            break
    return tokens[:most]


def _chat_prompt(
    asked: GenerationRequest, conversation: Conversation, tokenizer: Tokenizer, info: ModelInfo, spelling: Spelling
) -> TokenPrompt:
    messages, context, param = conversation.messages, info.context_length, asked.prompt_field
    tools = [tool.for_template() for tool in conversation.tools]
    if tools and not tokenizer.dialect.calls_tools:
        raise ApiError(
            400, "tools: this model's chat template has no tools", param="tools", code="unsupported_parameter"
        )
    settings = template_settings(conversation, tokenizer)
    texts = [text for message in messages for text in message.texts()]
    texts += [text for tool in conversation.tools for text in (tool.name, tool.description)]
    # Each message is at least one token, were it only that which ends it.
    many = len(messages) >= context
    try:
        # Control tokens recognised are one token each, which is the least that they can be.
        if many or surely_longer(tokenizer, texts, context, len(messages), parse_special=True):
            raise _prompt_too_long(asked, context + 1, context, "more than ")
        shown = [message.for_template(spelling) for message in messages]
        prompt = tokenizer.chat_prompt(shown, conversation.generation_prompt, conversation.continued, tools, settings)
    except TextError as error:
        raise _unreadable(asked, error) from error
    except TemplateError as error:
        where = param if error.index is None else f"{param}[{error.index}]"
        raise ApiError(400, f"{where}: {public(str(error))}", param=where, code="template_error") from error
    return replace(
        _checked(asked, prompt.tokens, "", context),
        places=places_of(conversation, prompt, tokenizer),
        shared=tuple(shared_ends(conversation, prompt)),
    )


def _plain_prompt(
    asked: GenerationRequest, prompt: str | tuple[int, ...], echo: bool, tokenizer: Tokenizer, info: ModelInfo
) -> TokenPrompt:
    context, special = info.context_length, asked.parse_special
    try:
        if isinstance(prompt, str):
            if surely_longer(tokenizer, [prompt], context, 0, parse_special=special):
                raise _prompt_too_long(asked, context + 1, context, "more than ")
            tokens = tokenizer.encode(prompt, parse_special=special)
            return _checked(asked, tokens, prompt if echo else "", context)
        for token in prompt:
            if not 0 <= token < info.vocab_size:
                raise bad_value(asked.prompt_field, token, f"token ids from 0 to {info.vocab_size - 1}")
        return _checked(asked, list(prompt), tokenizer.decode(prompt) if echo else "", context)
    except TextError as error:
        raise _unreadable(asked, error) from error


def _checked(asked: GenerationRequest, tokens: list[int], echo: str, context: int) -> TokenPrompt:
    if not tokens:
        raise bad_value(asked.prompt_field, "", "not empty")
    if len(tokens) >= context:
        raise _prompt_too_long(asked, len(tokens), context)
    room, wanted = context - len(tokens), asked.max_tokens
    clamped = wanted is not None and wanted > room
    if clamped and not asked.clamped:
        raise _too_many(asked, wanted or 0, context, len(tokens))
    most = min(room, asked.default_tokens or room) if wanted is None else min(wanted, room)
    return TokenPrompt(tokens, echo, most, clamped)


def _prompt_too_long(asked: GenerationRequest, size: int, context: int, least: str = "") -> PromptTooLong:
    """``least``: says that it is ``size`` less one, or more."""
    param, got = asked.prompt_field, f"{least}{size - 1 if least else size}"
    message = f"{param}: must have at most {context - 1} tokens (the model's context is {context}), got {got}"
    return PromptTooLong(message, param, size, context)


def _too_many(asked: GenerationRequest, wanted: int, context: int, prompt_tokens: int) -> ApiError:
    param = asked.max_tokens_field
    allowed = f"must be at most {context - prompt_tokens} here, got {wanted}"
    why = f"the model's context is {context} tokens and the prompt has at least {prompt_tokens}"
    return ApiError(400, f"{param}: {allowed}; {why}", param=param, code="context_length_exceeded")


def _unreadable(asked: GenerationRequest, error: TextError) -> ApiError:
    return ApiError(400, f"{asked.prompt_field}: {error}", param=asked.prompt_field, code="unreadable_text")


def surely_longer(tokenizer: Tokenizer, texts: Sequence[str], context: int, least: int, *, parse_special: bool) -> bool:
    """Whether a prompt of these texts and at least ``least`` tokens between them is longer than the context, if that
    can be seen without reading all of it."""
    if sum(map(len, texts)) <= CHARACTERS_PER_TOKEN * context:
        return False
    count = least
    for piece, ends in _pieces(texts):
        # A newline stands for what is between two texts: it may be a token, and take one from the text before it.
        count += max(0, len(tokenizer.text_tokens(piece, parse_special=parse_special)) - PIECE_SLACK - 2 * ends)
        if count > context:
            return True
    return False


def _pieces(texts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The texts, a newline behind each, cut into pieces, each with how many texts end in it."""
    short: list[str] = []
    size = 0
    for text in texts:
        if len(text) < PIECE - size:
            short.append(text)
            size += len(text) + 1
            continue
        yield "\n".join(short), len(short)
        short, size = [], 0
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE], 1
    yield "\n".join(short), len(short)
