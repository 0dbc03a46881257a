"""Servers for the HTTP tests: real processes, real sockets, a scripted engine, a byte-level tokenizer.

The scripted engine answers with the prompt's tokens over and over, so every answer is known in advance.

Clients are made with ``verify=False`` where many are: reading the machine's certificates, for connections that have
none, takes 50 ms of processor time each.
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
from nursery import AVAILABLE, Nursery, Process
from raw_target import Target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from waiting import until

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if message['name'] == 'hidden' %}{% continue %}{% endif %}"
    "{{ message['role'] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'assistant' %}?{% endif %}"
)
RECOMMENDED = {"temperature": 0.6, "top_k": 20, "top_p": 5, "transformers_version": "5.0.0"}
"""What the model's authors say of sampling; one value is none that a request could have."""
READY_SECONDS = 60


class Server:
    """A running server process. Its log is collected line by line."""

    def __init__(self, process: Process) -> None:
        self.process = process
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
        http = openai.DefaultHttpxClient(verify=False, timeout=20)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, http_client=http)

    def async_client(self) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(verify=False, timeout=20)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, http_client=http
        )

    def health(self) -> dict[str, dict[str, int]]:
        body: dict[str, dict[str, int]] = httpx.get(f"{self.url}/health", verify=False, timeout=20).json()
        return body

    def wait_until(self, condition: Callable[[dict[str, dict[str, int]]], bool]) -> dict[str, dict[str, int]]:
        """Ask /health until it says so."""
        return until(self.health, condition)

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
    folder = tmp_path_factory.mktemp("models") / "byte-model"
    folder.mkdir()
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
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return folder


@contextlib.contextmanager
def running(process: Process, ready: bool) -> Iterator[Server]:
    """A server process for the time of a block, ready unless told otherwise."""
    server = Server(process)
    try:
        if ready:
            server.wait_for_line("ready api=")
        yield server
    finally:
        server.stop()


def launched(command: list[str], ready: bool = True) -> contextlib.AbstractContextManager[Server]:
    """A server that is started by a command."""
    return running(subprocess.Popen(command, stderr=subprocess.PIPE, text=True), ready)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Start any server command: ``with launch(command) as server``."""
    return launched


StartServer = Callable[..., contextlib.AbstractContextManager[Server]]
Launch = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery | None]:
    """Where scripted servers come from, unless this system has to start each as a command."""
    if not AVAILABLE:
        yield None
        return
    opened = Nursery()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def start_server(byte_tokenizer: Path, nursery: Nursery | None) -> StartServer:
    """Start a server in front of the scripted engine: ``with start_server(script, *flags, ready=True) as server``.

    See scripted_engine.py for the scripts.
    """
    program = str(Path(__file__).with_name("scripted_server.py"))

    def start(script: str, *flags: str, ready: bool = True) -> contextlib.AbstractContextManager[Server]:
        arguments = [script, str(byte_tokenizer), *flags]
        if nursery is None:
            return launched([sys.executable, program, *arguments], ready)
        return running(nursery.start("scripted_server", arguments), ready)

    return start


@pytest.fixture(scope="session")
def millpond(nursery: Nursery | None) -> Launch:
    """Start Millpond itself: ``with millpond(["serve", model, *flags]) as server``.

    Where the command's own start is what matters, use ``launch``.
    """

    def start(arguments: list[str], ready: bool = True) -> contextlib.AbstractContextManager[Server]:
        if nursery is None:
            return launched([sys.executable, "-m", "millpond.cli.main", *arguments], ready)
        return running(nursery.start("millpond.cli.main", arguments), ready)

    return start


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Iterator[Server]:
    """One plain server for all tests that do not disturb it."""
    with start_server("plain") as shared:
        yield shared


@pytest.fixture(scope="session")
def shot_at(start_server: StartServer) -> Iterator[Target]:
    """One server for bytes that no HTTP library would send."""
    with start_server("plain", "allowed_hosts", "*") as server:
        yield Target(server)


@pytest.fixture
def target(shot_at: Target) -> Iterator[Target]:
    """The same, which has taken no harm after each test."""
    yield shot_at
    shot_at.check_steady()


@pytest.fixture
def ai(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20, verify=False) as client:
        yield client
