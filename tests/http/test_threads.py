"""Templating and tokenising run in text threads, and the event loop answers meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import Awaitable, Sequence
from pathlib import Path

import httpx
import pytest

from kvarn import wire
from kvarn.client import EngineClient
from kvarn.config import ServeConfig
from kvarn.http.app import create_app
from kvarn.http.keys import Keys
from kvarn.http.service import TEXT_THREADS, ModelNames
from kvarn.text.template import ChatTemplate
from kvarn.text.tokenizer import Message, Tokenizer

ENGINE = (sys.executable, str(Path(__file__).parent.parent / "client" / "scripted_engine.py"))


class WatchedTokenizer(Tokenizer):
    """A real tokenizer that notes its threads and can be held up in the middle of its work."""

    threads: set[str]
    gate: threading.Event

    def encode(self, text: str) -> list[int]:
        self.note()
        return super().encode(text)

    def chat_tokens(
        self, messages: Sequence[Message], generation_prompt: bool = True, continued: bool = False
    ) -> list[int]:
        self.note()
        return super().chat_tokens(messages, generation_prompt, continued)

    def note(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(20)


@pytest.fixture
def tokenizer(byte_tokenizer: Path) -> WatchedTokenizer:
    made = WatchedTokenizer.load(byte_tokenizer)
    assert isinstance(made, WatchedTokenizer)
    made.threads, made.gate = set(), threading.Event()
    return made


def test_the_event_loop_answers_while_a_prompt_is_read(tokenizer: WatchedTokenizer) -> None:
    async def test() -> None:
        client = EngineClient(wire.Start(model_path="plain", max_rows=8, max_itl_ms=400), command=ENGINE)
        await client.start()
        names = ModelNames("test", frozenset())
        app, service = create_app(ServeConfig(), names, lambda: tokenizer, client, Keys((), None), ())
        await asyncio.gather(service.load(), client.settled())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
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
        service.close()
        await client.stop()
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
        client = EngineClient(wire.Start(model_path="plain", max_rows=8, max_itl_ms=400), command=ENGINE)
        await client.start()
        app, service = create_app(ServeConfig(), ModelNames("t", frozenset()), lambda: made, client, Keys((), None), ())
        await asyncio.gather(service.load(), client.settled())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:

            def chat(content: str) -> Awaitable[httpx.Response]:
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
                return http.post("/v1/chat/completions", json=body)

            for answer in await asyncio.gather(*(chat("go") for _ in range(2 * TEXT_THREADS))):
                assert answer.status_code == 400
                assert "without coming to an end" in answer.json()["error"]["message"]
            assert (await chat("hi")).status_code == 200
        service.close()
        await client.stop()

    asyncio.run(asyncio.wait_for(test(), 30))
