"""How chat and bench reach a server, and text that is none: nothing is shown to a proxy, and there is no traceback."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

import millpond
from millpond.bench.connection import Unusable, connection, is_local, key_from
from millpond.config import ConfigError, read_config
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress
from millpond.hub.source import resolve

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedServer

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy", "NO_PROXY")
LATIN = os.fsdecode(b"caf\xe9")
KEY = "a-secret-key-0123"


class Proxy:
    """Takes connections, notes what it is sent, and refuses."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                self.heard.append(client.recv(65536))
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that the environment names for everything, and nothing else."""
    opened = Proxy()
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, opened.url)
    yield opened
    opened.close()


LOCAL = (
    *("localhost", "LOCALHOST", "localhost.", "millpond.localhost", "127.0.0.1", "127.1", "127.0.0.53", "2130706433"),
    *("[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]"),
)
REMOTE = (
    "example.org",
    "localhost.example.org",
    "notlocalhost",
    "10.0.0.1",
    "128.0.0.1",
    "127.0.0.1.nip.io",
)


@pytest.mark.parametrize("host", LOCAL)
def test_this_machine_is_asked_directly(host: str, proxy: Proxy) -> None:
    for url in (f"http://{host}", f"http://{host}:8000/v1", f"https://{host}:8000"):
        assert is_local(url)
        options = connection(url, KEY)
        assert options["trust_env"] is False
        with httpx.Client(**options) as client:
            assert not client._mounts
    assert not proxy.heard


@pytest.mark.parametrize("host", REMOTE)
def test_others_are_asked_as_the_environment_says(host: str, proxy: Proxy) -> None:
    assert not is_local(f"http://{host}:8000/v1")
    with httpx.Client(**connection(f"http://{host}:8000/v1")) as client:
        assert client.get("/v1/models").status_code == 502
    assert proxy.heard[0].startswith(f"GET http://{host}:8000/v1/models ".encode())


@pytest.mark.parametrize("bad", ["socks4://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used(bad: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nothing to this machine's servers, and one sentence for others."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, bad)
    httpx.Client(**connection("http://127.0.0.1:8000")).close()
    with pytest.raises(Unusable, match="the proxy that the environment names cannot be used") as refused:
        connection("http://example.org")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["schlüssel-0123", "a\nb", LATIN])
def test_a_key_that_no_header_can_carry(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_API_KEY", key)
    with pytest.raises(Unusable, match="MILLPOND_API_KEY") as refused:
        key_from(("MILLPOND_API_KEY", "OPENAI_API_KEY"))
    assert key not in str(refused.value)


CLIENTS = {"Client", "AsyncClient", "get", "post", "stream", "request"}


def test_every_connection_of_ours_is_made_with_care() -> None:
    """No httpx client in Millpond, nor in its benchmarks, trusts the environment about this machine's servers."""
    folder = Path(millpond.__file__).parent
    careless = []
    for path in [*folder.rglob("*.py"), *(folder.parent / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLIENTS):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "httpx"):
                continue
            named = {keyword.arg for keyword in node.keywords}
            if not named & {None, "trust_env"} and path.name != "connection.py":
                careless.append(f"{path}:{node.lineno}")
    assert not careless


def millpond_command(*arguments: str, given: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "millpond.cli.main", *arguments]
    environment = {**os.environ, "MILLPOND_API_KEY": KEY, "OPENAI_API_KEY": KEY, **environ}
    return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False, env=environment)


def test_chat_and_bench_beside_a_proxy(scripted_server: ScriptedServer, proxy: Proxy) -> None:
    done = millpond_command("chat", "--url", scripted_server.url, given=b"hi", all_proxy="socks5://127.0.0.1:9")
    assert (done.returncode, done.stderr) == (0, b"")
    flags = ("--workload", "single", "--repeats", "1", "--tokens", "2", "--prompt-scale", "0.01")
    done = millpond_command("bench", "--url", scripted_server.url, *flags, all_proxy="socks5://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert not proxy.heard
    refused = millpond_command("chat", "--url", "http://example.org", given=b"hi", http_proxy="socks4://127.0.0.1:9")
    assert refused.returncode == 1
    assert refused.stderr.startswith(b"millpond chat: the proxy ")


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environ", "asked"),
    [
        ("größe".encode(), {"PYTHONIOENCODING": "ascii"}, "größe"),
        ("größe".encode("latin-1"), {"PYTHONIOENCODING": "latin-1"}, "größe"),
        ("größe".encode(), {"LC_ALL": "C"}, "größe"),
        ("größe".encode("utf-8-sig"), {}, "größe"),
        (b"caf\xe9", {}, None),
        (b"caf\xe9", {"LC_ALL": "C"}, None),
    ],
)
def test_piped_text(scripted_server: ScriptedServer, given: bytes, environ: dict[str, str], asked: str | None) -> None:
    """The scripted answer has characters that ASCII lacks, too."""
    done = millpond_command("chat", "--url", scripted_server.url, "--max-tokens", "3", given=given, **environ)
    if asked is None:
        assert (done.returncode, scripted_server.bodies) == (1, [])
        assert done.stderr.startswith(b"millpond chat: standard input is not UTF-8 text: byte 4 is 0xe9")
    else:
        assert (done.returncode, done.stderr) == (0, b"")
        assert scripted_server.bodies[0]["messages"] == [{"role": "user", "content": asked}]


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "--system", LATIN),
        ("chat", "--model", LATIN),
        ("chat", "--url", f"http://{LATIN}"),
        ("bench", "--label", LATIN),
        ("serve", LATIN),
        ("serve", "demo", "--model-name", LATIN),
        ("serve", "demo", "--config", LATIN),
        ("pull", LATIN),
        ("cache", "ls", "--cache-dir", LATIN),
    ],
)
def test_arguments_that_are_no_text(arguments: tuple[str, ...]) -> None:
    done = millpond_command(*arguments, LC_ALL="C")
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"caf\\" in done.stderr + done.stdout


def test_settings_and_models_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MILLPOND_MODEL_NAME: must be UTF-8 text"):
        read_config({}, {"MILLPOND_MODEL_NAME": LATIN})
    folder = tmp_path / LATIN
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    with pytest.raises(SourceError, match="not UTF-8 text"):
        resolve(str(folder), SilentProgress())
    (tmp_path / "plain").symlink_to(folder)
    with pytest.raises(SourceError, match="not UTF-8 text; rename it"):
        resolve(str(tmp_path / "plain"), SilentProgress())
