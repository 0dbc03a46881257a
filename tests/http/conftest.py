"""Servers for the HTTP tests: real processes, real sockets, a scripted engine, a byte-level tokenizer.

The scripted engine answers with the prompt's tokens over and over, so every answer is known in advance.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message['role'] }}:{{ message['content'] }};{% endfor %}"
)
READY_SECONDS = 60


class Server:
    """A running server process. Its log is collected line by line."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._seen = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._seen:
                self.lines.append(line)
                self._seen.notify_all()
        with self._seen:
            self._seen.notify_all()

    def wait_for_line(self, text: str) -> str:
        """The first log line that contains ``text``."""

        def found() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self._seen:
            self._seen.wait_for(lambda: found() or not self._reader.is_alive(), READY_SECONDS)
        line = found()
        assert line is not None, "".join(self.lines)
        return line

    @property
    def url(self) -> str:
        return self.wait_for_line("listening url=").split("url=")[1].split()[0]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def health(self) -> dict[str, dict[str, int]]:
        body: dict[str, dict[str, int]] = httpx.get(f"{self.url}/health").json()
        return body

    def wait_until(self, condition: Callable[[dict[str, dict[str, int]]], bool]) -> dict[str, dict[str, int]]:
        """Ask /health until it says so."""
        for _ in range(2000):
            health = self.health()
            if condition(health):
                return health
        raise AssertionError(health)

    def engine_pid(self) -> int:
        """The only child of the server's process (Linux)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder's tokenizer: one token per byte, and a template that writes role:content; per message."""
    folder = tmp_path_factory.mktemp("byte-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@contextlib.contextmanager
def launched(command: list[str], ready: bool = True) -> Iterator[Server]:
    """A server process for the time of a block, ready unless told otherwise."""
    server = Server(command)
    try:
        if ready:
            server.wait_for_line("ready api=")
        yield server
    finally:
        server.stop()


def scripted(script: str, folder: Path, *flags: str, ready: bool = True) -> contextlib.AbstractContextManager[Server]:
    """A server in front of the scripted engine; see scripted_engine.py for the scripts."""
    program = str(Path(__file__).with_name("scripted_server.py"))
    return launched([sys.executable, program, script, str(folder), *flags], ready)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Start any server command: ``with launch(command) as server``."""
    return launched


StartServer = Callable[..., contextlib.AbstractContextManager[Server]]
Launch = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture
def start_server(byte_tokenizer: Path) -> StartServer:
    """Start a server of one's own: ``with start_server(script, *flags, ready=True) as server``."""

    def start(script: str, *flags: str, ready: bool = True) -> contextlib.AbstractContextManager[Server]:
        return scripted(script, byte_tokenizer, *flags, ready=ready)

    return start


@pytest.fixture(scope="session")
def server(byte_tokenizer: Path) -> Iterator[Server]:
    """One plain server for all tests that do not disturb it."""
    with scripted("plain", byte_tokenizer) as running:
        yield running


@pytest.fixture
def ai(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client
