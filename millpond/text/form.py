"""What messages must look like for a template to show them, and how that is found out.

Templates differ in what they take: content as a text or as a list of parts, a developer's messages as such or not at
all, one system message or several. ``probe`` tries all of that on a template once, with contents that are told apart
by their marks; ``Form.adapt`` then puts every conversation into the form that was found. What a template takes as it
stands is left as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from millpond.text.marks import Marks

Message = Mapping[str, object]
Render = Callable[[list[dict[str, object]]], str | None]
"""The text of adapted messages; None where the template refuses them."""

BETWEEN = "\n\n"
"""Put between system messages that become one."""
REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""A system message as part of a user's."""
_LEADING = ("system", "developer")
_PRINTED_LIST = re.compile("""['"]type['"]: *['"]text['"]""")
"""A list of parts that the template has not taken apart but printed."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a template takes."""

    parts: frozenset[str] = frozenset()
    """Roles whose content is a list of parts."""
    developer: str = "system"
    """The role that a developer's message gets."""
    merged: frozenset[tuple[str, str]] = frozenset()
    """Roles of messages at the beginning of which the template shows only one, so that two become one."""
    hidden: tuple[str, ...] = ()
    """Roles that it shows in no form, or refuses."""
    alternating: bool = False
    """Two messages of a user's, or of an assistant's, may not follow each other: they become one."""
    late: bool = True
    """A system message may stand behind a user's. Where it may not, it becomes part of one, in its place: moved to the
    beginning it would be another prompt from there on, and nothing of it cached."""

    def adapt(self, messages: Sequence[Message]) -> list[dict[str, object]]:
        """Copies of the messages in this form. Keys without a value are left out."""
        adapted: list[dict[str, object]] = []
        leading, reminder = True, False
        for message in messages:
            made = {name: value for name, value in message.items() if value is not None}
            if made.get("role") == "developer":
                made["role"] = self.developer
            leading = leading and made.get("role") in _LEADING
            late = not leading and not self.late and made.get("role") in _LEADING
            if late:
                made = {"role": "user", "content": REMINDER.format(made.get("content", ""))}
            pair = (adapted[-1].get("role") if adapted else None, made.get("role"))
            alike = pair == ("user", "user") and (late or reminder or self.alternating)
            alike = alike or (self.alternating and pair == ("assistant", "assistant") and not _calls(adapted[-1], made))
            if (leading and pair in self.merged) or alike:
                adapted[-1]["content"] = f"{adapted[-1].get('content', '')}{BETWEEN}{made.get('content', '')}"
            else:
                adapted.append(made)
            reminder = late
        for made in adapted:
            if made.get("role") in self.parts and isinstance(made.get("content"), str):
                made["content"] = [{"type": "text", "text": made["content"]}]
        return adapted


def probe(render: Render, source: str) -> Form:
    """The form that a template takes, whose text is ``source``.

    Roles that it shows in no form are left as they are: what it says when it refuses them is for the client to read.
    """
    form, hidden = Form(developer="developer"), list[str]()
    for role in ("user", "assistant", "system", "developer", "tool"):
        if role == "developer" and "developer" not in source:
            form = replace(form, developer="system")
            continue
        taken = _taken(render, form, role)
        if taken is not None:
            form = taken
        elif role == "developer":
            form = replace(form, developer="system")
        else:
            hidden.append(role)
    kept = ("system", "developer") if form.developer == "developer" else ("system",)
    for first, second in product(kept, kept):
        pair = [_message(first), _message(second), _message("user")]
        merging = replace(form, merged=form.merged | {(first, second)})
        if not _shows(render, form, pair) and _shows(render, merging, pair):
            form = merging
    twice = [_message("user"), _message("user")]
    merging = replace(form, alternating=True)
    form = merging if not _shows(render, form, twice) and _shows(render, merging, twice) else form
    conversation = [_message("user"), _message("assistant"), _message("user"), _message("system"), _message("user")]
    late = "system" in hidden or _shows(render, form, conversation) or not _shows(render, form, [conversation[0]])
    return replace(form, hidden=tuple(hidden), late=late)


def _calls(*messages: Message) -> bool:
    """Whether one of them calls something, or has thoughts: what belongs together then is for its author to know."""
    return any(message.get(name) for message in messages for name in ("tool_calls", "reasoning_content"))


def _taken(render: Render, form: Form, role: str) -> Form | None:
    """``form`` with the content of ``role`` as the template takes it: a text if it can be."""
    for made in (form, replace(form, parts=form.parts | {role})):
        if any(_shows(render, made, messages) for messages in _conversations(role)):
            return made
    return None


def _conversations(role: str) -> list[list[Message]]:
    """Conversations in which a message of that role may stand."""
    user, assistant = _message("user"), _message("assistant")
    if role == "user":
        return [[user]]
    if role == "assistant":
        return [[user, assistant, user]]
    if role == "tool":
        result = {**_message("tool"), "tool_call_id": _CALL["id"], "name": "look_up"}
        return [[user, assistant, result], [user, {**assistant, "tool_calls": [_CALL]}, result]]
    return [[_message(role), user]]


_CALL: dict[str, object] = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": "lynx"}},
}


def _message(role: str) -> dict[str, object]:
    return {"role": role, "content": "Hello."}


def _shows(render: Render, form: Form, messages: Sequence[Message]) -> bool:
    marks = Marks()
    text = render(form.adapt(marks.around(messages)))
    return text is not None and not marks.shown(messages, text).hidden and not _PRINTED_LIST.search(text)
