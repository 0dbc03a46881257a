"""A front end within this process: its engine is another, scripted unless a test brings its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import httpx
from tool_tokenizer import write_answers

from millpond import wire
from millpond.client import EngineClient
from millpond.config import read_config
from millpond.http.app import create_app
from millpond.http.front_end import FrontEnd
from millpond.http.generation_request import NO_DEFAULTS
from millpond.http.keys import Keys
from millpond.http.names import ModelNames
from millpond.http.served_model import ServedModel
from millpond.text.tokenizer import Tokenizer
from millpond.types import Speculation

ENGINE = (sys.executable, str(Path(__file__).parent.parent / "client" / "scripted_engine.py"))


def scripted(script: str, environment: Mapping[str, str] | None = None) -> EngineClient:
    start = wire.Start(model_path=script, max_batch=8, max_itl_ms=400)
    return EngineClient(start, command=ENGINE, environment=environment, max_restarts=0)


def served(name: str, client: EngineClient, read_tokenizer: Callable[[], Tokenizer]) -> ServedModel:
    return ServedModel(ModelNames(name, frozenset()), read_tokenizer, client, NO_DEFAULTS, Speculation())


@contextlib.asynccontextmanager
async def writing(
    folder: Path, answers: Sequence[str], script: str = "context=4000", keys: Keys | None = None, **settings: str
) -> AsyncIterator[tuple[httpx.AsyncClient, FrontEnd]]:
    """A server of the model ``m``, which writes these answers, in turn."""
    client = scripted(f"written,{script}", {"SCRIPTED_ANSWERS": write_answers(folder, answers)})
    async with serving(served("m", client, lambda: Tokenizer.load(folder)), keys, **settings) as both:
        yield both


@contextlib.asynccontextmanager
async def serving(
    model: ServedModel, keys: Keys | None = None, **settings: str
) -> AsyncIterator[tuple[httpx.AsyncClient, FrontEnd]]:
    """Wait until it can answer; stop it in the end. Unless ``settings`` say otherwise, nothing is kept on a disk."""
    front = FrontEnd(read_config({"cache_ssd": "0", **settings}, {}), keys or Keys((), None), model)
    await model.client.start()
    del model
    try:
        await front.load()
        transport = httpx.ASGITransport(create_app(front, ()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
            yield http, front
    finally:
        await front.stop()
        front.close()
