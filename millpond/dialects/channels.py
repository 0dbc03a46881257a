"""Answers in messages of several channels, each with a header: gpt-oss.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
<|message|>{…}<|call|>`. Headers come malformed at times: whatever they are, nothing of an answer is lost.
"""

from __future__ import annotations

import re

from millpond.dialects.json_values import skip_space, value
from millpond.dialects.pieces import CallBegun, CallEnded, CallText
from millpond.dialects.speech import Speech
from millpond.dialects.tagged_calls import Tools
from millpond.dialects.tape import Looking, Reading, Tape

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
TO = "to=functions."
"""Before the name of a tool that is called."""
_TO = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_CHANNEL = re.compile(r"(?:<\|channel\|>)\s*(analysis|commentary|final)")


def answer(tape: Tape, tools: Tools | None, speech: Speech) -> Reading[None]:
    """All messages of an answer."""
    first = True
    while (yield from tape.more()):
        if first and not (yield from tape.ahead(START, CHANNEL, MESSAGE)):
            yield from _text(tape, speech)
        else:
            header = yield from _header(tape)
            channel, to = _CHANNEL.search(header), _TO.search(header)
            speech.thinking = channel is not None and channel[1] == "analysis"
            if to is not None and tools is not None:
                speech.thinking = False
                yield from _call(tape, to[1])
            else:
                yield from _text(tape, speech)
                speech.thinking = False
        first = False


def _header(tape: Tape) -> Looking[str]:
    """All up to behind the mark that begins what the message says, or up to one that ends it."""
    header = ""
    while (yield from tape.more()):
        found = yield from tape.ahead(MESSAGE, *ENDS)
        if found:
            if found == MESSAGE:
                tape.skip(found)
            break
        header += tape.before(MESSAGE, *ENDS)
    return header


def _text(tape: Tape, speech: Speech) -> Reading[None]:
    found = yield from speech.until(tape, START, CHANNEL, *ENDS)
    yield from speech.rest(tape.taken)
    if found in ENDS:
        tape.skip(found)


def _call(tape: Tape, name: str) -> Reading[None]:
    yield CallBegun(name)
    yield from skip_space(tape)
    whole, told = False, False
    if (yield from tape.peek()) == "{":
        whole, told = (yield from value(tape)), True
    while (yield from tape.more()):  # what is no JSON is told as it is: the client's tool says what is wrong
        text = tape.before(START, CHANNEL, *ENDS)
        if text.strip():
            told = True
            yield CallText(text)
        elif not text and (yield from tape.ahead(START, CHANNEL, *ENDS)):
            whole = True
            yield from tape.expect(*ENDS)
            break
    if not told and whole:
        yield CallText("{}")
    yield CallEnded(whole)
