"""What a request may refer to: responses and items of its owner that are kept.

Text threads only: it waits for the database.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

import msgspec

from millpond.http.errors import ApiError, bad_value, unsupported
from millpond.http.response_store import ResponseStore
from millpond.http.response_table import Kept, LineTooLong

Item = Mapping[str, object]
Json = dict[str, object]
REFERENCE = "item_reference"
_ITEMS = msgspec.json.Decoder(list[Json])
_RESPONSE = msgspec.json.Decoder(Json)
SECONDS = 30.0
"""How long the database may take; a second's wait for another process is the longest that it knows of."""
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


class History:
    """Of one owner."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store = store
        self._owner = owner

    @property
    def keeps(self) -> bool:
        return self._store.most_bytes > 0

    def before(self, previous: str | None) -> list[Item]:
        """All items of the conversation that a response ends, in their order. Raises ApiError 400."""
        if not previous:
            return []
        if not self.keeps:
            allowed = "absent: no responses are kept here (--responses-size is 0); send the items again"
            raise unsupported("previous_response_id", previous, allowed)
        try:
            line = self._store.line(self._owner, previous).result(SECONDS)
        except LineTooLong:
            message = "previous_response_id: this conversation has become longer than any context"
            raise ApiError(400, message, param="previous_response_id", code="context_length_exceeded") from None
        if not line:
            raise not_found("previous_response_id", previous, "previous_response_not_found")
        return [item for kept in line for item in (*asked(kept), *answered(kept))]

    def resolved(self, value: object, before: Sequence[Item]) -> object:
        """An ``input`` value with the items that it refers to; those that came before already are left out. Raises
        ApiError 400."""
        if not isinstance(value, list) or not any(_is_reference(item) for item in value):
            return value
        known = {item.get("id") for item in before}
        found: list[object] = []
        for index, item in enumerate(value):
            if not _is_reference(item):
                found.append(item)
                continue
            own = item.get("id")
            if not isinstance(own, str):
                raise bad_value(f"input[{index}].id", own, "the id of an item")
            if own not in known:
                found.append(self._item(own, f"input[{index}].id"))
        return found

    def _item(self, id_: str, where: str) -> Item:
        kept = self._store.with_item(self._owner, id_).result(SECONDS) if self.keeps else None
        for item in (*asked(kept), *answered(kept)) if kept is not None else ():
            if item.get("id") == id_:
                return item
        raise not_found(where, id_, "item_not_found")

    def keeper(self, items: object, previous: str | None) -> Callable[[Json], None]:
        """What keeps an answer to these items, once it is whole; event loop."""
        # One by one: a single call that wrote them all would hold the interpreter meanwhile.
        kept_items = b"[%b]" % b",".join([msgspec.json.encode(item) for item in named(items)])

        def keep(response: Json) -> None:
            kept = Kept(self._owner, str(response["id"]), previous or "", kept_items, msgspec.json.encode(response))
            self._store.keep(kept)

        return keep


def asked(kept: Kept) -> list[Item]:
    """The items that a response answered."""
    return [*_ITEMS.decode(kept.items)]


def answered(kept: Kept) -> list[Item]:
    """The items of its answer."""
    output = _RESPONSE.decode(kept.response).get("output")
    return [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []


def not_found(param: str, id_: str, code: str) -> ApiError:
    """400 for what is not, or no longer, kept."""
    message = f"{param}: {id_[:80]} is not kept here: it may have been deleted, be too old, or be of another key"
    return ApiError(400, message, param=param, code=code)


def named(items: object) -> list[Json]:
    """An ``input`` value as a list of items with ids, as the API shows it to those who ask."""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    return [_named(item) for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _named(item: Json) -> Json:
    kind = str(item.get("type") or "message")
    own = item.get("id")
    shown = {**item, "id": own if isinstance(own, str) else f"{_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}"}
    shown["type"] = kind
    if kind == "message":
        text = "output_text" if item.get("role") == "assistant" else "input_text"
        if isinstance(item.get("content"), str):
            shown["content"] = [{"type": text, "text": item["content"]}]
        shown.setdefault("status", "completed")
    return shown


def _is_reference(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == REFERENCE
