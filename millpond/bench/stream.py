"""One streamed chat request over raw HTTP, with the arrival time of every piece of text.

Times are seconds of one monotonic clock, taken when the bytes reach this process and before they are parsed. Every way
a server can fail ends in a Reply with ``error`` set: nothing is raised for a server's fault.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from millpond.bench.sse import DONE, EventReader

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """What to send. ``seed`` None sends none."""

    messages: list[Message]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    role: str = ""
    """What part it plays in its workload; only for the report."""

    def body(self, model: str) -> dict[str, Json]:
        """The JSON body; ``ignore_eos`` asks servers that know it for exactly ``max_tokens`` tokens."""
        messages: list[Json] = [dict(message) for message in self.messages]
        body: dict[str, Json] = {
            "model": model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.seed is not None:
            body["seed"] = self.seed
        return body


@dataclass
class Reply:
    """What came back. All times are readings of the same monotonic clock, in seconds."""

    role: str = ""
    sent: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each event with text arrived."""
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server states them; None when it does not."""
    cached_tokens: int | None = None
    status: int | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def counted_by(self) -> str:
        """``usage`` when the server stated the number of tokens, else ``chunks``."""
        return "chunks" if self.completion_tokens is None else "usage"

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.arrivals) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one arrival of text and the next."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first; None for answers of one token."""
        if len(self.arrivals) < 2 or self.tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)


class Endpoint:
    """A server under test: where it is, which model to name, how long one request may take."""

    def __init__(self, client: httpx.AsyncClient, model: str, timeout: float) -> None:
        self._client = client
        self._model = model
        self._timeout = timeout

    async def ask(self, ask: Ask, on_text: Callable[[Reply], None] | None = None) -> Reply:
        """Send one request and read its whole stream. ``on_text`` is called after every arrival of text."""
        reply = Reply(role=ask.role, sent=time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                await self._read(ask, reply, on_text)
        except TimeoutError:
            reply.error = f"no end within {self._timeout:g} s"
        except httpx.HTTPError as error:
            reply.error = f"{type(error).__name__}: {error}".rstrip(": ")
        reply.ended = time.perf_counter()
        if reply.ok:
            reply.error = _what_is_wrong(reply)
        return reply

    async def _read(self, ask: Ask, reply: Reply, on_text: Callable[[Reply], None] | None) -> None:
        headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
        request = self._client.stream("POST", "/v1/chat/completions", json=ask.body(self._model), headers=headers)
        async with request as response:
            reply.status = response.status_code
            if response.status_code != 200:
                body = await response.aread()
                reply.error = f"HTTP {response.status_code}: {body[:300].decode('utf-8', errors='replace')}"
                return
            reader = EventReader()
            async for chunk in response.aiter_raw():
                now = time.perf_counter()
                for data in reader.feed(chunk):
                    if data == DONE:
                        reply.finish_reason = reply.finish_reason or "done"
                    elif _take(reply, data, now) and on_text is not None:
                        on_text(reply)


def _what_is_wrong(reply: Reply) -> str | None:
    if reply.finish_reason is None:
        return f"the stream ended without a finish reason after {len(reply.arrivals)} pieces of text"
    if not reply.arrivals:
        return "the answer has no text"
    return None


def _take(reply: Reply, data: str, now: float) -> bool:
    """Put one event into the reply. True when it carried text."""
    try:
        event: Json = json.loads(data)
    except ValueError:
        reply.error = f"undecodable event: {data[:200]}"
        return False
    if not isinstance(event, dict):
        return False
    if event.get("error") is not None:
        reply.error = f"error event: {json.dumps(event['error'])[:300]}"
        return False
    _take_usage(reply, event.get("usage"))
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return False
    if isinstance(choice.get("finish_reason"), str):
        reply.finish_reason = str(choice["finish_reason"])
    text = _text_of(choice.get("delta"))
    if text:
        reply.text += text
        reply.arrivals.append(now)
    return bool(text)


def _text_of(delta: Json) -> str:
    if not isinstance(delta, dict):
        return ""
    parts = (delta.get(key) for key in ("reasoning_content", "reasoning", "content"))
    return "".join(part for part in parts if isinstance(part, str))


def _take_usage(reply: Reply, usage: Json) -> None:
    if not isinstance(usage, dict):
        return
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int):
        reply.prompt_tokens = prompt
    if isinstance(completion, int):
        reply.completion_tokens = completion
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        reply.cached_tokens = int(str(details["cached_tokens"]))
