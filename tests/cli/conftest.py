"""A small OpenAI-like server on a real socket, whose behaviour is named by the model asked for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class ScriptedServer:
    """Where it listens, the bodies it got, and how many streams their clients cut off.

    Models: ``good``; ``no-usage``; ``fails`` (HTTP 500); ``hangs`` (a first piece, then nothing); ``error-event``
    (one piece, then an error); ``cut`` (one piece, then the end); ``garbage`` (not JSON); ``silent`` (no text);
    ``slow`` (one piece, the rest only after another request has come).
    """

    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    cut_off: int = 0


def _event(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _piece(text: str, finish: str | None = None) -> bytes:
    return _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


async def _stream(server: ScriptedServer, model: str, body: dict[str, object]) -> AsyncIterator[bytes]:
    tokens = int(str(body.get("max_tokens", 3)))
    number = len(server.bodies)
    yield b": a comment\n\n"
    yield _event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
    if model == "garbage":
        yield b"data: {not json\n\n"
    if model != "silent":
        yield _piece(f"w{number} ")
    if model == "cut":
        return
    if model == "error-event":
        yield _event({"error": {"message": "the engine died", "type": "engine_died"}})
        return
    if model == "hangs" or (model == "slow" and number == 1):
        try:
            await asyncio.Event().wait()
        finally:
            server.cut_off += 1
    for _ in range(tokens - 1 if model != "silent" else 0):
        await asyncio.sleep(0)
        yield _piece("é ")
    yield _piece("", "length")
    if model != "no-usage":
        usage = {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
        yield _event({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _app(server: ScriptedServer) -> Starlette:
    async def chat(request: Request) -> Response:
        body = await request.json()
        server.bodies.append(body)
        if body["model"] == "fails":
            return JSONResponse({"error": {"message": "out of memory", "type": "engine_error"}}, status_code=500)
        return StreamingResponse(_stream(server, body["model"], body), media_type="text/event-stream")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "good", "object": "model"}]})

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)])


class _Uvicorn(uvicorn.Server):
    """Tells when it listens, without polling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@pytest.fixture
def scripted_server() -> Iterator[ScriptedServer]:
    """A running ScriptedServer."""
    server = ScriptedServer()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(_app(server), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn_server = _Uvicorn(config)
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert uvicorn_server.listening.wait(20)
    yield server
    uvicorn_server.should_exit = True
    thread.join()
    listener.close()
