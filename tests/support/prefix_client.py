"""What the tests of the prefix cache ask a running server, and what they read from its answers."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import httpx
import openai
from waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from conftest import Server

MODEL = "demo"
Health = dict[str, dict[str, int]]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """One answer with everything that is told about its prompt."""

    id: str
    text: str
    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cached: int
    memory: int
    disk: int
    known: int
    end: str
    at: str


def client_of(server: Server) -> openai.OpenAI:
    """The official client, unmodified but for its patience; one per server, as making one costs 50 ms."""
    return _client_at(server.url)


@cache
def _client_at(url: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False, timeout=PATIENCE)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, http_client=http)


_http = httpx.Client(timeout=PATIENCE, verify=False)


def wait_until(server: Server, condition: Callable[[Health], bool]) -> Health:
    """Ask /health until it says so."""
    return until(lambda: _http.get(f"{server.url}/health").json(), condition)


def complete(
    server: Server, prompt: str | Sequence[int], salt: str = "", *, ignore_eos: bool = False, **more: object
) -> Answer:
    """POST /v1/completions, greedy and short unless told otherwise."""
    options = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}
    extra = _extra(salt) | ({"ignore_eos": True} if ignore_eos else {})
    client = client_of(server)
    raw = client.completions.with_raw_response.create(**options, extra_body=extra)  # type: ignore[arg-type]
    body = raw.parse()
    texts = tuple(choice.text for choice in body.choices)
    return _answer(body.id, texts, body.usage, raw.headers)


def chat(server: Server, messages: Messages, salt: str = "", **more: object) -> Answer:
    """POST /v1/chat/completions, greedy and short unless told otherwise."""
    options = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **more}
    client = client_of(server)
    raw = client.chat.completions.with_raw_response.create(**options, extra_body=_extra(salt))  # type: ignore[arg-type]
    body = raw.parse()
    texts = tuple(choice.message.content or "" for choice in body.choices)
    return _answer(body.id, texts, body.usage, raw.headers)


def streamed(server: Server, prompt: str, salt: str = "", **more: object) -> Answer:
    """POST /v1/completions as a stream with its usage."""
    options = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    client = client_of(server)
    raw = client.completions.with_raw_response.create(**options, extra_body=_extra(salt))  # type: ignore[arg-type]
    chunks = list(raw.parse())
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    return _answer(chunks[-1].id, (text,), chunks[-1].usage, raw.headers)


def _extra(salt: str) -> dict[str, object]:
    return {"cache_salt": salt} if salt else {}


def _answer(name: str, texts: tuple[str, ...], usage: openai.types.CompletionUsage, headers: httpx.Headers) -> Answer:
    field = headers["x-millpond-prefix-cache"]
    match = re.fullmatch(r'memory=(\d+), disk=(\d+), known=(\d+), end=(\w+)(?:, at="(.+)")?', field)
    assert match is not None, field
    memory, disk, known = (int(number) for number in match.groups()[:3])
    details = usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == memory + disk
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return Answer(
        id=name.split("-", 1)[1],
        text=texts[0],
        texts=texts,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached=memory + disk,
        memory=memory,
        disk=disk,
        known=known,
        end=match[4],
        at=match[5] or "",
    )


def logged(server: Server, answer: Answer) -> dict[str, str]:
    """The fields of the request's log line."""
    line = server.wait_for_line(f"completion={answer.id}")
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def explain(server: Server, **body: object) -> list[dict[str, object]]:
    """POST /v1/cache/explain: one entry per prompt."""
    response = httpx.post(
        f"{server.url}/v1/cache/explain", json={"model": MODEL, **body}, timeout=PATIENCE, verify=False
    )
    assert response.status_code == 200, response.text
    listed = response.json()
    assert listed["object"] == "list"
    entries: list[dict[str, object]] = listed["data"]
    return entries


def settled(server: Server) -> Health:
    """/health once nothing runs and the engine has reported since this was called."""
    began = time.monotonic()

    def fresh(health: Health) -> bool:
        engine = health["engine"]
        age = engine["beat_age_seconds"]
        idle = engine["running"] == 0 and engine["waiting"] == 0 and health["requests"]["held"] == 0
        return idle and age is not None and age < time.monotonic() - began

    return wait_until(server, fresh)


def figures(server: Server) -> Mapping[str, int]:
    """The counters of the prefix cache once nothing runs."""
    load = settled(server)["prefix_cache"]
    return {**load, **load["counters"]}


def ssd(server: Server) -> dict[str, int]:
    """The counters of the SSD tier once nothing runs."""
    return _ssd(settled(server))


def until_ssd(server: Server, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """The counters of the SSD tier once they say so."""
    return _ssd(wait_until(server, lambda health: bool(_ssd(health)) and condition(_ssd(health))))


def _ssd(health: Health) -> dict[str, int]:
    found: dict[str, int] = (health["prefix_cache"] or {}).get("ssd", {})  # type: ignore[assignment]
    return found


def records(folder: Path) -> set[Path]:
    """The files of all records in a cache folder; those set aside do not count."""
    return {path for path in folder.rglob("*.kv") if path.parent.name != "quarantine"}


def blocks_of(answer: Answer) -> int:
    """How many records policy ``all`` writes of a prompt and its answer; the last token drawn was never read."""
    return -(-(answer.prompt_tokens + answer.completion_tokens - 1) // 64)


def story(topic: str, sentences: int) -> str:
    """A text of about 12 tokens per sentence that differs from every other topic's from its first word on."""
    return " ".join(f"{topic} number {i} went to the harbour {i * 7 % 13} times." for i in range(sentences))
