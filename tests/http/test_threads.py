"""Templating, tokenising and the reading of large bodies run in text threads, and the event loop answers meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import statistics
import threading
import time
import weakref
from collections.abc import Awaitable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process import scripted, served, serving
from tiny_tokenizers import CHATML, byte_level_backend, write_folder

from millpond.http.front_end import TEXT_THREADS, FrontEnd
from millpond.http.json_body import JsonBodies
from millpond.http.threads import Threads
from millpond.text.template import ChatTemplate
from millpond.text.tokenizer import ChatPrompt, Message, Tokenizer


class WatchedTokenizer(Tokenizer):
    """A real tokenizer that notes its threads and can be held up in the middle of its work."""

    threads: set[str]
    gate: threading.Event

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        self.note()
        return super().encode(text, parse_special=parse_special)

    def chat_prompt(self, messages: Sequence[Message], *how: Any) -> ChatPrompt:  # noqa: ANN401 - handed on
        self.note()
        return super().chat_prompt(messages, *how)

    def note(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(20)


@pytest.fixture
def tokenizer(byte_tokenizer: Path) -> WatchedTokenizer:
    made = WatchedTokenizer.load(byte_tokenizer)
    assert isinstance(made, WatchedTokenizer)
    made.threads, made.gate = set(), threading.Event()
    return made


def front(
    tokenizer: Tokenizer, script: str
) -> contextlib.AbstractAsyncContextManager[tuple[httpx.AsyncClient, FrontEnd]]:
    return serving(served("test", scripted(script), lambda: tokenizer))


def test_the_event_loop_runs_while_a_long_text_becomes_tokens(tmp_path: Path) -> None:
    """(B13, B14) By a real tokenizer, which is no Python: were it asked by a call that keeps the interpreter, nothing
    else would run for as long as that takes."""
    text = "The quick brown fox jumps over the lazy dog, Größe und façade. 12345\n" * 8000
    write_folder(tmp_path, byte_level_backend(), {"eos_token": "<|im_end|>", "chat_template": CHATML}, {})
    tokenizer = Tokenizer.load(tmp_path)
    begin = time.monotonic()
    tokenizer.encode(text)
    alone = time.monotonic() - begin
    bodies = {
        "/v1/completions": {"prompt": text, "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 2},
        "/v1/cache/explain": {"prompt": text, "echo": True},
    }

    async def longest_pause(during: asyncio.Task[httpx.Response]) -> float:
        longest, last = 0.0, time.monotonic()
        while not during.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return longest

    async def test() -> None:
        async with front(tokenizer, "context=1000000") as (http, _):
            for path, body in bodies.items():
                pauses = []
                for _ in range(3):
                    asked = asyncio.create_task(http.post(path, json=body))
                    await asyncio.sleep(0)  # the client makes its JSON
                    pauses.append(await longest_pause(asked))
                    assert asked.result().status_code == 200
                assert statistics.median(pauses) < alone / 3, (path, pauses, alone)

    asyncio.run(asyncio.wait_for(test(), 120))


class Holder:
    """Something that can be seen to be gone."""


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_worked_on_is_let_go(fails: bool) -> None:
    """(B14) Without a garbage collection: an error holds the frames that it went through."""
    threads = Threads(1, "test")
    held = Holder()
    gone = weakref.ref(held)

    async def ask(held: Holder) -> str:
        def work() -> str:
            if fails:
                raise ValueError(str(held))
            return str(held)

        return await asyncio.wrap_future(threads.submit(work))

    async def test(held: Holder) -> None:
        with pytest.raises(ValueError, match="Holder") if fails else contextlib.nullcontext():
            await ask(held)

    gc.disable()
    try:
        asyncio.run(test(held))
        del held
        threads.submit(int).result()  # the thread is done with the other
        assert gone() is None
    finally:
        gc.enable()
        threads.close()


def test_the_urgent_goes_first() -> None:
    """Prompts that have been read before bodies that have not: what is read is large."""
    threads = Threads(1, "test")
    begun, go, done = threading.Event(), threading.Event(), []
    first = threads.submit(lambda: (begun.set(), go.wait(20)))
    begun.wait(20)
    others = [threads.submit(partial(done.append, name), urgent=name.isupper()) for name in "aAbB"]
    go.set()
    for future in (first, *others):
        future.result(20)
    assert done == ["A", "B", "a", "b"]
    threads.close()


def test_a_large_body_is_read_in_a_text_thread(byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B14)"""
    names: list[str] = []

    read = JsonBodies.read

    def noted(bodies: JsonBodies, body: bytearray) -> dict[str, object]:
        names.append(threading.current_thread().name)
        return read(bodies, body)

    monkeypatch.setattr(JsonBodies, "read", noted)

    async def test() -> None:
        async with front(Tokenizer.load(byte_tokenizer), "plain") as (http, _):
            for junk in ("", "x" * 100_000):
                body = {"prompt": "hi", "max_tokens": 2, "junk": junk}
                assert (await http.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(asyncio.wait_for(test(), 30))
    assert [name.startswith("text") for name in names] == [False, True]


def test_the_event_loop_answers_while_a_prompt_is_read(tokenizer: WatchedTokenizer) -> None:
    async def test() -> None:
        async with front(tokenizer, "plain") as (http, _):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            chat = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            plain = asyncio.create_task(http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3}))
            while len(tokenizer.threads) < 2:
                assert (await http.get("/livez")).status_code == 200
                await asyncio.sleep(0.01)  # a request within the process may never give way by itself
            assert not chat.done()
            assert not plain.done()
            tokenizer.gate.set()
            assert [response.status_code for response in await asyncio.gather(chat, plain)] == [200, 200]
        assert all(name.startswith("text") for name in tokenizer.threads)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_template_without_an_end_costs_a_400_and_no_thread(
    byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More such requests than there are threads."""
    shutil.copytree(byte_tokenizer, tmp_path, dirs_exist_ok=True)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages[-1].content == 'go' %}}{endless}{{% endif %}}{{{{ messages[-1].content }}}}"
    (tmp_path / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(ChatTemplate.__init__, "__defaults__", (0.02,))
    made = Tokenizer.load(tmp_path)

    async def test() -> None:
        async with front(made, "plain") as (http, _):

            def chat(content: str) -> Awaitable[httpx.Response]:
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
                return http.post("/v1/chat/completions", json=body)

            for answer in await asyncio.gather(*(chat("go") for _ in range(2 * TEXT_THREADS))):
                assert answer.status_code == 400
                assert "without coming to an end" in answer.json()["error"]["message"]
            assert (await chat("hi")).status_code == 200

    asyncio.run(asyncio.wait_for(test(), 30))
