"""Stands between an agent and a server, and has the model do what the test wants: the first request of a conversation
must call one tool, with one command. Everything else passes as it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

MOST_TOKENS = 80
HEARD = ("tool_result", "function_call_output", '"role": "tool"')
"""What a conversation has once a tool has been heard."""


def told(body: dict[str, object], tool: str, argument: str, command: str) -> dict[str, object]:
    """The request with the tool's argument fixed, the tool required where none has been heard yet, and an answer that
    is short: a small model that may say anything does not end."""
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    body = {**body, limit: MOST_TOKENS}
    chosen = False
    for entry in body.get("tools") or ():  # type: ignore[attr-defined]
        inner = entry.get("function", entry)
        if inner.get("name") != tool:
            continue
        chosen = True
        schema = inner.get("input_schema") or inner.get("parameters")
        schema["properties"] = {argument: {"type": "string", "enum": [command]}}
        schema["required"] = [argument]
    if not chosen or any(mark in json.dumps(body) for mark in HEARD):
        return body
    if "input" in body:
        return {**body, "tool_choice": {"type": "function", "name": tool}}
    if body.get("tools", [{}])[0].get("function"):  # type: ignore[index]
        return {**body, "tool_choice": {"type": "function", "function": {"name": tool}}}
    return {**body, "tool_choice": {"type": "tool", "name": tool}}


@dataclass
class Middleman:
    """``url`` is where the agent is to ask; ``bodies`` is what was passed on."""

    url: str
    bodies: list[dict[str, object]] = field(default_factory=list)


@contextmanager
def between(server: str, tool: str, argument: str, command: str) -> Iterator[Middleman]:
    """One that passes on to ``server``."""
    passed: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            names = ("authorization", "x-api-key", "content-type", "anthropic-version")
            headers = {name: self.headers[name] for name in names if self.headers[name]}
            passed.append(told(body, tool, argument, command))
            sent = json.dumps(passed[-1]).encode()
            with httpx.stream("POST", server + self.path, content=sent, headers=headers, timeout=300) as answer:
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.end_headers()
                for part in answer.iter_raw():
                    self.wfile.write(part)
                    self.wfile.flush()

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield Middleman(f"http://127.0.0.1:{listening.server_port}", passed)
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
