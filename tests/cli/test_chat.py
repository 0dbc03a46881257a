from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedServer

CHAT = (
    "import argparse; from millpond.cli import chat; p = argparse.ArgumentParser(); "
    "chat.add_parser(p.add_subparsers()); a = p.parse_args(); raise SystemExit(chat.run(a))"
)


def piped(question: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHAT, "chat", *arguments]
    return subprocess.run(command, input=question, capture_output=True, text=True, timeout=60, check=False)


def test_piped_text_is_one_question_and_the_answer_is_plain(scripted_server: ScriptedServer) -> None:
    done = piped("hello\nthere\n", "--url", scripted_server.url, "--max-tokens", "3", "--system", "be brief")
    assert (done.returncode, done.stdout, done.stderr) == (0, "w1 é é \n", "")
    body = scripted_server.bodies[0]
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello\nthere"},
    ]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("good", 3, True)
    assert "temperature" not in body


@pytest.mark.parametrize(
    ("model", "message"),
    [("fails", "out of memory"), ("error-event", "the engine died"), ("garbage", "not a chat chunk")],
)
def test_a_failing_server_gives_its_words_and_status_1(
    scripted_server: ScriptedServer, model: str, message: str
) -> None:
    done = piped("hello", "--url", scripted_server.url, "--model", model)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_there() -> None:
    done = piped("hello", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no server answers at http://127.0.0.1:1" in done.stderr


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    done = piped("hello", str(tmp_path))
    assert done.returncode == 1
    assert "the server ended with status 1 before it was ready" in done.stderr
    assert "config.json" in done.stderr


def test_nothing_piped_in(scripted_server: ScriptedServer) -> None:
    done = piped("", "--url", scripted_server.url)
    assert done.returncode == 1
    assert "nothing was piped in" in done.stderr


class Talk:
    """The chat command on a terminal of its own: type a line, wait for words."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", CHAT, "chat", *arguments]
        environ = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environ)
        os.close(slave)
        self._seen = ""
        # A command that says nothing for a minute is ended; its terminal then closes and the wait below fails.
        self._limit = threading.Timer(60, self.process.kill)
        self._limit.start()

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def until(self, pattern: str) -> str:
        """Read on until the pattern has come; returns what came before it and the match."""
        while (found := re.search(pattern, self._seen)) is None:
            try:
                self._seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"{pattern!r} never came; got {self._seen!r}") from None
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before

    def close(self) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def talk(scripted_server: ScriptedServer) -> Iterator[Talk]:
    terminal = Talk("--url", scripted_server.url, "--model", "slow", "--max-tokens", "3")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_only_the_answer_and_commands_work(scripted_server: ScriptedServer, talk: Talk) -> None:
    talk.until("> ")
    talk.type("first question")
    talk.until("w1 ")
    talk.process.send_signal(signal.SIGINT)
    talk.until(r"\(stopped\)")
    talk.until("> ")
    talk.type("/system be kind")
    talk.until("system prompt set")
    talk.type("second question")
    talk.until("w2 é é")
    talk.until("3 tokens, first after")
    talk.type("/clear")
    talk.until("forgotten")
    talk.type("third question")
    talk.until("3 tokens, first after")
    talk.type("/exit")
    assert talk.process.wait(20) == 0
    assert scripted_server.cut_off == 1
    assert [[message["content"] for message in body["messages"]] for body in scripted_server.bodies] == [
        ["first question"],
        ["be kind", "first question", "w1 ", "second question"],
        ["be kind", "third question"],
    ]


def test_end_of_input_leaves(talk: Talk) -> None:
    talk.until("> ")
    os.write(talk._master, b"\x04")
    assert talk.process.wait(20) == 0
