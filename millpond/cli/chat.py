"""``millpond chat``: talk to a model in the terminal, against a running server or one that it starts itself.

One thread. Ctrl-C during an answer closes that answer's connection, which makes the server stop working on it; the
conversation goes on with what had been said so far.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import httpx
from rich.console import Console

from millpond.bench.connection import Unusable, connection, key_from
from millpond.bench.sse import DONE, EventReader
from millpond.child import python, search_path
from millpond.cli.address import DEFAULT_URL, address
from millpond.cli.text import NoText, argument, is_text, piped

HELP = (
    "/exit or Ctrl-D leaves, /clear forgets the conversation, /system TEXT sets the system prompt (without TEXT: "
    "removes it), Ctrl-C stops an answer"
)
STOP_SECONDS = 15.0
KEYS = ("MILLPOND_API_KEY", "OPENAI_API_KEY")
"""Variables with the key to show, the first one set."""


class ChatError(Exception):
    """What went wrong, in words for the user."""


@dataclass
class ChatHistory:
    """What was said, and how to ask for more."""

    model: str
    system: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, object]:
        """JSON body of the next request."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, object] = {"model": self.model, "messages": first + self.turns, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    def say(self, role: str, text: str) -> None:
        self.turns.append({"role": role, "content": text})


@dataclass
class ShownAnswer:
    """One answer as it grows; times in seconds."""

    text: str = ""
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def line(self) -> str:
        """One line about its pace."""
        now = time.perf_counter()
        if self.first is None:
            return "no text"
        pace = f", {(self.tokens - 1) / (now - self.first):.1f} tok/s" if self.tokens > 1 and now > self.first else ""
        return f"{self.tokens} tokens, first after {self.first - self.began:.2f} s{pace}"


def stream_answer(client: httpx.Client, conversation: ChatHistory, answer: ShownAnswer) -> Iterator[str]:
    """Ask for the next answer and yield its pieces as they arrive. Raises ChatError when the server fails."""
    reader = EventReader()
    try:
        with client.stream("POST", "/v1/chat/completions", json=conversation.body()) as response:
            if response.status_code != 200:
                raise ChatError(_message_of(response.read(), f"HTTP {response.status_code}"))
            for chunk in response.iter_raw():
                for data in reader.feed(chunk):
                    if data != DONE and (piece := _piece_of(data, answer)):
                        yield piece
    except httpx.HTTPError as error:
        raise ChatError(f"the connection to the server failed: {error}") from error


def _piece_of(data: str, answer: ShownAnswer) -> str:
    """The text in one event, "" when it carries none; counts it in ``answer``."""
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ChatError(_message_of(data.encode(), "the server reports an error"))
        usage = event.get("usage") or {}
        choices = event.get("choices") or [{}]
        said = str((choices[0].get("delta") or {}).get("content") or "")
        piece = said.encode("utf-8", "replace").decode()  # JSON may carry halves of characters, which are no text
    except (ValueError, LookupError, AttributeError) as error:
        raise ChatError(f"the server sent an event that is not a chat chunk: {data[:200]}") from error
    if piece:
        answer.first = answer.first or time.perf_counter()
        answer.tokens += 1
        answer.text += piece
    # The server's own count, which comes last, is better than one token per piece.
    answer.tokens = usage.get("completion_tokens", answer.tokens)
    return piece


def _message_of(body: bytes, otherwise: str) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"{otherwise}: {body[:200].decode('utf-8', errors='replace')}"


def first_model(client: httpx.Client) -> str:
    """Name of the first model the server lists. Raises ChatError when nobody answers."""
    try:
        listed = client.get("/v1/models").raise_for_status().json()
        return str(listed["data"][0]["id"])
    except httpx.ConnectError as error:
        raise ChatError(f"no server answers at {client.base_url}; start one with: millpond serve demo") from error
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{client.base_url} does not list a model: {error}; name one with --model") from error


# --- the terminal -----------------------------------------------------------------------------------------------


class Terminal:
    """Reads lines from a person and shows answers. Errors and hints go to standard error."""

    def __init__(self, client: httpx.Client, conversation: ChatHistory) -> None:
        self._client = client
        self._conversation = conversation
        self._hints = Console(stderr=True, highlight=False)
        self._colour = Console(highlight=False)

    def loop(self) -> int:
        """Talk until /exit or the end of input; returns the exit code."""
        self._hints.print(f"{self._conversation.model} · {HELP}", style="dim", markup=False)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is told from others below
        while True:
            try:
                line = self._colour.input("[bold green]> [/]").strip()
                if line == "/exit":
                    return 0
                self._said(line)
            except EOFError:
                self._hints.print()
                return 0
            except KeyboardInterrupt:  # also the second of two, which comes when an answer has been stopped already
                self._hints.print("\n/exit or Ctrl-D leaves", style="dim")

    def _said(self, line: str) -> None:
        if not is_text(line):
            self._hints.print("that line is not in the terminal's encoding", style="red")
        elif line.startswith("/"):
            self._command(line)
        elif line:
            self._turn(line)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/clear":
            self._conversation.turns.clear()
            self._hints.print("forgotten", style="dim")
        elif word == "/system":
            self._conversation.system = rest.strip()
            self._hints.print("system prompt set" if rest.strip() else "no system prompt", style="dim")
        else:
            self._hints.print(HELP, style="dim", markup=False)

    def _turn(self, line: str) -> None:
        """One question and its answer. A failed one is taken back out of the conversation."""
        self._conversation.say("user", line)
        answer, ending = ShownAnswer(), ""
        try:
            show(stream_answer(self._client, self._conversation, answer))
        except KeyboardInterrupt:
            ending = " (stopped)"
        except ChatError as error:
            print()
            self._hints.print(str(error), style="red", markup=False)
            self._conversation.turns.pop()
            return
        self._conversation.say("assistant", answer.text)
        print()
        self._hints.print(f"[{answer.line()}]{ending}", style="dim", markup=False)


def show(pieces: Iterator[str]) -> None:
    """Write the pieces to standard output as they come."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def answer_once(client: httpx.Client, conversation: ChatHistory, question: str) -> int:
    """Answer one question in plain text: for pipes."""
    conversation.say("user", question)
    show(stream_answer(client, conversation, ShownAnswer()))
    print()
    return 0


# --- a server of one's own --------------------------------------------------------------------------------------


@contextmanager
def own_server(model: str) -> Iterator[str]:
    """Serve ``model`` on a free local port while the block runs; gives its base URL. Raises ChatError."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = python("-m", "millpond.cli.held", "serve", model, "--port", str(port), "--log-level", "warning")
    # A process group of its own keeps the terminal's Ctrl-C, meant for an answer, away from the server; what is at the
    # other end of its input is never written to, and closed by our end.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        process_group=0,
        env={**os.environ, **search_path()},
    )
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    with httpx.Client(timeout=5.0, **connection(url)) as client:
        while True:
            try:
                # The wait notices a dead child at once; its time-out only paces the probe.
                code = process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                try:
                    if client.get("/readyz").status_code == 200:
                        return
                except httpx.HTTPError:
                    continue
            else:
                raise ChatError(f"the server ended with status {code} before it was ready")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


# --- the subcommand ---------------------------------------------------------------------------------------------


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model. Text piped in is one question; its answer is printed as plain text.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("target", nargs="?", default="", metavar="MODEL", help="start a server for this model")
    where.add_argument("--url", type=address, default=None, help=f"use a running server; default: {DEFAULT_URL}")
    parser.add_argument(
        "--model", type=argument, default="", help="model to name in requests; default: the first the server lists"
    )
    parser.add_argument("--system", type=argument, default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=_tokens, default=None, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="0: always the likeliest token")


def run(args: argparse.Namespace) -> int:
    """Run it; 0 when all went well, 1 after an error, 130 after Ctrl-C outside a conversation."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        if args.target:
            with own_server(args.target) as url:
                return _talk(url, args)
        return _talk(args.url or DEFAULT_URL, args)
    except (ChatError, NoText, Unusable) as error:
        print(f"millpond chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _talk(url: str, args: argparse.Namespace) -> int:
    options = connection(url, key_from(KEYS))
    options["headers"]["accept-encoding"] = "identity"
    with httpx.Client(timeout=httpx.Timeout(None, connect=10.0), **options) as client:
        model = args.model or first_model(client)
        conversation = ChatHistory(model, args.system, args.max_tokens, args.temperature)
        if sys.stdin is not None and sys.stdin.isatty():
            return Terminal(client, conversation).loop()
        question = piped().strip()
        if not question:
            raise ChatError("nothing was piped in; give a question on standard input")
        return answer_once(client, conversation, question)
