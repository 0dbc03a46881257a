"""(M8) A model's tokens, as harnesses ask for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from in_process import scripted, served, serving
from tool_tokenizer import write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

HELLO = {"messages": [{"role": "user", "content": "Hello, Größe."}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tool_tokenizer(tmp_path / "model")


@pytest.fixture
async def http(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(served("m", scripted("context=60"), lambda: Tokenizer.load(folder))) as (client, _):
        yield client


@pytest.mark.anyio
async def test_texts_to_tokens_and_back(http: httpx.AsyncClient, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "Größe 🙂 <|im_end|> of a text" * 20
    for name in ("prompt", "content"):
        answer = (await http.post("/tokenize", json={name: text, "return_token_strs": True})).json()
        assert answer["tokens"] == tokenizer.encode(text)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 60)
        assert answer["token_strs"] == [tokenizer.token_text(token) for token in answer["tokens"]]
    back = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": text, "content": text}
    special = (await http.post("/tokenize", json={"prompt": "<|im_end|>", "parse_special": True})).json()
    assert special["count"] == 1
    assert special["token_strs"] is None


@pytest.mark.anyio
async def test_a_chats_prompt(http: httpx.AsyncClient, folder: Path) -> None:
    """The one that an answer would have, whatever its length."""
    tokenizer = Tokenizer.load(folder)
    tool = {"type": "function", "function": {"name": "f"}}
    answer = (await http.post("/tokenize", json={**HELLO, "tools": [tool]})).json()
    shown = [{"type": "function", "function": {"name": "f", "description": "", "parameters": answer and EMPTY}}]
    assert answer["tokens"] == tokenizer.chat_prompt(HELLO["messages"], tools=shown).tokens
    long = {"messages": [{"role": "user", "content": "a b " * 100}]}
    assert (await http.post("/tokenize", json=long)).json()["count"] > 60


EMPTY = {"type": "object", "properties": {}}


@pytest.mark.anyio
async def test_what_the_folder_says(http: httpx.AsyncClient) -> None:
    told = (await http.get("/tokenizer_info")).json()
    assert told["eos_token"] == "<|im_end|>"
    assert "add_generation_prompt" in told["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "prompt: must be given, or content, or messages: exactly one of them, got []"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt: must be given"),
        ("/tokenize", {"prompt": 5}, "prompt: must be a string, got 5"),
        ("/tokenize", {"messages": []}, "messages: must be a non-empty list"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 'model: "other" does not exist'),
        ("/tokenize", {"content": "a" * 1_100_000}, "content: must be at most 1048576 characters long"),
        ("/detokenize", {"tokens": [100_000]}, "tokens: must be token ids from 0 to 999, got 100000"),
        ("/detokenize", {"tokens": "a"}, "tokens: must be a list of token ids"),
        ("/detokenize", {}, "tokens: is required and must be a list of token ids"),
    ],
)
@pytest.mark.anyio
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, path: str, body: dict[str, object], message: str
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]
