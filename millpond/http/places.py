"""Which part of a request a token of its prompt comes from, so that a client hears what in it is new to the cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from millpond.http.generation_request import Conversation, Tool
from millpond.text.tokenizer import ChatPrompt, Span, Tokenizer

HEADER_TOKENS = 16
"""Most that stand before what a message says and are its own: role and marks. More is the template's own text."""
TOOLS = "tools"
TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Places:
    """From which token on each part of a request stands in its prompt."""

    starts: tuple[int, ...] = ()
    """Ascending."""
    names: tuple[str, ...] = ()

    def at(self, token: int) -> str:
        """The part, as the request has it: ``tools``, ``messages[3].tool_calls``; ``template`` for what the chat
        template says by itself before anything else, such as the date; empty where the token is no part of it."""
        index = bisect_right(self.starts, token) - 1
        return self.names[index] if index >= 0 else ""


NOWHERE = Places()


def places_of(conversation: Conversation, prompt: ChatPrompt, tokenizer: Tokenizer) -> Places:
    """Of a prompt that was made of the conversation."""
    starts = _without_repeats(_starts(conversation, prompt, tokenizer)) if prompt.spans else []
    return Places(tuple(start for start, _ in starts), tuple(name for _, name in starts))


def shared_ends(conversation: Conversation, prompt: ChatPrompt) -> list[int]:
    """Positions up to which the client says that it will send others that are alike: before what the next message says,
    for the head of that will be alike, too. Ascending."""
    messages = conversation.messages
    last = [index for index, message in enumerate(messages) if message.shared]
    if any(
        tool.shared for tool in conversation.tools
    ):  # they stand before all that is said, or right behind the first system message
        last.insert(0, 0 if messages[0].role in ("system", "developer") else -1)
    begins = [(message, begin) for message, begin, _ in prompt.spans]
    found = (next((begin for message, begin in begins if message > index), 0) for index in last)
    return sorted({begin for begin in found if begin})


def _starts(conversation: Conversation, prompt: ChatPrompt, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """What stands between what two messages say is the second one's head, unless it is more: calls of the first one,
    or tools. Messages that say nothing are part of that."""
    messages, tokens = conversation.messages, prompt.tokens
    behind, before = 0, -1
    for index, begin, end in (*prompt.spans, Span(len(messages), len(tokens), len(tokens))):
        name = messages[index].where if index < len(messages) else ""
        silent = range(before + 1, min(index + 1, len(messages)))
        caller = next((each for each in range(max(0, before), index) if messages[each].calls), None)
        if caller is not None:
            ended = (place for place in range(behind, begin) if tokens[place] in tokenizer.eos_token_ids)
            yield behind, f"{messages[caller].where}.tool_calls"
            yield next(ended, begin), messages[caller + 1].where if caller + 1 < len(messages) else ""
        elif _shows_tools(conversation.tools, tokens[behind:begin], tokenizer):
            yield behind, TOOLS
        elif before >= 0 or begin <= HEADER_TOKENS:
            yield behind, messages[silent[0]].where if silent else name
        else:
            yield behind, TEMPLATE
            yield begin - HEADER_TOKENS, name
        yield begin, name
        # Where a message was longer before, the first token behind it is the one that differs. Answers are known
        # without it, as they were drawn.
        answered = index < len(messages) and messages[index].role == "assistant"
        behind, before = end + (not answered), index


def _shows_tools(tools: Sequence[Tool], tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether they are what these tokens spell."""
    if not tools or len(tokens) <= HEADER_TOKENS:
        return False
    return tools[0].name.encode() in b"".join(tokenizer.spelled(tokens))


def _without_repeats(starts: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Ascending, each name where it begins; of several at one token the last one."""
    kept: list[tuple[int, str]] = []
    for start, name in starts:
        while kept and kept[-1][0] >= start:
            kept.pop()
        if not kept or kept[-1][1] != name:
            kept.append((start, name))
    return kept
