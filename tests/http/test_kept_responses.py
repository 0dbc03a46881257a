"""(M6) Responses that are kept: going on from them, asking for them again, for their owner only, over restarts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from in_process import writing
from tool_tokenizer import write_tool_tokenizer

from millpond.http.errors import ApiError
from millpond.http.keys import Keys
from millpond.http.response_store import ResponseStore
from millpond.http.responses.history import History
from millpond.http.responses.routes import read

if TYPE_CHECKING:
    import httpx
    from openai.types.responses import Response

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"type": "function", "name": "read_file", "parameters": SCHEMA, "strict": False}
CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a"}}\n</tool_call>'
THOUGHT = "<think>\nI read it.\n</think>\n\n"
ASKED = "What is in a?"
NEXT = "Are you sure?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tool_tokenizer(tmp_path / "model")


@contextlib.asynccontextmanager
async def answering(
    folder: Path, answers: Sequence[str], keys: Keys | None = None, **settings: str
) -> AsyncIterator[tuple[openai.AsyncOpenAI, httpx.AsyncClient]]:
    async with writing(folder, answers, "context=4000,step=3", keys, **settings) as (http, _):
        yield (
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="the-key-of-ann", http_client=http, max_retries=0),
            http,
        )


async def ask(client: openai.AsyncOpenAI, *, stream: bool = False, **more: object) -> Response:
    """One turn; streamed, the next may begin as soon as this one has ended."""
    more = {"model": "m", "input": ASKED, **more}
    if not stream:
        return await client.responses.create(**more)  # type: ignore[call-overload,no-any-return]
    async with client.responses.stream(**more) as streamed:  # type: ignore[arg-type]
        return await streamed.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.anyio
async def test_going_on_from_a_response(folder: Path, stream: bool) -> None:
    """The prompt is the same as when all items are sent again; instructions are not carried on."""
    async with answering(folder, [f"{THOUGHT}I look.\n{CALL}", "It is b.", "Yes."] * 2) as (client, _):
        first = await ask(client, stream=stream, instructions="Be brief.", tools=[TOOL])
        assert first.store is True  # type: ignore[attr-defined]
        call = first.output[-1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "b"}  # type: ignore[union-attr]
        second = await ask(client, stream=stream, input=[result], tools=[TOOL], previous_response_id=first.id)
        third = await ask(client, stream=stream, input=NEXT, tools=[TOOL], previous_response_id=second.id)
        assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
        assert third.output_text == "Yes."

        items = [{"role": "user", "content": ASKED}, *(item.to_dict() for item in first.output), result]
        whole = await ask(client, stream=stream, input=items, tools=[TOOL], store=False)
        assert whole.store is False  # type: ignore[attr-defined]
        assert second.usage is not None
        assert whole.usage is not None
        assert second.usage.input_tokens == whole.usage.input_tokens
        counted = await client.responses.input_tokens.count(
            model="m",
            input=NEXT,
            tools=[TOOL],  # type: ignore[list-item]
            previous_response_id=second.id,
        )
        assert third.usage is not None
        assert counted.input_tokens == third.usage.input_tokens
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, previous_response_id=whole.id)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_the_same_conversation_however_it_is_told() -> None:
    """By its ids, by references to its items, or in full."""
    store = ResponseStore(None, 1 << 20, 0)
    history = History(store, "ann")
    said = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}
    history.keeper(ASKED, None)({"id": "resp_1", "output": [said]})
    question = history.before("resp_1")[0]
    answer = {"role": "user", "content": NEXT}

    def prompt(**fields: object) -> object:
        return read(history, fields).asked.prompt

    whole = prompt(input=[{"role": "user", "content": ASKED}, said, answer])
    assert prompt(input=NEXT, previous_response_id="resp_1") == whole
    reference = {"type": "item_reference", "id": "msg_1"}
    asked = {"type": "item_reference", "id": question["id"]}
    assert prompt(input=[asked, reference, answer]) == whole
    assert prompt(input=[reference, answer], previous_response_id="resp_1") == whole, "what is there comes once"
    for bad, message in ({"id": "msg_2"}, "msg_2 is not kept"), ({"id": 3}, "must be the id of an item"), ({}, "must"):
        with pytest.raises(ApiError, match=rf"input\[0\].id: .*{message}"):
            prompt(input=[{**bad, "type": "item_reference"}])
    with pytest.raises(ApiError, match="msg_1 is not kept here"):
        read(History(store, "bob"), {"input": [reference]})
    with pytest.raises(ApiError, match="resp_1 is not kept here"):
        read(History(store, ""), {"input": NEXT, "previous_response_id": "resp_1"})
    store.close()


@pytest.mark.anyio
async def test_asking_for_it_again(folder: Path) -> None:
    async with answering(folder, ["One.", "Two."]) as (client, http):
        first = await ask(client)
        second = await ask(
            client, stream=True, input=[{"role": "user", "content": NEXT}], previous_response_id=first.id
        )
        again = await client.responses.retrieve(second.id)
        assert again.output_text == second.output_text == "Two."
        assert (again.id, again.usage, again.created_at) == (second.id, second.usage, second.created_at)
        items = await client.responses.input_items.list(second.id)
        assert [item.content[0].text for item in items.data] == [NEXT, "One.", ASKED]  # type: ignore[union-attr]
        assert len({item.id for item in items.data}) == 3
        page = await client.responses.input_items.list(second.id, limit=2, order="asc")
        assert [item.id for item in page.data] == [item.id for item in items.data][:0:-1]
        assert page.has_more
        rest = [item.id async for item in await client.responses.input_items.list(second.id, limit=1)]
        assert rest == [item.id for item in items.data]
        for wrong in ("limit=0", "limit=x", "limit=101", "order=up", "after=nothing"):
            answer = await http.get(f"/v1/responses/{second.id}/input_items?{wrong}")
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == wrong.split("=")[0]
        assert (await http.get(f"/v1/responses/{second.id}?stream=true")).json()["error"]["param"] == "stream"

        with pytest.raises(openai.BadRequestError, match="only responses in the background"):
            await client.responses.cancel(second.id)
        await client.responses.delete(first.id)
        for gone in (
            client.responses.retrieve(first.id),
            client.responses.delete(first.id),
            client.responses.cancel(first.id),
            client.responses.input_items.list(first.id),
        ):
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                await gone
        assert (await client.responses.retrieve(second.id)).output_text == "Two."
        with pytest.raises(openai.BadRequestError, match="is not kept here"):
            await ask(client, previous_response_id=second.id)
        assert (await http.post("/v1/responses/compact", json={})).status_code == 404


@pytest.mark.anyio
async def test_another_key_finds_none_of_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann the-key-of-ann\nbob the-key-of-bob\n")
    async with answering(folder, ["One.", "Two."], Keys((), tmp_path / "keys")) as (ann, _):
        first = await ask(ann)
        bob = ann.with_options(api_key="the-key-of-bob")
        with pytest.raises(openai.BadRequestError, match="is not kept here"):
            await ask(bob, previous_response_id=first.id)
        for hidden in (bob.responses.retrieve(first.id), bob.responses.delete(first.id)):
            with pytest.raises(openai.NotFoundError):
                await hidden
        with pytest.raises(openai.AuthenticationError):
            await ann.with_options(api_key="no-key-at-all").responses.retrieve(first.id)
        assert (await ask(ann, previous_response_id=first.id)).output_text == "Two."


@pytest.mark.anyio
async def test_kept_over_a_restart(folder: Path, tmp_path: Path) -> None:
    place = {"cache_dir": str(tmp_path / "cache"), "cache_ssd": "1GB"}
    async with answering(folder, ["One."], **place) as (client, _):
        first = await ask(client)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["responses-1.sqlite"]
    async with answering(folder, ["Two."], **place) as (client, _):
        assert (await ask(client, previous_response_id=first.id)).output_text == "Two."
    async with answering(folder, ["Two."], responses_ttl="1", **place) as (client, _):
        await asyncio.sleep(1.1)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)


@pytest.mark.anyio
async def test_where_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    place = {"cache_dir": str(tmp_path / "cache"), "cache_ssd": "1GB"}
    async with answering(folder, ["One."], responses_size="0", **place) as (client, _):
        first = await ask(client)
        assert first.store is False  # type: ignore[attr-defined]
        with pytest.raises(openai.BadRequestError, match="no responses are kept here"):
            await ask(client, previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="is not kept here"):
            await ask(client, input=[{"type": "item_reference", "id": "x"}])
    assert not (tmp_path / "cache").exists()
