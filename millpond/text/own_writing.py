"""What a chat template itself writes for a call and for a thought: the best witness of how its models write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from millpond.dialects.find import TRIED, TRIED_NAME, is_mark
from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said

Message = Mapping[str, object]
Render = Callable[[Sequence[Message]], str | None]
"""The text of a conversation, without the beginning of an answer; None where the template refuses it."""

_SAID = "millpond-said"
_THOUGHT = "millpond-thought"
_USER: Message = {"role": "user", "content": "Hello."}
_CALL: Message = {
    "id": "call00000",
    "type": "function",
    "function": {"name": TRIED_NAME, "arguments": dict(TRIED)},
}
TOOLS: Mapping[str, Mapping[str, object]] = {
    TRIED_NAME: {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}
}
TOOL: Message = {
    "type": "function",
    "function": {"name": TRIED_NAME, "description": "", "parameters": TOOLS[TRIED_NAME]},
}


class OwnWriting(NamedTuple):
    """Texts of answers as the template writes them, behind the beginning of the answer."""

    call: str = ""
    """One call, and what follows it; empty where the template shows none."""
    thought: tuple[str, str] | None = None
    """The marks around a thought."""


def own_writing(render: Render) -> OwnWriting:
    """Found out by a few conversations."""
    said = render([_USER, _answer(content=_SAID)])
    if said is None or _SAID not in said:
        return OwnWriting()
    opening = said[: said.index(_SAID)]
    calling = [_USER, _answer(tool_calls=[_CALL])]
    result = {"role": "tool", "tool_call_id": _CALL["id"], "name": TRIED_NAME, "content": "1"}
    called = render(calling) or render([*calling, result]) or ""
    return OwnWriting(_behind(opening, called), _thought(opening, render))


def reads_call(pieces: Sequence[Piece]) -> bool:
    """Whether that is what was read: the call, whole, and nothing else."""
    names = [piece.name for piece in pieces if isinstance(piece, CallBegun)]
    arguments = "".join(piece.text for piece in pieces if isinstance(piece, CallText))
    said = "".join(piece.text for piece in pieces if isinstance(piece, Said))
    whole = all(piece.whole for piece in pieces if isinstance(piece, CallEnded))
    try:
        return names == [TRIED_NAME] and whole and not said.strip() and json.loads(arguments) == TRIED
    except ValueError:
        return False


def _answer(content: str = "", **rest: object) -> Message:
    return {"role": "assistant", "content": content, **rest}


def _behind(opening: str, text: str) -> str:
    """What stands behind the beginning of an answer; some templates write white space before a text only."""
    begun = opening.rstrip()
    return text[len(begun) :].lstrip() if text.startswith(begun) else ""


def _thought(opening: str, render: Render) -> tuple[str, str] | None:
    thinking = render([_USER, _answer(content=_SAID, reasoning_content=_THOUGHT)])
    text = _behind(opening, thinking or "")
    if _THOUGHT not in text or _SAID not in text:
        return None
    before, _, rest = text.partition(_THOUGHT)
    marks = before.strip(), rest.partition(_SAID)[0].strip()
    return marks if all(map(is_mark, marks)) else None
